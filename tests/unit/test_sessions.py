"""The session table: places are limited, ids are told apart when they are gone, and time ends a session exactly when
its Expires says.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from llava_sessions.errors import Refused
from llava_sessions.worker import sessions
from llava_sessions.worker.sessions import GRACE_S, SessionTable

NOW = 1_800_000_000.0
TTL = 60.0


@pytest.fixture
def table() -> SessionTable[str]:
    return SessionTable(max_sessions=2, ttl_s=TTL)


def open_session(table: SessionTable[str], session_id: str, now_s: float = NOW):
    table.reserve(session_id)
    return table.open(session_id, f"conversation of {session_id}", now_s)


def refusal(action: Callable[[], object]) -> Refused:
    with pytest.raises(Refused) as caught:
        action()
    return caught.value


def code_of(action: Callable[[], object]) -> str:
    return refusal(action).code


def test_an_open_session_is_found_with_its_conversation(table):
    session = open_session(table, "a")
    assert table.get("a", NOW) is session
    assert session.conversation == "conversation of a"
    assert "a" in table
    assert len(table) == 1


def test_a_reserved_id_is_known_but_not_open(table):
    table.reserve("a")
    assert "a" in table
    assert len(table) == 0
    assert code_of(lambda: table.get("a", NOW)) == "session_not_found"


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
    table.reserve("a")
    table.reserve("b")
    table.release("a")
    assert "a" not in table
    table.reserve("c")
    assert "c" in table


def test_releasing_what_was_never_reserved_frees_nothing(table):
    open_session(table, "a")
    table.release("a")
    table.release("nobody")
    assert table.get("a", NOW).id == "a"
    assert len(table) == 1


def test_a_removed_session_gives_its_place_back(table):
    open_session(table, "a")
    open_session(table, "b")
    table.remove("a", "closed")
    assert open_session(table, "c").id == "c"
    assert len(table) == 2


def test_a_session_cannot_open_without_a_reservation(table):
    with pytest.raises(KeyError):
        table.open("a", "words", NOW)
    assert "a" not in table


# --- time ---


def test_a_session_lives_up_to_its_expiry_and_not_at_it(table):
    session = open_session(table, "a")
    assert session.expires_at_s == NOW + TTL
    assert table.get("a", NOW + TTL - 0.001) is session
    assert table.expired(NOW + TTL - 0.001) == []
    assert code_of(lambda: table.get("a", NOW + TTL)) == "session_expired"
    assert table.expired(NOW + TTL + GRACE_S - 0.001) == []
    assert table.expired(NOW + TTL + GRACE_S) == [session]


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
    table.begin_turn(table.get("a", NOW + 30), "turn")
    session.turn_id = None
    assert code_of(lambda: table.get("a", NOW + TTL)) == "session_expired"


def test_an_expired_session_holds_its_place_until_it_is_removed(table):
    open_session(table, "a")
    open_session(table, "b")
    assert code_of(lambda: table.reserve("c")) == "capacity"
    for session in table.expired(NOW + TTL + GRACE_S):
        table.remove(session.id, "expired")
    table.reserve("c")
    assert len(table) == 0


def test_only_sessions_whose_time_is_up_are_told_as_expired(table):
    old = open_session(table, "old")
    open_session(table, "young", now_s=NOW + 1)
    assert table.expired(NOW + TTL + GRACE_S) == [old]


def test_a_closing_session_is_not_told_as_expired(table):
    open_session(table, "a").closing = True
    assert table.expired(NOW + 10 * TTL) == []


# --- turns ---


def test_a_session_takes_one_turn_at_a_time(table):
    session = open_session(table, "a")
    table.begin_turn(session, "first")
    refused = refusal(lambda: table.begin_turn(session, "second"))
    assert (refused.code, refused.status) == ("session_busy", 409)
    assert session.turn_id == "first"
    session.turn_id = None
    table.begin_turn(session, "second")
    assert session.turn_id == "second"


def test_running_turns_are_counted_over_sessions(table):
    first, second = open_session(table, "a"), open_session(table, "b")
    assert table.running_turns == 0
    table.begin_turn(first, "1")
    table.begin_turn(second, "2")
    assert table.running_turns == 2
    second.turn_id = None
    assert table.running_turns == 1


def test_a_busy_session_is_still_found(table):
    session = open_session(table, "a")
    table.begin_turn(session, "turn")
    assert table.get("a", NOW) is session


# --- gone ---


@pytest.mark.parametrize(
    ("reason", "code", "status"),
    [("closed", "session_not_found", 404), ("expired", "session_expired", 410), ("failed", "internal", 500)],
)
def test_a_gone_session_is_refused_by_how_it_went(table, reason, code, status):
    open_session(table, "a")
    table.remove("a", reason)
    refused = refusal(lambda: table.get("a", NOW))
    assert (refused.code, refused.status) == (code, status)
    assert table.was_closed("a") is (reason != "expired")


def test_an_id_that_never_was_is_not_found_and_was_not_closed(table):
    assert code_of(lambda: table.get("nobody", NOW)) == "session_not_found"
    assert not table.was_closed("nobody")
    assert "nobody" not in table


def test_a_closing_session_is_not_found_any_more(table):
    open_session(table, "a").closing = True
    assert code_of(lambda: table.get("a", NOW)) == "session_not_found"
    assert "a" in table


def test_an_id_that_opens_again_is_no_longer_gone(table):
    open_session(table, "a")
    table.remove("a", "closed")
    session = open_session(table, "a")
    assert table.get("a", NOW) is session
    assert not table.was_closed("a")


def test_reserving_a_gone_id_alone_does_not_forget_how_it_went(table):
    open_session(table, "a")
    table.remove("a", "closed")
    table.reserve("a")
    table.release("a")
    assert table.was_closed("a")


def test_removing_an_unknown_session_is_a_mistake_and_leaves_no_trace(table):
    with pytest.raises(KeyError):
        table.remove("nobody", "closed")
    assert not table.was_closed("nobody")


def test_the_memory_of_gone_ids_is_bounded_and_drops_the_oldest(table):
    for number in range(sessions._REMEMBERED + 5):
        open_session(table, f"s{number}")
        table.remove(f"s{number}", "closed")
    assert len(table._gone) == sessions._REMEMBERED
    assert not table.was_closed("s4")
    assert table.was_closed("s5")
    assert table.was_closed(f"s{sessions._REMEMBERED + 4}")


def test_tables_share_nothing():
    first, second = SessionTable(1, TTL), SessionTable(1, TTL)
    open_session(first, "a")
    assert "a" not in second
    assert open_session(second, "b").id == "b"
