"""The launcher against the real TorchServe: it starts, says why when it cannot, and leaves nothing behind.

The model is a stand-in that needs no weights and no torch, so a start takes two seconds; the product's handler has
tests of its own. Knows processes and the launcher's public face only. Where servers can run side by side they do, to
save the two seconds that each takes to start, and to stop.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.serve import LOG_CONFIG, ServeError, TorchServe, choose_ports, free_ports, models_argument

REPO = Path(__file__).resolve().parents[2]
SESSION = "X-Amzn-SageMaker-Session-Id"
HANDLER = '''
import json, logging, os, time


class Handler:
    """Answers with the session's id; {"steps": n} answers in n chunks, one a step."""

    def initialize(self, ctx):
        if os.environ.get("STAND_IN") == "refuse":
            logging.error("startup_error problem=%s", "llava.dtype is 'bananas'")
            raise RuntimeError("refused")
        if os.environ.get("STAND_IN") == "crash":
            raise ZeroDivisionError("a bug at start")
        self.left = {}
        logging.info("stand_in_ready pid=%d", os.getpid())

    def handle(self, rows, ctx):
        answers, stops = [], []
        for number, row in enumerate(rows):
            request = ctx.request_ids[number]
            if "body" in row:
                self.left[request] = row["body"].get("steps", 0)
            if self.left[request] == 0:
                answers.append(json.dumps({"session": ctx.get_sequence_id(number)}))
                stops.append(None)
                continue
            self.left[request] -= 1
            answers.append("chunk\\n")
            stops.append(self.left[request] == 0)
        ctx.stopping_criteria = [lambda _, stop=stop: stop for stop in stops]
        time.sleep(0.002)
        return answers
'''
CONFIG = """
minWorkers: 1
maxWorkers: 1
batchSize: 16
maxBatchDelay: 2
maxNumSequence: 16
maxSequenceJobQueueSize: 4
sequenceMaxIdleMSec: 600000
sequenceTimeoutMSec: 600000
maxRetryTimeoutInSec: 1
sequenceBatching: true
continuousBatching: true
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with the stand-in, as the archiver's no-archive format lays it out."""
    root = tmp_path_factory.mktemp("store")
    model = root / "stand-in"
    (model / "MAR-INF").mkdir(parents=True)
    (model / "stand_in.py").write_text(HANDLER)
    (model / "model-config.yaml").write_text(CONFIG)
    details = {
        "modelName": "stand-in",
        "handler": "stand_in.py",
        "modelVersion": "1.0",
        "configFile": "model-config.yaml",
    }
    manifest = {"createdOn": "now", "runtime": "python", "model": details, "archiverVersion": "0.12.0"}
    (model / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    return root


def call(server: TorchServe, body: dict, session: str = "s1") -> str:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    headers = {"Content-Type": "application/json", SESSION: session}
    connection.request("POST", "/invocations", json.dumps(body), headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    assert reply.status == 200, text
    return text


def get_metrics(server: TorchServe) -> str:
    host, _, path = server.metrics_url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request("GET", f"/{path}")
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def alive(pids: list[int]) -> list[int]:
    """Those that still run; a zombie, which waits only to be reaped, does not."""
    running = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                running.append(pid)
        except psutil.NoSuchProcess:
            pass
    return running


def eventually(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def log_bytes(server: TorchServe) -> int:
    return sum(path.stat().st_size for path in server.log_path.parent.iterdir())


# --- the class --------------------------------------------------------------------------------------------------------


def test_two_servers_side_by_side_serve_log_little_and_leave_nothing(
    store: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.getbasetemp() / "kept"
    first = TorchServe(store, "stand-in")
    second = TorchServe(store, "stand-in", home=home, properties={"job_queue_size": "7"})
    try:
        for server in (first, second):
            server.start()
        for server in (first, second):
            assert server.wait_ready(60) > 0
            assert json.loads(call(server, {}, "chat-7")) == {"session": "chat-7"}, "headers reach the worker"
        assert first.url != second.url

        console = (first.home / "logs" / "console.log").read_text()
        assert re.search(r"stand_in_ready pid=\d+", console), "the handler's events show on the console"
        before = log_bytes(first)
        assert call(first, {"steps": 300}).count("chunk") == 300
        assert log_bytes(first) == before, "a step writes no log line"

        metrics = get_metrics(first)
        assert 'ts_inference_requests_total{model_name="stand-in"' in metrics
        assert "# TYPE llava_open_sessions gauge" in metrics, "deploy/metrics.yaml is the one in use"
        assert "job_queue_size=7" in (home / "config.properties").read_text()
        pids = [pid for server in (first, second) for pid in (server.pid, *server.worker_pids())]
        assert len(set(pids)) == 4
    finally:
        first.stop()
        second.stop()
    assert alive(pids) == []
    assert not first.home.exists()
    assert second.log_path.is_file(), "a home that was given is kept"
    first.stop()  # again: nothing to do


def test_failed_start_shows_the_handlers_reason_fast(store: Path) -> None:
    refusing, crashing = (TorchServe(store, "stand-in", env={"STAND_IN": how}) for how in ("refuse", "crash"))
    began = time.monotonic()
    try:
        refusing.start()
        crashing.start()
        with pytest.raises(ServeError) as raised:
            refusing.wait_ready(120)
        assert str(raised.value).splitlines()[1:] == ["startup_error problem=llava.dtype is 'bananas'"]
        with pytest.raises(ServeError, match="ZeroDivisionError: a bug at start"):
            crashing.wait_ready(120)
    finally:
        refusing.stop()
        crashing.stop()
    assert time.monotonic() - began < 30
    assert not refusing.home.exists()


# --- what stops a start before java -----------------------------------------------------------------------------------


def test_one_name_means_one_archive(store: Path, tmp_path: Path) -> None:
    assert models_argument(store, "stand-in") == "stand-in=stand-in"
    with pytest.raises(ServeError, match="no archive 'llava'"):
        models_argument(store, "llava")
    (tmp_path / "llava.mar").touch()
    (tmp_path / "llava.tar.gz").touch()
    with pytest.raises(ServeError, match=r"llava\.mar and llava\.tar\.gz are both"):
        models_argument(tmp_path, "llava")


@pytest.mark.parametrize(
    "change",
    [{"env": {"TS_REQUEST_SEQUENCE_ID": "x-other"}}, {"properties": {"ts_header_key_sequence_end": "X-Other"}}],
)
def test_frontend_and_worker_must_read_the_same_session_headers(store: Path, change: dict) -> None:
    server = TorchServe(store, "stand-in", **change)
    with pytest.raises(ServeError, match="session headers disagree"):
        server.start()
    assert not server.home.exists()


def test_a_home_too_deep_for_sockets_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="too long for unix sockets"):
        TorchServe(store, "stand-in", home=tmp_path / ("deep" * 30)).start()


def test_java_too_old_or_absent_is_said(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ServeError, match=r"is Java 11\. TorchServe needs Java 17"):
        TorchServe(store, "stand-in").start()
    said = subprocess.run([REPO / "deploy" / "need_java.sh"], capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert "is version 11" in said.stderr
    assert "apt-get install openjdk-17-jre-headless" in said.stderr


def test_ports_are_distinct_and_given_ones_come_in_a_row() -> None:
    port = free_ports(1)[0]
    ports = choose_ports(port)
    assert [ports[use] for use in ("inference", "management", "metrics")] == [port, port + 1, port + 2]
    assert len(set(ports.values())) == 6


def test_the_log_configuration_is_there() -> None:
    assert LOG_CONFIG.is_file(), "a missing one would mean TorchServe's own, six lines a token"


# --- the command ------------------------------------------------------------------------------------------------------


class Command:
    """`python -m deploy.serve` with its output, and the processes that it started."""

    def __init__(self, store: Path, port: int) -> None:
        arguments = ["--model-store", str(store), "--name", "stand-in", "--port", str(port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.serve", *arguments],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started: list[int] = []

    def read_until(self, words: str) -> str:
        text = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text += line
            if words in line:
                self.started = [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
                return text
        raise AssertionError(f"ended without {words!r}:\n{text}")

    def finish(self) -> tuple[int, str]:
        text, _ = self.process.communicate(timeout=30)
        return self.process.returncode, text


@pytest.fixture
def command(store: Path) -> Iterator[Callable[[int], Command]]:
    made: list[Command] = []

    def start(port: int = 0) -> Command:
        made.append(Command(store, port))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def test_sigterm_to_the_command_stops_java_and_worker(command: Callable[[int], Command]) -> None:
    port = free_ports(1)[0]
    serving = command(port)
    text = serving.read_until("Ctrl-C here stops")
    assert re.search(rf"ready in \d+\.\d s on http://127\.0\.0\.1:{port}", text)
    assert text.count("curl -sN $URL") == 3
    assert "getCallerClass" not in text
    assert len(serving.started) >= 3, "java, its worker and the guard"

    code, text = command(port).finish()
    assert code == 1
    assert len(text.splitlines()) == 2, text
    assert f"port {port} (inference) is in use" in text

    serving.process.send_signal(signal.SIGTERM)
    code, text = serving.finish()
    assert code == 0
    assert "SIGTERM: stopping" in text
    assert re.search(r"stopped in \d+\.\d s", text)
    assert alive(serving.started) == []


def test_a_dead_worker_ends_the_command_and_a_killed_command_takes_its_server_along(
    command: Callable[[int], Command],
) -> None:
    orphaned, killed = command(0), command(0)
    orphaned.read_until("Ctrl-C here stops")
    home = Path(re.search(r"logs +(\S+)/logs", killed.read_until("Ctrl-C here stops"))[1])

    killed.process.kill()
    worker = next(pid for pid in orphaned.started if "model_service_worker" in " ".join(psutil.Process(pid).cmdline()))
    os.kill(worker, signal.SIGKILL)

    code, text = orphaned.finish()
    assert code == 1
    assert "the worker died" in text
    assert alive(orphaned.started) == []
    assert eventually(lambda: not alive(killed.started))
    assert eventually(lambda: not home.exists())
