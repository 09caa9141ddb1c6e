"""sequences.py: the end header goes out only where no thread of the frontend waits; all else is ended by a request."""

from __future__ import annotations

import pytest

from llava_sessions import sequences
from llava_sessions.protocol import CLOSED_SESSION_HEADER, JSON_TYPE
from llava_sessions.rows import Entry, Reply, Row
from llava_sessions.sequences import Sequences


class Ender:
    """Notes what would be ended by requests."""

    mark = ("x-mark", "ours")

    def __init__(self) -> None:
        self.ended: list[str] = []

    def end(self, sequence_id: str) -> None:
        self.ended.append(sequence_id)


@pytest.fixture
def ender() -> Ender:
    return Ender()


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(sequences, "time", found)
    monkeypatch.setattr(sequences, "QUIET_S", 0.25)
    monkeypatch.setattr(sequences, "LINGER_S", 1.5)
    return found


@pytest.fixture
def known(ender: Ender, clock: Clock) -> Sequences:
    return Sequences(ender)


def row_of(sequence: str, steps: int = 0) -> Entry:
    return Entry(Row("request", sequence, False, {}, {}), steps)


def closes(session: str) -> Reply:
    return Reply("{}", None, 200, JSON_TYPE, {CLOSED_SESSION_HEADER: session})


def step(known: Sequences, *rows: str) -> None:
    known.begin_step(rows)
    known.end_step()


def test_a_row_that_is_answered_at_once_ends_its_sequence_itself(known: Sequences, ender: Ender, clock: Clock) -> None:
    for final in (closes("a"), Reply("{}", status=404)):
        known.begin_step(["a"])
        known.release(row_of("a"), final, own=True, alone=True)
        known.end_step()
        assert final.headers == {CLOSED_SESSION_HEADER: "a"}
        clock.now_s += 1
        step(known)
    assert ender.ended == []


@pytest.mark.parametrize(
    ("before", "steps", "alone"),
    [(["a"], 0, True), ([], 1, True), ([], 0, False)],
    ids=["just after another row", "after being held", "beside another row"],
)
def test_else_the_client_is_told_in_the_spelling_that_the_frontend_does_not_heed(
    known: Sequences, ender: Ender, clock: Clock, before: list[str], steps: int, alone: bool
) -> None:
    step(known, *before)
    clock.now_s += 0.24
    known.begin_step(["a"])
    final = closes("a")
    known.release(row_of("a", steps), final, own=True, alone=alone)
    known.end_step()
    assert final.headers == {CLOSED_SESSION_HEADER.lower(): "a"}
    clock.now_s += 1.49
    step(known, "b")
    known.sweep([])
    assert ender.ended == []
    clock.now_s += 0.02
    step(known, "b")
    assert ender.ended == ["a"]


def test_what_comes_after_a_pause_ends_its_sequence_itself(known: Sequences, ender: Ender, clock: Clock) -> None:
    step(known, "a")
    clock.now_s += 0.25
    known.begin_step(["a"])
    final = closes("a")
    known.release(row_of("a"), final, own=True, alone=True)
    known.end_step()
    assert final.headers == {CLOSED_SESSION_HEADER: "a"}


def test_a_sequence_is_ended_once_no_row_uses_it(known: Sequences, ender: Ender, clock: Clock) -> None:
    known.end("a")
    for _ in range(3):
        step(known, "a")
        clock.now_s += 2
        known.sweep(["a"])
    assert ender.ended == []
    known.sweep([])
    assert ender.ended == ["a"]


def test_a_session_that_is_closed_on_another_sequence_has_both_ended(
    known: Sequences, ender: Ender, clock: Clock
) -> None:
    known.begin_step(["made-for-it"])
    final = closes("a")
    known.release(row_of("made-for-it"), final, own=True, alone=True)
    known.end_step()
    assert final.headers == {CLOSED_SESSION_HEADER.lower(): "a"}
    clock.now_s += 2
    known.sweep([])
    assert sorted(ender.ended) == ["a", "made-for-it"]


def test_a_client_that_asks_again_on_a_dead_id_never_meets_a_request_of_ours(
    known: Sequences, ender: Ender, clock: Clock
) -> None:
    for _ in range(20):
        for pause_s in (0.1, 0.3):  # the first is too soon for the header, the second is not
            clock.now_s += pause_s
            known.begin_step(["a"])
            final = Reply("{}", status=404)
            known.release(row_of("a"), final, own=True, alone=True)
            known.end_step()
    assert ender.ended == []
    assert final.headers == {CLOSED_SESSION_HEADER: "a"}
    clock.now_s += 10
    known.sweep([])
    assert ender.ended == []  # its own last answer has ended it


def test_a_refusal_of_an_open_sessions_row_ends_nothing(known: Sequences, ender: Ender, clock: Clock) -> None:
    known.begin_step(["a"])
    final = Reply("{}", status=400)
    known.release(row_of("a"), final, own=False, alone=True)
    known.end_step()
    clock.now_s += 1
    known.sweep([])
    assert final.headers == {}
    assert ender.ended == []
