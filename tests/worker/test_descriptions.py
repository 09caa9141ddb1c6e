"""A description says where a session is, and changes nothing."""

from __future__ import annotations

import json

import pytest

from llava_sessions.ipc.messages import DescribeSession
from tests.support.pump_frontend import NOW, Frontend, code, model, tokens

__all__ = ["model", "tokens"]  # fixtures
TOKEN = "a-token-of-mine-1234"


@pytest.fixture
def front(model, tokens):
    return Frontend(model, tokens)


def test_a_description_reports_tier_memory_and_expiry(front):
    session = front.open()
    before = front.body_of(front.describe_row(session))
    front.ask(session)
    after = front.body_of(front.describe_row(session))
    assert (before["session_id"], before["residency"], before["is_answering"]) == (session, "resident", False)
    assert before["memory"]["kv_bytes"] > 0
    assert before["memory"]["features_bytes"] > 0
    assert before["memory"]["offloaded_bytes"] == 0
    assert after["cached_tokens"] > before["cached_tokens"] > 0
    assert after["expires"] == before["expires"]


def test_a_description_does_not_wait_for_the_running_turn(front):
    session = front.open()
    held = front.start(session)
    told = json.loads(front.settle_with(front.describe_row(session), held).body)
    assert told["is_answering"]
    front.settle(held)
    assert not front.body_of(front.describe_row(session))["is_answering"]


def test_a_session_that_the_engine_lost_is_cold(front):
    session = front.open()
    waiting = front.describe_row(session)
    assert front.exchange(waiting) == [None]
    front.lose_engine()
    told = json.loads(front.answer(waiting).body)
    assert (told["residency"], sum(told["memory"].values()), told["cached_tokens"]) == ("cold", 0, 0)


def test_a_description_of_a_session_that_is_not_the_callers_receives_404(front):
    session = front.open(session_token=TOKEN)
    for row in (front.describe_row(session), front.describe_row("unknown")):
        reply = front.answer(row)
        assert (reply.status, code(reply)) == (404, "session_not_found")
    assert front.body_of(front.describe_row(session, session_token=TOKEN))["residency"] == "resident"


def test_a_client_that_leaves_before_the_engine_answers_receives_nothing(front):
    session = front.open()
    row = front.describe_row(session)
    assert front.exchange(row) == [None]
    assert isinstance(front.commands[-1], DescribeSession)
    front.exchange()
    front.step()
    front.exchange()
    assert not front.pump.busy
    assert front.body_of(front.describe_row(session))["residency"] == "resident"


def test_a_description_names_the_idle_limit_and_does_not_renew_it(model, tokens):
    front = Frontend(model, tokens, idle_s=20)
    session = front.open()
    opened = front.body_of(front.describe_row(session))["expires"]
    front.now_s = NOW + 15
    assert front.body_of(front.describe_row(session))["expires"] == opened
    front.ask(session)
    assert front.body_of(front.describe_row(session))["expires"] > opened
    front.now_s = NOW + 35
    assert code(front.answer(front.describe_row(session))) == "session_expired"
