"""The launcher against the real HAProxy and TorchServe: it restarts what dies, gives up with a reason, ends in order,
and leaves nothing behind.

The model is a stand-in. No figure of time decides: what is waited for comes, or the test fails late.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from deploy.serve.processes import ServeError
from deploy.serve.service import Service
from tests.support.commands import REPO, Command, alive, eventually, free_row
from tests.support.stand_in import NAME, make_store

SESSION = "X-Amzn-SageMaker-Session-Id"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def command(store: Path) -> Iterator[Callable[..., Command]]:
    made: list[Command] = []

    def start(*args, **options) -> Command:
        made.append(Command(store, NAME, *args, **options))
        return made[-1]

    yield start
    for one in made:
        one.end()


def hanging_so_far(serving: Command) -> int:
    """How many requests reached the model and will get no answer."""
    return (serving.home / "logs" / "model_log.log").read_text().count("hanging")


def ping(url: str) -> int:
    return httpx.get(f"{url}/ping", timeout=10, trust_env=False).status_code


def ping_or_none(url: str) -> int | None:
    with contextlib.suppress(httpx.TransportError):
        return ping(url)
    return None


def ask(url: str, body: dict | None = None) -> httpx.Response:
    return httpx.post(f"{url}/invocations", json=body or {}, timeout=60, trust_env=False)


def test_sigterm_to_the_command_stops_all_of_it(command: Callable[..., Command]) -> None:
    port = free_row()
    serving = command(port)
    serving.wait_ready()
    assert re.search(rf"ready in \d+\.\d s on http://127\.0\.0\.1:{port}", serving.text)
    assert serving.text.count("curl -sN $URL") == 3
    assert f"base_url http://127.0.0.1:{port}/v1," in serving.text
    assert "getCallerClass" not in serving.text
    started = serving.children()
    assert len(started) >= 4, "HAProxy, java, its worker and the guard"
    assert ping(serving.url) == 200

    code, text = command(port).finish()
    assert code == 1
    assert len(text.splitlines()) == 2, text
    assert f"port {port} (front) is in use" in text

    serving.process.send_signal(signal.SIGTERM)
    code, text = serving.finish()
    assert code == 0, text
    assert "SIGTERM: stopping" in text
    assert re.search(r"stopped in \d+\.\d s", text)
    assert alive(started) == []
    assert not serving.home.exists()


def test_whatever_dies_is_back_and_a_killed_launcher_takes_everything_along(command: Callable[..., Command]) -> None:
    serving = command()
    serving.wait_ready()
    url = serving.url
    for death, victim in enumerate(["model_service_worker", "org.pytorch.serve.ModelServer"], 1):
        # A connection that has been used before: HAProxy would close it without a word.
        with ThreadPoolExecutor() as pool, httpx.Client(timeout=60, trust_env=False) as used:
            assert used.get(f"{url}/ping").status_code == used.post(f"{url}/invocations", json={}).status_code == 200
            hanging = pool.submit(used.post, f"{url}/invocations", json={"hang": True})
            assert eventually(lambda death=death: hanging_so_far(serving) == death)
            os.kill(serving.find(victim), signal.SIGKILL)
            assert eventually(lambda: ping(url) == 503)
            # Megabytes that nobody wants: HAProxy answers all the same while they still come.
            refused = [ask(url, {"image": "x" * size}) for size in (1, *[3_000_000] * 10)]
            cut = hanging.result(30)
        for reply in (*refused, cut):
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_restarting")
            assert reply.headers["Retry-After"]
        serving.read_until("ready again")
        assert eventually(lambda: ping(url) == 200)
        assert ask(url).status_code == 200

    os.kill(serving.find("front.cfg"), signal.SIGKILL)
    serving.read_until("HAProxy died")

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return ask(url).status_code == 200
        return False

    assert eventually(answers)

    started = serving.children()
    serving.process.kill()
    assert eventually(lambda: not alive(started))
    assert eventually(lambda: not serving.home.exists())


def test_a_model_that_cannot_load_ends_the_command_with_its_reason(command: Callable[..., Command]) -> None:
    refused = command(env={"STAND_IN": "refuse"})
    code, text = refused.finish()
    assert code == 1
    assert "error: the model 'stand-in' failed to load" in text
    assert "startup_error problem=llava.dtype is 'bananas'" in text
    logs = Path(re.search(r"^logs: (.*)$", text, re.MULTILINE)[1])
    assert "bananas" in (logs / "model_log.log").read_text(), "what the command printed can be read again"
    shutil.rmtree(logs.parent)
    assert "restarting" not in text, "nothing has changed since: a second start would tell the same"


def test_it_gives_up_when_the_server_does_not_come_back(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    broken = tmp_path / "broken"
    service = Service(store, NAME, haproxy=None, delays_s=(0, 0), env={"STAND_IN": str(broken)})
    codes: list[int] = []
    running = threading.Thread(target=lambda: codes.append(service.run()))
    running.start()
    try:
        assert eventually(lambda: service.ready, 60)
        assert ask(service.url).status_code == 200, "TorchServe itself, since there is no HAProxy"
        broken.touch()
        os.kill(service.server.worker_pids()[0], signal.SIGKILL)
        running.join(120)
        assert codes == [1]
        said = capfd.readouterr().err
        assert said.count("restarting TorchServe") == 2
        *_, reason, logs = said.rstrip().splitlines()
        assert reason == "startup_error problem=llava.dtype is 'bananas'"
        shutil.rmtree(Path(logs.removeprefix("logs: ")).parent)
    finally:
        service.stop("test")
        running.join(60)


def test_sigterm_lets_running_answers_finish_and_takes_no_new_ones(command: Callable[..., Command]) -> None:
    serving = command()
    serving.wait_ready()
    with httpx.stream("POST", f"{serving.url}/invocations", json={"steps": 600}, timeout=60, trust_env=False) as reply:
        lines = reply.iter_lines()
        assert next(lines) == "chunk"
        serving.process.send_signal(signal.SIGTERM)
        serving.read_until("SIGTERM: stopping")
        assert eventually(lambda: ping(serving.url) == 404), "a balancer sends no new sessions"
        assert eventually(lambda: ask(serving.url).status_code != 200), "the worker hears of it after the balancer"
        refused = ask(serving.url)
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "I stop soon.")
        assert 1 + sum(line == "chunk" for line in lines) == 600
    code, text = serving.finish()
    assert code == 0, text


def test_a_second_signal_ends_at_once(command: Callable[..., Command]) -> None:
    serving = command()
    serving.wait_ready()
    started = serving.children()
    with ThreadPoolExecutor() as pool:
        hanging = pool.submit(ask, serving.url, {"hang": True})
        assert eventually(lambda: hanging_so_far(serving) == 1)
        for _ in range(2):
            serving.process.send_signal(signal.SIGINT)
            assert eventually(lambda: ping_or_none(serving.url) in (404, None))
        with pytest.raises(httpx.TransportError):
            hanging.result(30)
    assert serving.finish()[0] == 0
    assert alive(started) == []


def test_the_front_keeps_headers_between_torchserve_and_the_handler_to_them(command: Callable[..., Command]) -> None:
    serving = command()
    serving.wait_ready()
    with httpx.Client(base_url=serving.url, timeout=60, trust_env=False) as client:
        forged = {"X-Amzn-SageMaker-Closed-Session-Id": "s1", "ts_request_sequence_start": "true", SESSION: "s1"}
        got = client.post("/invocations", json={}, headers=forged).json()
        assert got["session"] == "s1"
        assert not {name.lower() for name in got["headers"]} & {name.lower() for name in forged if name != SESSION}

        # OpenAI's paths reach the model that is served, and only they choose the worker's protocol.
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", f"/v1/models/{NAME}")):
            for prefix in ("", f"/predictions/{NAME}/1.0"):
                headers = {SESSION: "s1", "Authorization": "Bearer any", "url_path": "v1/models"}
                got = client.request(method, f"{prefix}{path}?x=1", headers=headers).json()
                assert (got["session"], got["headers"]["url_path"]) == ("s1", path.removeprefix("/")), prefix
        got = client.post("/invocations", json={}, headers={"url_path": "v1/chat/completions"}).json()
        assert not got["headers"].get("url_path")

        opened = client.post("/invocations", json={"open": "abc"})
        assert opened.headers[SESSION] == "abc; Expires=2030-01-01T00:00:00Z"
        assert opened.headers["X-Amzn-SageMaker-New-Session-Id"] == opened.headers[SESSION]
        assert "X-Amzn-SageMaker-New-Session-Id" not in client.post("/invocations", json={}).headers

        with client.stream("POST", "/invocations", json={"steps": 5, "gate": True}) as reply:
            assert "ts_stream_next" not in reply.headers
            lines = reply.iter_lines()
            first = [next(lines) for _ in range(4)]
            client.post("/invocations", json={"release": True})  # the fifth is made only now: nothing was held back
            assert [*first, *lines] == ["chunk"] * 5

        # What TorchServe says by itself is told in our words: a handler that raised, no place for one more session.
        raised = client.post("/invocations", json=[])
        assert (raised.status_code, raised.json()["error"]["code"]) == (500, "internal")
        while (reply := client.post("/invocations", json={}, headers={SESSION: f"n{time.monotonic_ns()}"})).is_success:
            pass  # every id takes a place and keeps it
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "capacity")


def test_an_old_haproxy_is_said(tmp_path: Path) -> None:
    haproxy = tmp_path / "haproxy"
    haproxy.write_text("#!/bin/sh\necho 'HAProxy version 2.4.22 2023/01/01'\n")
    haproxy.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = [REPO / "scripts" / "need_haproxy.sh"]
    said = subprocess.run(script, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    assert said.returncode == 1
    assert "this one is version 2.4" in said.stderr
    assert "apt-get install haproxy" in said.stderr


def test_without_haproxy_only_loopback_is_served(store: Path) -> None:
    with pytest.raises(ServeError, match=r"serving on 0\.0\.0\.0 needs HAProxy"):
        Service(store, NAME, haproxy=None, host="0.0.0.0")
