"""sequences.py: the end header goes out only where no thread of the frontend waits; all else is ended by a request."""

from __future__ import annotations

import math

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


@pytest.fixture
def known(ender: Ender, monkeypatch: pytest.MonkeyPatch) -> Sequences:
    """Of a frontend whose steps follow each other at once."""
    monkeypatch.setattr(sequences, "QUIET_S", math.inf)
    return Sequences(ender)


def row_of(sequence: str, steps: int = 0) -> Entry:
    return Entry(Row("request", sequence, False, {}, {}), steps)


def closes(session: str) -> Reply:
    return Reply("{}", None, 200, JSON_TYPE, {CLOSED_SESSION_HEADER: session})


def test_a_row_that_is_answered_at_once_ends_its_sequence_itself(known: Sequences, ender: Ender) -> None:
    for final in (closes("a"), Reply("{}", status=404)):
        known.begin_step(["a"])
        known.release(row_of("a"), final, own=True, alone=True)
        known.end_step([])
        known.begin_step([])
        known.end_step([])
        assert final.headers == {CLOSED_SESSION_HEADER: "a"}
    assert ender.ended == []


@pytest.mark.parametrize(
    ("before", "steps", "alone"),
    [(["a"], 0, True), ([], 1, True), ([], 0, False)],
    ids=["after another row", "after being held", "beside another row"],
)
def test_else_the_client_is_told_in_the_spelling_that_the_frontend_does_not_heed(
    known: Sequences, ender: Ender, before: list[str], steps: int, alone: bool
) -> None:
    known.begin_step(before)
    known.end_step([])
    known.begin_step(["a"])
    final = closes("a")
    known.release(row_of("a", steps), final, own=True, alone=alone)
    known.end_step([])
    assert final.headers == {CLOSED_SESSION_HEADER.lower(): "a"}
    assert ender.ended == [], "its last row was of this very step"
    known.begin_step([])
    known.end_step([])
    assert ender.ended == ["a"]


def test_a_sequence_is_ended_once_no_row_uses_it(known: Sequences, ender: Ender) -> None:
    known.end("a")
    for waiting in (["a"], ["a"], []):
        known.begin_step(["a"])
        known.end_step(waiting)
    assert ender.ended == []
    known.begin_step(["b"])
    known.end_step(["b"])
    assert ender.ended == ["a"]


def test_a_session_that_is_closed_on_another_sequence_has_both_ended(known: Sequences, ender: Ender) -> None:
    known.begin_step(["made-for-it"])
    final = closes("a")
    known.release(row_of("made-for-it"), final, own=True, alone=True)
    known.end_step([])
    known.begin_step([])
    known.end_step([])
    assert final.headers == {CLOSED_SESSION_HEADER.lower(): "a"}
    assert ender.ended == ["a", "made-for-it"]


def test_a_refusal_of_an_open_sessions_row_ends_nothing(known: Sequences, ender: Ender) -> None:
    known.begin_step(["a"])
    final = Reply("{}", status=400)
    known.release(row_of("a"), final, own=False, alone=True)
    known.end_step([])
    known.begin_step([])
    known.end_step([])
    assert final.headers == {}
    assert ender.ended == []


def test_what_comes_after_a_pause_comes_after_the_step_before_it(
    known: Sequences, ender: Ender, monkeypatch: pytest.MonkeyPatch
) -> None:
    known.begin_step(["a", "b"])
    known.end("b")
    known.end_step([])
    known.sweep([])
    assert ender.ended == [], "a step may follow at once"
    monkeypatch.setattr(sequences, "QUIET_S", -1.0)
    known.sweep(["b"])
    assert ender.ended == []
    known.sweep([])
    assert ender.ended == ["b"]
    known.begin_step(["a"])
    final = closes("a")
    known.release(row_of("a"), final, own=True, alone=True)
    assert final.headers == {CLOSED_SESSION_HEADER: "a"}
