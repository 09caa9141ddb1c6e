"""Session headers of TorchServe's frontend and worker: the committed files agree, and each difference is reported.
EndRequestSender: end requests to a fake frontend.
"""

from __future__ import annotations

import http.server
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_sessions.torchserve.headers import frontend_properties, header_problems, read_properties
from llava_sessions.torchserve.sequences import EndRequestSender
from tests.support.commands import eventually
from tests.support.product_log import product_records

REPO = Path(__file__).resolve().parents[2]
SESSION = "X-Amzn-SageMaker-Session-Id"
CLOSED = "X-Amzn-SageMaker-Closed-Session-Id"
FILE = {"ts_header_key_sequence_id": SESSION, "ts_header_key_sequence_end": CLOSED}
FRONTEND_ENV = {"TS_HEADER_KEY_SEQUENCE_ID": SESSION, "TS_HEADER_KEY_SEQUENCE_END": CLOSED}
WORKER_ENV = {"TS_REQUEST_SEQUENCE_ID": SESSION, "TS_REQUEST_SEQUENCE_END": CLOSED}
ENV_ON, ENV_OFF = {"enable_envvars_config": "true"}, {"enable_envvars_config": "false"}


def exported(path: Path) -> dict[str, str]:
    """Return the variables that sourcing `path` adds to an empty environment."""
    script = 'set -a; . "$1"; env -0'
    ran = subprocess.run(["sh", "-c", script, "sh", path], env={}, capture_output=True, check=True, text=True)
    return dict(pair.split("=", 1) for pair in ran.stdout.split("\0") if pair)


# --- properties ---


def test_properties_are_read_as_pairs():
    text = "# a comment\n\n  key = value with spaces \nother=a=b\nempty=\nalone\n#off=1\nkey2=v # not a comment\r\n"
    assert read_properties(text) == {
        "key": "value with spaces",
        "other": "a=b",
        "empty": "",
        "alone": "",
        "key2": "v # not a comment",
    }


def test_the_last_of_two_equal_keys_is_used():
    assert read_properties("a=1\na=2\n") == {"a": "2"}


def test_an_empty_file_has_no_properties():
    assert read_properties("") == {}
    assert read_properties("\n \n# nothing\n") == {}


# --- committed files ---


def test_the_committed_files_agree():
    properties = read_properties((REPO / "config.properties").read_text())
    assert header_problems(properties, exported(REPO / "deploy" / "serve" / "local.env")) == []


def test_the_committed_frontend_without_the_committed_environment_is_a_problem():
    properties = read_properties((REPO / "config.properties").read_text())
    problems = header_problems(properties, {})
    assert len(problems) == 2
    assert all("local.env" in problem for problem in problems)


# --- combinations, each measured on TorchServe 0.12 ---


@pytest.mark.parametrize(
    ("properties", "environment"),
    [
        pytest.param(ENV_ON, {**FRONTEND_ENV, **WORKER_ENV}, id="a"),
        pytest.param(FILE, WORKER_ENV, id="g"),
        pytest.param({**FILE, **ENV_OFF}, WORKER_ENV, id="g, switch written out"),
        pytest.param({**FILE, **ENV_ON}, {**FRONTEND_ENV, **WORKER_ENV}, id="a and g"),
        pytest.param({**FILE, **ENV_ON}, WORKER_ENV, id="g, nothing overridden"),
        pytest.param({"enable_envvars_config": "TRUE"}, {**FRONTEND_ENV, **WORKER_ENV}, id="a, upper case"),
    ],
)
def test_combinations_that_carry_sessions_have_no_problems(properties, environment):
    assert header_problems(properties, environment) == []


@pytest.mark.parametrize(
    ("properties", "environment", "sides"),
    [
        pytest.param(ENV_OFF, {**FRONTEND_ENV, **WORKER_ENV}, ["frontend", "frontend"], id="b"),
        pytest.param({}, {**FRONTEND_ENV, **WORKER_ENV}, ["frontend", "frontend"], id="b, switch absent"),
        pytest.param(ENV_ON, FRONTEND_ENV, ["worker", "worker"], id="c"),
        pytest.param(ENV_ON, WORKER_ENV, ["frontend", "frontend"], id="d"),
        pytest.param(FILE, {}, ["worker", "worker"], id="e"),
        pytest.param(
            {**FILE, "ts_request_sequence_id": SESSION, "ts_request_sequence_end": CLOSED},
            {},
            ["worker", "worker"],
            id="f",
        ),
        pytest.param({}, {}, ["frontend", "worker", "frontend", "worker"], id="no settings"),
    ],
)
def test_combinations_that_lose_sessions_name_the_side(properties, environment, sides):
    problems = header_problems(properties, environment)
    assert [problem.split(" ")[1] for problem in problems] == [f"{side}'s" for side in sides]


def test_a_problem_names_key_expected_and_actual_value():
    problems = header_problems(
        {**FILE, "ts_header_key_sequence_id": "X-Id"}, {**WORKER_ENV, "TS_REQUEST_SEQUENCE_END": ""}
    )
    assert problems == [
        f"the frontend's ts_header_key_sequence_id must be {SESSION}, got X-Id (config.properties)",
        f"the worker's TS_REQUEST_SEQUENCE_END must be {CLOSED}, got (unset) (local.env)",
    ]


@pytest.mark.parametrize("spelled", [SESSION.lower(), SESSION.upper(), SESSION + " ", "X-Amzn-Sagemaker-Session-Id"])
def test_another_spelling_of_the_header_is_a_problem_on_either_side(spelled):
    assert len(header_problems({**FILE, "ts_header_key_sequence_id": spelled}, WORKER_ENV)) == 1
    assert len(header_problems(FILE, {**WORKER_ENV, "TS_REQUEST_SEQUENCE_ID": spelled})) == 1


def test_the_two_headers_may_not_be_swapped():
    swapped = {"ts_header_key_sequence_id": CLOSED, "ts_header_key_sequence_end": SESSION}
    assert len(header_problems(swapped, WORKER_ENV)) == 2


# --- overrides from the environment ---


def test_an_enabled_override_replaces_the_property():
    environment = {**WORKER_ENV, "TS_HEADER_KEY_SEQUENCE_ID": "X-Other"}
    problems = header_problems({**FILE, **ENV_ON}, environment)
    assert len(problems) == 1
    assert "environment variable TS_HEADER_KEY_SEQUENCE_ID must be" in problems[0]
    assert "got X-Other" in problems[0]


def test_an_override_corrects_a_wrong_file():
    wrong = {"ts_header_key_sequence_id": "X-A", "ts_header_key_sequence_end": "X-B", **ENV_ON}
    assert header_problems(wrong, {**FRONTEND_ENV, **WORKER_ENV}) == []


def test_a_disabled_override_is_ignored():
    environment = {**WORKER_ENV, "TS_HEADER_KEY_SEQUENCE_ID": "X-Other"}
    assert header_problems(FILE, environment) == []
    assert header_problems({**FILE, **ENV_OFF}, environment) == []


# --- the frontend's properties file ---

ASK = "import json; from llava_sessions.torchserve.headers import frontend_properties as f; print(json.dumps(f()))"
PARENT = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"


def properties_seen_below(arguments: list[str], folder: Path) -> dict | None:
    """Return `frontend_properties()` of a process whose parent has these arguments and runs in `folder`."""
    command = [sys.executable, "-c", PARENT, ASK, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPO / "handler")}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True, text=True)
    return json.loads(ran.stdout)


def test_without_a_frontend_among_the_ancestors_there_are_no_properties():
    assert frontend_properties() is None


def test_a_relative_path_is_resolved_in_the_frontends_working_folder(tmp_path):
    (tmp_path / "own.properties").write_text("a=1\n# b=2\n")
    assert properties_seen_below(["org.pytorch.serve.ModelServer", "-f", "own.properties"], tmp_path) == {"a": "1"}
    absolute = str(tmp_path / "own.properties")
    assert properties_seen_below(["org.pytorch.serve.ModelServer", "-f", absolute], tmp_path) == {"a": "1"}


def test_a_frontend_without_a_file_has_empty_properties(tmp_path):
    assert properties_seen_below(["org.pytorch.serve.ModelServer"], tmp_path) == {}


@pytest.mark.parametrize(
    "arguments", [["org.pytorch.serve.ModelServer", "-f", "missing.properties"], ["something.else"]]
)
def test_an_unreadable_file_or_another_parent_gives_no_properties(arguments, tmp_path):
    assert properties_seen_below(arguments, tmp_path) is None


# --- end requests ---

PATIENCE_S = 10.0


class FakeFrontend(http.server.ThreadingHTTPServer):
    """A fake inference address. It records requests and answers with the next of `statuses`, else with 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeFrontendHandler)
        self.asked: queue.SimpleQueue = queue.SimpleQueue()
        self.statuses: list[int] = []

    def next(self) -> tuple[str, str, dict, dict]:
        return self.asked.get(timeout=PATIENCE_S)


class FakeFrontendHandler(http.server.BaseHTTPRequestHandler):
    """The handler of one request at the fake inference address."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.end_headers()
        self.server.asked.put((self.command, self.path, dict(self.headers), body))

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def frontend() -> Iterator[FakeFrontend]:
    with FakeFrontend() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_an_end_request_closes_the_session_in_its_header(frontend, host):
    EndRequestSender(f"http://{host}:{frontend.server_port}", "llava").end("ts-seq-1")
    method, path, headers, body = frontend.next()
    assert (method, path, body) == ("POST", "/predictions/llava", {"type": "close_session"})
    assert headers[SESSION] == "ts-seq-1"
    assert headers["Content-Type"] == "application/json"


def test_a_failed_end_request_is_retried_and_a_non_ascii_id_is_sent(frontend, caplog):
    sender = EndRequestSender(f"http://127.0.0.1:{frontend.server_port}", "llava")
    frontend.statuses = [500, 503]
    with caplog.at_level(logging.WARNING):
        sender.end("one")
        assert [frontend.next()[2][SESSION] for _ in range(3)] == ["one"] * 3
        assert eventually(lambda: sender.pending == 0)
        assert sender.able
        sender.end("thr\u00e9\u00e9")
        assert frontend.next()[2][SESSION] == "thr\u00e9\u00e9".encode().decode("latin-1")
    assert product_records(caplog) == []


def test_a_sequence_that_can_not_be_ended_is_logged_once_without_its_id(frontend, caplog):
    sender = EndRequestSender(f"http://127.0.0.1:{frontend.server_port}", "llava")
    frontend.statuses = [500] * 3
    with caplog.at_level(logging.WARNING):
        sender.end("one")
        assert eventually(lambda: product_records(caplog))
    assert [record.getMessage() for record in product_records(caplog)] == ["sequence_not_ended reason=status 500"]
    assert frontend.asked.qsize() == 3
    assert not sender.able
    sender.end("two")  # sent although the frontend seems unable: the failure may have passed
    assert eventually(lambda: sender.able)
    assert sender.pending == 0


def test_a_frontend_with_tls_accepts_no_end_requests():
    assert not EndRequestSender("https://127.0.0.1:8443", "llava").able
