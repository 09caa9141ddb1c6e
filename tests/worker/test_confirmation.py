"""An open with `confirm_s`: its session expires soon if no request names it, as when its reply was lost."""

from __future__ import annotations

import json

import pytest

from llava_sessions.engine.memory import Memory
from llava_sessions.worker.sessions import GRACE_S
from tests.support.pump_frontend import NOW, TTL, Frontend, code, model, png, tokens

__all__ = ["model", "tokens"]

CONFIRM_S = 20
OPEN = {"type": "start_session", "image": png(), "confirm_s": CONFIRM_S, "request_id": "r" * 16}


@pytest.fixture
def front(model, tokens) -> Frontend:
    return Frontend(model, tokens)


def opened(front: Frontend, **fields) -> str:
    return front.body_of(front.row({**OPEN, **fields}))["session_id"]


def test_an_unconfirmed_session_expires_and_leaves_nothing(front):
    session = opened(front)
    front.now_s = NOW + CONFIRM_S + GRACE_S
    front.pump.sweep()
    front.step()
    assert front.engine.memory() == Memory()
    assert front.pump.metric_values().open_sessions == 0
    reply = front.answer(front.ask_row(session))
    assert (reply.status, code(reply)) == (410, "session_expired")


@pytest.mark.parametrize("kind", ["ask", "cancel"])
def test_a_request_confirms_the_session_until_its_expiry(front, kind):
    session = opened(front)
    front.now_s = NOW + CONFIRM_S - 0.01
    row = front.ask_row(session) if kind == "ask" else front.cancel_row(session)
    assert front.answer(row).status == 200
    front.now_s = NOW + TTL - 0.01
    assert front.ask(session)["session_id"] == session


def test_a_request_without_the_token_confirms_nothing(front):
    session = opened(front, session_token="t" * 16)
    assert code(front.answer(front.cancel_row(session))) == "session_not_found"
    front.now_s = NOW + CONFIRM_S
    reply = front.answer(front.row({"type": "cancel", "session_token": "t" * 16}, session))
    assert code(reply) == "session_expired"


def test_a_repeated_open_waits_anew(front):
    session = opened(front)
    front.now_s = NOW + CONFIRM_S - 0.01
    assert opened(front) == session
    front.now_s = NOW + 2 * CONFIRM_S - 0.1
    assert front.ask(session)["session_id"] == session


def test_a_repeated_open_does_not_bring_back_what_has_expired(front):
    session = opened(front)
    front.now_s = NOW + CONFIRM_S
    assert opened(front) != session


def test_a_repeated_open_leaves_a_confirmed_session_confirmed(front):
    session = opened(front)
    front.ask(session)
    assert opened(front) == session
    front.now_s = NOW + TTL - 0.01
    assert front.ask(session)["session_id"] == session


@pytest.mark.parametrize("value", [0, 601, True, 5.5, "5"])
def test_the_time_is_an_integer_from_1_to_600(front, value):
    reply = front.answer(front.row({**OPEN, "confirm_s": value}))
    assert reply.status == 400
    assert "`confirm_s` must be an integer from 1 to 600, got" in json.loads(reply.body)["error"]["message"]
