"""Shows that a client who leaves in the middle of an answer holds nothing: its turn ends, and its session can go on."""

from __future__ import annotations

import socket
import time

import httpx
import pytest

from deploy.serve.torchserve import TorchServe
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.chats import LONG
from tests.support.server_metrics import wait_for_metrics
from tests.support.wire import ApiError, ChatSession

pytestmark = pytest.mark.usefixtures("same_worker")
SCENE = make_scene(HELD_OUT_SEEDS[0])


def leave_in_mid_stream(server: TorchServe, chat: ChatSession) -> None:
    """Read the beginning of a long answer, then be gone."""
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as own:
        lines = ChatSession(own, chat.session_id, chat.expires).stream("Say something long", **LONG)
        for _ in range(3):
            next(lines)


def ask_when_free(chat: ChatSession, text: str, timeout_s: float = 20) -> dict:
    """The answer, as soon as the session is not busy any more."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            return chat.ask(text)
        except ApiError as error:
            if error.code != "session_busy" or time.monotonic() > until:
                raise
            time.sleep(0.02)


def test_the_turn_of_a_client_that_left_is_cancelled(server: TorchServe, http: httpx.Client) -> None:
    left, calm = ChatSession.open(http, SCENE.draw()), ChatSession.open(http, SCENE.draw())
    leave_in_mid_stream(server, left)
    # The answer would be 1,000 tokens; a new question is taken long before, and does not know of it.
    after, expected = ask_when_free(left, "Which shapes are there?"), calm.ask("Which shapes are there?")
    assert after["response_text"] == expected["response_text"]
    assert after["usage"] == expected["usage"]
    left.close()
    calm.close()


def test_it_is_noticed_when_nobody_else_says_anything(server: TorchServe, http: httpx.Client) -> None:
    chat = ChatSession.open(http, SCENE.draw())
    leave_in_mid_stream(server, chat)
    figures = wait_for_metrics(server.metrics_url, timeout_s=20, llava_running_turns=0, llava_open_sessions=1)
    assert (figures["llava_running_turns"], figures["llava_open_sessions"]) == (0, 1)
    chat.close()


def test_a_half_sent_request_disturbs_nobody(server: TorchServe, http: httpx.Client) -> None:
    chat = ChatSession.open(http, SCENE.draw())
    host, port = server.url.removeprefix("http://").split(":")
    head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b'{"type": "start_')
        assert chat.ask("How many shapes are there?")["finish_reason"] == "stop"
    assert chat.ask("How many shapes are there?")["finish_reason"] == "stop"
    chat.close()
