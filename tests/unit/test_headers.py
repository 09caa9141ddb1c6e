"""The session headers must be the same on TorchServe's both sides: what is committed agrees, and every way they can
differ is told.
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
from tests.support.product_log import told

REPO = Path(__file__).resolve().parents[2]
SESSION = "X-Amzn-SageMaker-Session-Id"
CLOSED = "X-Amzn-SageMaker-Closed-Session-Id"
FILE = {"ts_header_key_sequence_id": SESSION, "ts_header_key_sequence_end": CLOSED}
FRONTEND_ENV = {"TS_HEADER_KEY_SEQUENCE_ID": SESSION, "TS_HEADER_KEY_SEQUENCE_END": CLOSED}
WORKER_ENV = {"TS_REQUEST_SEQUENCE_ID": SESSION, "TS_REQUEST_SEQUENCE_END": CLOSED}
ENV_ON, ENV_OFF = {"enable_envvars_config": "true"}, {"enable_envvars_config": "false"}


def exported(path: Path) -> dict[str, str]:
    """The variables that a shell has after sourcing `path`, and had not before."""
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


def test_the_last_of_two_equal_keys_counts():
    assert read_properties("a=1\na=2\n") == {"a": "2"}


def test_an_empty_file_has_no_properties():
    assert read_properties("") == {}
    assert read_properties("\n \n# nothing\n") == {}


# --- what is committed ---


def test_the_committed_files_agree():
    properties = read_properties((REPO / "config.properties").read_text())
    assert header_problems(properties, exported(REPO / "deploy" / "local.env")) == []


def test_the_committed_frontend_without_the_committed_environment_is_told():
    properties = read_properties((REPO / "config.properties").read_text())
    problems = header_problems(properties, {})
    assert len(problems) == 2
    assert all("deploy/local.env" in problem for problem in problems)


# --- the combinations that were measured (letters as in the table of facts) ---


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
        pytest.param({}, {}, ["frontend", "worker", "frontend", "worker"], id="nothing"),
    ],
)
def test_combinations_that_lose_sessions_are_told_by_side(properties, environment, sides):
    problems = header_problems(properties, environment)
    assert [problem.split(" ")[1] for problem in problems] == sides


def test_a_problem_names_key_value_and_what_it_must_be():
    problems = header_problems(
        {**FILE, "ts_header_key_sequence_id": "X-Id"}, {**WORKER_ENV, "TS_REQUEST_SEQUENCE_END": ""}
    )
    assert problems == [
        f"the frontend has ts_header_key_sequence_id=X-Id; it must be {SESSION} (config.properties)",
        f"the worker has TS_REQUEST_SEQUENCE_END=(unset); it must be {CLOSED} (deploy/local.env)",
    ]


@pytest.mark.parametrize("spelled", [SESSION.lower(), SESSION.upper(), SESSION + " ", "X-Amzn-Sagemaker-Session-Id"])
def test_another_spelling_of_the_header_is_a_problem_on_either_side(spelled):
    assert len(header_problems({**FILE, "ts_header_key_sequence_id": spelled}, WORKER_ENV)) == 1
    assert len(header_problems(FILE, {**WORKER_ENV, "TS_REQUEST_SEQUENCE_ID": spelled})) == 1


def test_the_two_headers_may_not_be_swapped():
    swapped = {"ts_header_key_sequence_id": CLOSED, "ts_header_key_sequence_end": SESSION}
    assert len(header_problems(swapped, WORKER_ENV)) == 2


# --- the environment's override ---


def test_an_override_that_is_switched_on_beats_the_file():
    environment = {**WORKER_ENV, "TS_HEADER_KEY_SEQUENCE_ID": "X-Other"}
    problems = header_problems({**FILE, **ENV_ON}, environment)
    assert len(problems) == 1
    assert "environment variable TS_HEADER_KEY_SEQUENCE_ID=X-Other" in problems[0]


def test_an_override_mends_a_wrong_file():
    wrong = {"ts_header_key_sequence_id": "X-A", "ts_header_key_sequence_end": "X-B", **ENV_ON}
    assert header_problems(wrong, {**FRONTEND_ENV, **WORKER_ENV}) == []


def test_an_override_that_is_switched_off_is_ignored():
    environment = {**WORKER_ENV, "TS_HEADER_KEY_SEQUENCE_ID": "X-Other"}
    assert header_problems(FILE, environment) == []
    assert header_problems({**FILE, **ENV_OFF}, environment) == []


# --- finding the frontend's file ---

ASK = "import json; from llava_sessions.torchserve.headers import frontend_properties as f; print(json.dumps(f()))"
PARENT = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"


def properties_seen_below(arguments: list[str], folder: Path) -> dict | None:
    """What a process sees whose parent has `arguments` on its command line and runs in `folder`."""
    command = [sys.executable, "-c", PARENT, ASK, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPO / "handler")}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True, text=True)
    return json.loads(ran.stdout)


def test_without_a_frontend_above_nothing_is_known():
    assert frontend_properties() is None


def test_the_file_of_the_process_above_is_read_from_that_process_folder(tmp_path):
    (tmp_path / "own.properties").write_text("a=1\n# b=2\n")
    assert properties_seen_below(["org.pytorch.serve.ModelServer", "-f", "own.properties"], tmp_path) == {"a": "1"}
    absolute = str(tmp_path / "own.properties")
    assert properties_seen_below(["org.pytorch.serve.ModelServer", "-f", absolute], tmp_path) == {"a": "1"}


def test_a_frontend_without_a_file_has_no_properties(tmp_path):
    assert properties_seen_below(["org.pytorch.serve.ModelServer"], tmp_path) == {}


@pytest.mark.parametrize(
    "arguments", [["org.pytorch.serve.ModelServer", "-f", "missing.properties"], ["something.else"]]
)
def test_an_unreadable_file_or_another_parent_tells_nothing(arguments, tmp_path):
    assert properties_seen_below(arguments, tmp_path) is None


# --- ending sequences ---

PATIENCE_S = 10.0


class Inference(http.server.ThreadingHTTPServer):
    """A frontend's inference address: notes what was asked, answers with the next of `statuses`, else 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.asked: queue.SimpleQueue = queue.SimpleQueue()
        self.statuses: list[int] = []

    def next(self) -> tuple[str, str, dict, dict]:
        return self.asked.get(timeout=PATIENCE_S)


class Asked(http.server.BaseHTTPRequestHandler):
    """One request at the inference address."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.end_headers()
        self.server.asked.put((self.command, self.path, dict(self.headers), body))

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def inference() -> Iterator[Inference]:
    with Inference() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_sequence_is_ended_by_a_close_on_its_own_header(inference, host):
    EndRequestSender(f"http://{host}:{inference.server_port}", "llava").end("ts-seq-1")
    method, path, headers, body = inference.next()
    assert (method, path, body) == ("POST", "/predictions/llava", {"type": "close_session"})
    assert headers[SESSION] == "ts-seq-1"
    assert headers["Content-Type"] == "application/json"


def test_what_could_not_be_ended_is_tried_again_and_an_id_that_no_header_can_carry_stops_nothing(inference, caplog):
    ender = EndRequestSender(f"http://127.0.0.1:{inference.server_port}", "llava")
    inference.statuses = [500, 503]
    with caplog.at_level(logging.WARNING):
        ender.end("one")
        assert [inference.next()[2][SESSION] for _ in range(3)] == ["one"] * 3
        assert eventually(lambda: ender.pending == 0)
        assert ender.able
        ender.end("thr\u00e9\u00e9")
        assert inference.next()[2][SESSION] == "thr\u00e9\u00e9".encode().decode("latin-1")
    assert told(caplog) == []


def test_a_sequence_that_can_not_be_ended_is_told_of_once_and_not_named(inference, caplog):
    ender = EndRequestSender(f"http://127.0.0.1:{inference.server_port}", "llava")
    inference.statuses = [500] * 3
    with caplog.at_level(logging.WARNING):
        ender.end("one")
        assert eventually(lambda: told(caplog))
    assert [record.getMessage() for record in told(caplog)] == ["sequence_not_ended reason=status 500"]
    assert inference.asked.qsize() == 3
    assert not ender.able
    ender.end("two")  # an expired session is tried all the same, and perhaps it was a bad moment
    assert eventually(lambda: ender.able)
    assert ender.pending == 0


def test_a_frontend_with_tls_takes_no_requests_of_ours():
    assert not EndRequestSender("https://127.0.0.1:8443", "llava").able
