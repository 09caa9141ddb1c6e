"""Test the service of `make serve` with the real handler: HAProxy, TorchServe, worker and engine."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import httpx

from deploy.serve.configuration import PUBLIC_METRICS_VARIABLE
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.chats import LONG
from tests.support.commands import Command, eventually, free_row
from tests.support.wire import ChatSession

SCENE = make_scene(HELD_OUT_SEEDS[0])
QUESTION = "How many shapes are there?"


def listens(port: int) -> bool:
    """Return whether something listens on this port of loopback."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


def opening(http: httpx.Client) -> int | None:
    """Return the status of an open that must be refused, or None without a reply."""
    try:
        return http.post("/invocations", json={"type": "start_session", "image": "x"}).status_code
    except httpx.TransportError:
        return None


def test_the_service_is_ready_when_its_model_is_and_ends_when_its_answers_have(model_store: Path) -> None:
    """Follow `make serve` with the real handler from its first moment to its last."""
    port = free_row()
    url = f"http://127.0.0.1:{port}"
    command = Command(model_store, "llava", port, {PUBLIC_METRICS_VARIABLE: "on"})
    try:
        assert eventually(lambda: listens(port))
        while (status := httpx.get(f"{url}/ping", trust_env=False).status_code) == 503:
            refused = httpx.post(f"{url}/invocations", json={}, trust_env=False)
            assert refused.status_code != 200
            if refused.status_code == 503:
                assert refused.json()["error"]["code"] == "engine_restarting"
            page = httpx.get(f"{url}/metrics", trust_env=False)
            assert page.status_code == 200 or page.json()["error"]["code"] == "engine_restarting"
        assert status == 200
        command.wait_ready()
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            chat = ChatSession.open(http, SCENE.draw())  # the first request after the first 200
            assert "llava_opens_total " in http.get("/metrics").text
            assert chat.ask(QUESTION)["finish_reason"] == "stop"
            lines: list[dict] = []
            begun = threading.Event()

            def listen() -> None:
                for line in chat.stream("Say something long", **LONG):
                    lines.append(line)
                    begun.set()

            listening = threading.Thread(target=listen)
            listening.start()
            assert begun.wait(30)
            command.process.terminate()
            command.read_until("SIGTERM: stopping")
            assert eventually(lambda: opening(http) in (503, None)), "the worker has heard of it, or gone by now"
            listening.join(40)
        assert lines[-1]["finish_reason"] in ("length", "stop"), "a running answer is not cut"
        assert command.finish()[0] == 0
    finally:
        command.end()
