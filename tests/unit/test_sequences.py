"""sequences.py: sequences are ended by requests of our own, once their clients are silent; where very many are, the end
header goes out at once, and only where no thread of the frontend waits."""

from __future__ import annotations

import pytest

from llava_sessions.protocol.constants import CLOSED_SESSION_HEADER, JSON_TYPE
from llava_sessions.torchserve import sequences
from llava_sessions.torchserve.batch import Reply, Row
from llava_sessions.torchserve.sequences import SequenceReaper


class Ender:
    """Notes what would be ended by requests."""

    mark = ("x-mark", "ours")
    able = True
    pending = 0

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
def known(ender: Ender, clock: Clock) -> SequenceReaper:
    return SequenceReaper(ender, linger=2)


@pytest.fixture
def crowded(ender: Ender, clock: Clock) -> SequenceReaper:
    """One where as many wait for their end as may."""
    return SequenceReaper(ender, linger=0)


def row_of(sequence: str, steps: int = 0, ours: bool = False, fresh: bool = False) -> tuple[Row, int]:
    return Row("request", sequence, fresh, dict([Ender.mark]) if ours else {}, {}), steps


def closes(session: str) -> Reply:
    return Reply("{}", None, 200, JSON_TYPE, {CLOSED_SESSION_HEADER: session})


def step(known: SequenceReaper, *rows: str) -> None:
    known.begin_step(rows)
    known.end_step()


@pytest.mark.parametrize("whose", ["ours", "fresh"])
def test_the_answer_that_nobody_asks_again_after_ends_its_sequence(
    whose: str, known: SequenceReaper, ender: Ender
) -> None:
    known.begin_step(["a"])
    final = closes("a")
    known.release(*row_of("a", **{whose: True}), final, own=True, alone=True)
    known.end_step()
    assert final.headers == {CLOSED_SESSION_HEADER: "a"}
    assert ender.ended == []


@pytest.mark.parametrize("why", ["too many wait", "too many are being ended", "the frontend takes no requests of ours"])
def test_else_it_is_the_clients_own_answer_that_does_where_it_must(
    why: str, known: SequenceReaper, crowded: SequenceReaper, ender: Ender, clock: Clock
) -> None:
    if why == "too many wait":
        known = crowded
    elif why == "too many are being ended":
        ender.pending = 2
    else:
        ender.able = False
    for final in (closes("a"), Reply("{}", status=404)):
        known.begin_step(["a"])
        known.release(*row_of("a"), final, own=True, alone=True)
        known.end_step()
        assert final.headers == {CLOSED_SESSION_HEADER: "a"}
        clock.now_s += 1
        step(known)
    assert ender.ended == []


def test_a_few_wait_for_their_end_and_then_there_is_room_for_others(
    known: SequenceReaper, ender: Ender, clock: Clock
) -> None:
    told = []
    for session in ("a", "b", "c"):
        known.begin_step([session])
        told.append(closes(session))
        known.release(*row_of(session), told[-1], own=True, alone=True)
        known.end_step()
    assert [CLOSED_SESSION_HEADER in final.headers for final in told] == [False, False, True]
    assert all({name.lower() for name in final.headers} == {CLOSED_SESSION_HEADER.lower()} for final in told)
    clock.now_s += 1.51
    known.sweep([])
    assert ender.ended == ["a", "b"]
    known.begin_step(["d"])
    final = closes("d")
    known.release(*row_of("d"), final, own=True, alone=True)
    assert CLOSED_SESSION_HEADER not in final.headers


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(
    ("before", "steps", "alone"),
    [(["a"], 0, True), ([], 1, True), ([], 0, False)],
    ids=["just after another row", "after being held", "beside another row"],
)
def test_where_a_thread_may_wait_the_client_is_told_in_the_spelling_that_the_frontend_does_not_heed(
    crowded: SequenceReaper, ender: Ender, clock: Clock, before: list[str], steps: int, alone: bool, ours: bool
) -> None:
    step(crowded, *before)
    clock.now_s += 0.24
    crowded.begin_step(["a"])
    final = closes("a")
    crowded.release(*row_of("a", steps, ours), final, own=True, alone=alone)
    crowded.end_step()
    assert final.headers == {CLOSED_SESSION_HEADER.lower(): "a"}
    clock.now_s += 1.49
    step(crowded, "b")
    crowded.sweep([])
    assert ender.ended == []
    clock.now_s += 0.02
    step(crowded, "b")
    assert ender.ended == ["a"]


def test_what_comes_after_a_pause_ends_its_sequence_itself(crowded: SequenceReaper, ender: Ender, clock: Clock) -> None:
    step(crowded, "a")
    clock.now_s += 0.25
    crowded.begin_step(["a"])
    final = closes("a")
    crowded.release(*row_of("a"), final, own=True, alone=True)
    crowded.end_step()
    assert final.headers == {CLOSED_SESSION_HEADER: "a"}


def test_a_sequence_is_ended_once_no_row_uses_it(known: SequenceReaper, ender: Ender, clock: Clock) -> None:
    known.end("a")
    for _ in range(3):
        step(known, "a")
        clock.now_s += 2
        known.sweep(["a"])
    assert ender.ended == []
    known.sweep([])
    assert ender.ended == ["a"]


def test_a_session_that_is_closed_on_another_sequence_has_both_ended(
    known: SequenceReaper, ender: Ender, clock: Clock
) -> None:
    known.begin_step(["made-for-it"])
    final = closes("a")
    known.release(*row_of("made-for-it"), final, own=True, alone=True)
    known.end_step()
    assert final.headers == {CLOSED_SESSION_HEADER.lower(): "a"}
    clock.now_s += 2
    known.sweep([])
    assert sorted(ender.ended) == ["a", "made-for-it"]


def test_a_client_that_asks_again_on_a_dead_id_never_meets_a_request_of_ours(
    known: SequenceReaper, ender: Ender, clock: Clock
) -> None:
    for _ in range(20):
        for pause_s in (0.1, 1.4):
            clock.now_s += pause_s
            known.begin_step(["a"])
            final = Reply("{}", status=404)
            known.release(*row_of("a"), final, own=True, alone=True)
            known.end_step()
            assert final.headers == {}
    assert ender.ended == []
    clock.now_s += 1.51
    known.sweep([])
    assert ender.ended == ["a"]


def test_a_refusal_of_an_open_sessions_row_ends_nothing(known: SequenceReaper, ender: Ender, clock: Clock) -> None:
    known.begin_step(["a"])
    final = Reply("{}", status=400)
    known.release(*row_of("a"), final, own=False, alone=True)
    known.end_step()
    clock.now_s += 1
    known.sweep([])
    assert final.headers == {}
    assert ender.ended == []
