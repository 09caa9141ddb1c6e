"""The session table: places are limited, ids are told apart when they are gone, and time ends a session exactly when
its Expires says.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from llava_sessions.config import RequestLimits
from llava_sessions.errors import Refused
from llava_sessions.protocol.parsing import parse
from llava_sessions.torchserve.batch import Row
from llava_sessions.worker import sessions
from llava_sessions.worker.pending import PendingRequest
from llava_sessions.worker.prefixes import HeldConversation
from llava_sessions.worker.sessions import GRACE_S, Session, SessionTable, Turn, expired_sessions
from llava_sessions.worker.states import TRANSITIONS, IllegalTransition, Residency, SessionState, State, TurnState

NOW = 1_800_000_000.0
TTL = 60.0


@pytest.fixture
def table() -> SessionTable:
    return SessionTable(max_sessions=2, ttl_s=TTL)


def open_session(table: SessionTable, session_id: str, now_s: float = NOW) -> Session:
    session = table.reserve(session_id)
    session.expires_at_s = table.expiry_of_open(now_s)
    session.used_at_s = now_s
    session.advance(SessionState.OPEN)
    return session


def begin_turn(session: Session, turn_id: str) -> Turn:
    body = {"type": "send_text_prompt", "session_id": session.id, "prompt_text": "What?"}
    session.turn = Turn(
        session, parse(body, {}, RequestLimits()), PendingRequest(Row(turn_id, session.id, False, {}, body))
    )
    return session.turn


def refusal(action: Callable[[], object]) -> Refused:
    with pytest.raises(Refused) as caught:
        action()
    return caught.value


def code_of(action: Callable[[], object]) -> str:
    return refusal(action).code


def test_an_open_session_is_found(table):
    session = open_session(table, "a")
    assert table.get("a", NOW) is session
    assert "a" in table
    assert len(table) == 1


def test_a_reserved_id_is_known_but_not_open(table):
    table.reserve("a")
    assert "a" in table
    assert len(table) == 0
    assert code_of(lambda: table.get("a", NOW)) == "session_not_found"


def test_an_implicit_session_makes_no_room_for_one_with_a_name(table):
    table.may_release_stored = True
    implicit = Session("chat-1", 60.0)
    implicit.conversation = HeldConversation(0)
    implicit.advance(SessionState.OPEN)
    table.add(implicit)
    for number in range(table.max_sessions):
        table.reserve(f"{number}")
    assert code_of(lambda: table.reserve("one more")) == "capacity"
    assert table.find("chat-1") is implicit


def test_an_id_is_reserved_once(table):
    table.reserve("a")
    assert code_of(lambda: table.reserve("a")) == "invalid_request"
    open_session(table, "b")
    assert code_of(lambda: table.reserve("b")) == "invalid_request"


def test_reserved_places_count_against_the_limit(table):
    table.reserve("a")
    table.reserve("b")
    assert code_of(lambda: table.reserve("c")) == "capacity"
    assert "c" not in table


def test_open_places_count_against_the_limit(table):
    open_session(table, "a")
    open_session(table, "b")
    refused = refusal(lambda: table.reserve("c"))
    assert (refused.code, refused.status) == ("capacity", 429)
    assert "All 2 sessions" in refused.message


def test_a_reservation_that_became_a_session_holds_one_place(table):
    open_session(table, "a")
    table.reserve("b")
    assert code_of(lambda: table.reserve("c")) == "capacity"


def test_a_released_place_can_be_taken_and_its_id_is_unknown(table):
    reserved = table.reserve("a")
    table.reserve("b")
    table.release(reserved)
    assert "a" not in table
    table.reserve("c")
    assert "c" in table


def test_a_place_is_released_once(table):
    open_session(table, "a")
    reserved = table.reserve("b")
    table.release(reserved)
    table.release(reserved)
    assert table.get("a", NOW).id == "a"
    assert len(table) == 1


def test_a_removed_session_gives_its_place_back(table):
    session = open_session(table, "a")
    open_session(table, "b")
    table.end(session, "closed")
    assert open_session(table, "c").id == "c"
    assert len(table) == 2


# --- time ---


def test_a_session_lives_up_to_its_expiry_and_not_at_it(table):
    session = open_session(table, "a")
    assert session.expires_at_s == NOW + TTL
    assert table.get("a", NOW + TTL - 0.001) is session
    assert expired_sessions(table, NOW + TTL - 0.001) == []
    assert code_of(lambda: table.get("a", NOW + TTL)) == "session_expired"
    assert expired_sessions(table, NOW + TTL + GRACE_S - 0.001) == []
    assert expired_sessions(table, NOW + TTL + GRACE_S) == [session]


def test_the_announced_expiry_is_the_one_that_is_kept(table):
    session = open_session(table, "a", now_s=NOW + 0.1)
    assert session.expires == "2027-01-15T08:01:01Z"
    assert session.expires_at_s == NOW + TTL + 1, "rounded up: nothing goes before the announced second"
    assert code_of(lambda: table.get("a", session.expires_at_s)) == "session_expired"


def test_the_expiry_is_spelled_as_sagemaker_wants_it(table):
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", open_session(table, "a").expires)
    assert open_session(table, "b", now_s=0.0).expires == "1970-01-01T00:01:00Z"


def test_use_does_not_prolong_a_session(table):
    session = open_session(table, "a")
    begin_turn(table.get("a", NOW + 30), "turn")
    session.turn = None
    assert code_of(lambda: table.get("a", NOW + TTL)) == "session_expired"


def test_an_expired_session_holds_its_place_until_it_is_removed(table):
    open_session(table, "a")
    open_session(table, "b")
    assert code_of(lambda: table.reserve("c")) == "capacity"
    for session in expired_sessions(table, NOW + TTL + GRACE_S):
        table.end(session, "expired")
    table.reserve("c")
    assert len(table) == 0


def test_only_sessions_whose_time_is_up_are_told_as_expired(table):
    old = open_session(table, "old")
    open_session(table, "young", now_s=NOW + 1)
    assert expired_sessions(table, NOW + TTL + GRACE_S) == [old]


def test_a_closing_session_is_not_told_as_expired(table):
    open_session(table, "a").advance(SessionState.CLOSING)
    assert expired_sessions(table, NOW + 10 * TTL) == []


# --- turns ---


def test_a_busy_session_is_still_found_and_does_not_expire(table):
    session = open_session(table, "a")
    begin_turn(session, "turn")
    assert table.get("a", NOW) is session
    assert expired_sessions(table, NOW + 10 * TTL) == []


# --- states ---


# The states before each state, from the first one on.
PATHS: dict[State, list[State]] = {
    SessionState.OPENING: [],
    SessionState.OPEN: [SessionState.OPEN],
    SessionState.CLOSING: [SessionState.OPEN, SessionState.CLOSING],
    Residency.COLD: [],
    Residency.LOADING: [Residency.LOADING],
    Residency.LOADED: [Residency.LOADING, Residency.LOADED],
    TurnState.PREPARING: [],
    TurnState.RUNNING: [TurnState.RUNNING],
    TurnState.STOPPING: [TurnState.RUNNING, TurnState.STOPPING],
    TurnState.STORING: [TurnState.RUNNING, TurnState.STORING],
    TurnState.DONE: [TurnState.DONE],
}


def item_in(state: State) -> Session | Turn:
    """A new session or turn that was advanced to the state."""
    session = SessionTable(1, TTL).reserve("s")
    item = begin_turn(session, "t") if isinstance(state, TurnState) else session
    for step in PATHS[state]:
        item.advance(step)
    return item


@pytest.mark.parametrize("old", PATHS, ids=str)
def test_advance_takes_every_transition_of_the_table_and_no_other(old):
    for new in type(old):
        item = item_in(old)
        if new in TRANSITIONS[old]:
            item.advance(new)
            assert item.is_in(new)
        else:
            with pytest.raises(IllegalTransition):
                item.advance(new)
            assert item.is_in(old)


def test_the_table_lists_every_state():
    assert set(TRANSITIONS) == {*SessionState, *Residency, *TurnState}


def test_a_session_is_unloaded_from_any_residency(table):
    session = open_session(table, "a")
    session.unload()
    for states in ([Residency.LOADING], [Residency.LOADING, Residency.LOADED]):
        for state in states:
            session.advance(state)
        session.unload()
        assert session.is_in(Residency.COLD)


# --- gone ---


@pytest.mark.parametrize(
    ("reason", "code", "status"),
    [("closed", "session_not_found", 404), ("expired", "session_expired", 410), ("moved", "session_not_found", 404)],
)
def test_a_gone_session_is_refused_by_how_it_went(table, reason, code, status):
    table.end(open_session(table, "a"), reason)
    refused = refusal(lambda: table.get("a", NOW))
    assert (refused.code, refused.status) == (code, status)
    assert table.was_closed("a") is (reason == "closed")


def test_an_id_that_never_was_is_not_found_and_was_not_closed(table):
    assert code_of(lambda: table.get("nobody", NOW)) == "session_not_found"
    assert not table.was_closed("nobody")
    assert "nobody" not in table


def test_a_closing_session_is_not_found_any_more(table):
    open_session(table, "a").advance(SessionState.CLOSING)
    assert code_of(lambda: table.get("a", NOW)) == "session_not_found"
    assert "a" in table


def test_an_id_that_opens_again_is_no_longer_gone(table):
    table.end(open_session(table, "a"), "closed")
    session = open_session(table, "a")
    assert table.get("a", NOW) is session


def test_reserving_a_gone_id_alone_does_not_forget_how_it_went(table):
    table.end(open_session(table, "a"), "closed")
    table.release(table.reserve("a"))
    assert table.was_closed("a")


def test_sessions_that_end_are_listed_once_for_their_sequences(table):
    session = open_session(table, "a")
    table.release(table.reserve("b"))
    assert table.take_ended() == []
    table.end(session, "expired")
    assert table.take_ended() == ["a"]
    assert table.take_ended() == []


def test_the_memory_of_gone_ids_is_bounded_and_drops_the_oldest(table):
    for number in range(sessions._REMEMBERED + 5):
        table.end(open_session(table, f"s{number}"), "closed")
    assert not table.was_closed("s4")
    assert table.was_closed("s5")
    assert table.was_closed(f"s{sessions._REMEMBERED + 4}")


def test_tables_share_nothing():
    first, second = SessionTable(1, TTL), SessionTable(1, TTL)
    open_session(first, "a")
    assert "a" not in second
    assert open_session(second, "b").id == "b"


def test_the_count_leaves_out_sessions_that_are_opening(table):
    opening = table.reserve("a")
    assert len(table) == 0
    table.release(opening)
    table.recover("a", NOW + TTL, NOW, None)
    assert len(table) == 1
    second = table.reserve("b")
    assert len(table) == 1
    second.advance(SessionState.OPEN)
    second.advance(SessionState.CLOSING)
    assert len(table) == 2
    table.end(second, "closed")
    assert len(table) == 1


def test_the_count_of_many_open_sessions_asks_none_of_them(monkeypatch):
    """Each step counts the sessions, for the metrics."""
    table = SessionTable(100, TTL)
    for number in range(100):
        open_session(table, f"s{number}")
    assert len(table) == 100
    asked: list[Session] = []
    is_in = Session.is_in
    monkeypatch.setattr(Session, "is_in", lambda one, *states: asked.append(one) or is_in(one, *states))
    assert len(table) == 100
    assert asked == []
