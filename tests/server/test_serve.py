"""One TorchServe, the real one: it starts, says why when it cannot, and leaves nothing behind.

The model is a stand-in that needs no weights and no torch, so a start takes two seconds; the product's handler has
tests of its own. Knows processes and `TorchServe`'s public face only. Where servers can run side by side they do, to
save the two seconds that each takes to start, and to stop.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.serve.configuration import LOG_CONFIG, hold_archive
from deploy.serve.ports import choose_ports
from deploy.serve.processes import ServeError
from deploy.serve.torchserve import TorchServe
from tests.support.commands import alive, free_row
from tests.support.stand_in import make_store

REPO = Path(__file__).resolve().parents[2]
SESSION = "X-Amzn-SageMaker-Session-Id"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"))


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


def stop(*servers: TorchServe) -> None:
    """Stop servers in order, side by side."""
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(TorchServe.stop, servers))


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
            assert json.loads(call(server, {}, "chat-7"))["session"] == "chat-7", "headers reach the worker"
        assert first.url != second.url

        console = (first.home / "logs" / "console.log").read_text()
        assert re.search(r"stand_in_ready pid=\d+", console), "the handler's events show on the console"
        before = log_bytes(first)
        assert call(first, {"steps": 300}).count("chunk") == 300
        assert log_bytes(first) == before, "a step writes no log line"

        metrics = get_metrics(first)
        assert 'ts_inference_requests_total{model_name="stand-in"' in metrics
        assert "# TYPE llava_open_sessions gauge" in metrics, "deploy/serve/metrics.yaml is the one in use"
        assert "job_queue_size=7" in (home / "config.properties").read_text()
        pids = [pid for server in (first, second) for pid in (server.pid, *server.worker_pids())]
        assert len(set(pids)) == 4
    finally:
        stop(first, second)
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
        reason, logs = str(raised.value).splitlines()[1:]
        assert reason == "startup_error problem=llava.dtype is 'bananas'"
        assert logs == f"logs: {refusing.log_path.parent}"
        with pytest.raises(ServeError, match="ZeroDivisionError: a bug at start"):
            crashing.wait_ready(120)
    finally:
        stop(refusing, crashing)
    assert time.monotonic() - began < 100, "nobody waited for the time to be up"
    for failed in (refusing, crashing):
        assert [path for path in failed.home.iterdir() if path.is_dir()] == [failed.log_path.parent]
        assert "Error" in failed.log_path.read_text()
        shutil.rmtree(failed.home)


# --- what stops a start before java -----------------------------------------------------------------------------------


def test_one_name_means_one_archive(store: Path, tmp_path: Path) -> None:
    assert hold_archive(store, "stand-in").path == store / "stand-in"
    with pytest.raises(ServeError, match="no archive 'llava'"):
        hold_archive(store, "llava")
    (tmp_path / "llava.mar").touch()
    (tmp_path / "llava.tar.gz").touch()
    with pytest.raises(ServeError, match=r"llava\.mar and llava\.tar\.gz are both"):
        hold_archive(tmp_path, "llava")


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
    said = subprocess.run([REPO / "scripts" / "need_java.sh"], capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert "is version 11" in said.stderr
    assert "apt-get install openjdk-17-jre-headless" in said.stderr


def test_ports_are_distinct_and_given_ones_come_in_a_row() -> None:
    port = free_row()
    ports = choose_ports(port)
    assert [ports[use] for use in ("inference", "management", "metrics")] == [port, port + 1, port + 2]
    assert len(set(ports.values())) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="ports are reserved on Linux only")
def test_launchers_that_race_for_a_port_are_told_so_in_one_line() -> None:
    """Nothing listens yet: the other one has only chosen the port."""
    port = free_row()
    code = f"from deploy.serve.ports import choose_ports; choose_ports({port}); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(ServeError) as raised:
            choose_ports(port)
        other.kill()
    assert str(raised.value) == f"port {port} (inference) is taken by another server that is starting; choose another"
    assert choose_ports(port)["inference"] == port, "the reservation has ended with the process"


def test_the_log_configuration_is_there() -> None:
    assert LOG_CONFIG.is_file(), "a missing one would mean TorchServe's own, six lines a token"
