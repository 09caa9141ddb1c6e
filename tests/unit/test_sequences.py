"""SequenceReaper: sequences are ended by end requests once their clients are silent.

If too many wait, the end header is in the client's reply, and only if no thread of the frontend waits.
"""

from __future__ import annotations

import pytest

from llava_sessions.protocol.constants import CLOSED_SESSION_HEADER, JSON_TYPE
from llava_sessions.torchserve import sequences
from llava_sessions.torchserve.batch import Reply, Row
from llava_sessions.torchserve.sequences import SequenceReaper

QUIET_S = 0.25
LINGER_S = 1.5


class FakeEnder:
    """Records the sequences that end requests would end."""

    mark = ("x-mark", "ours")
    able = True
    pending = 0

    def __init__(self) -> None:
        self.ended: list[str] = []

    def end(self, sequence_id: str) -> None:
        self.ended.append(sequence_id)


class FakeClock:
    """A clock that a test moves."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def ender() -> FakeEnder:
    return FakeEnder()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def make_reaper(ender: FakeEnder, clock: FakeClock, max_waiting: int) -> SequenceReaper:
    return SequenceReaper(ender, max_waiting, quiet_s=QUIET_S, linger_s=LINGER_S, clock=clock)


@pytest.fixture
def reaper(ender: FakeEnder, clock: FakeClock) -> SequenceReaper:
    return make_reaper(ender, clock, max_waiting=2)


@pytest.fixture
def crowded(ender: FakeEnder, clock: FakeClock) -> SequenceReaper:
    """A reaper that may let no sequence wait."""
    return make_reaper(ender, clock, max_waiting=0)


def row_of(sequence: str, steps: int = 0, ours: bool = False, fresh: bool = False) -> tuple[Row, int]:
    return Row("request", sequence, fresh, dict([FakeEnder.mark]) if ours else {}, {}), steps


def closes(session: str) -> Reply:
    return Reply("{}", None, 200, JSON_TYPE, {CLOSED_SESSION_HEADER: session})


def step(reaper: SequenceReaper, *rows: str) -> None:
    reaper.begin_step(rows)
    reaper.end_step()


def test_the_waits_default_to_the_constants_of_the_module(
    ender: FakeEnder, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "LINGER_S", 7.0)
    reaper = SequenceReaper(ender, 2, clock=clock)
    step(reaper, "a")
    reaper.end("a")
    clock.now_s += 6.9
    reaper.sweep([])
    assert ender.ended == []
    clock.now_s += 0.2
    reaper.sweep([])
    assert ender.ended == ["a"]


@pytest.mark.parametrize("whose", ["ours", "fresh"])
def test_a_reply_after_which_no_client_reuses_the_id_ends_its_sequence(
    whose: str, reaper: SequenceReaper, ender: FakeEnder
) -> None:
    reaper.begin_step(["a"])
    final = closes("a")
    reaper.release(*row_of("a", **{whose: True}), final, own=True, alone=True)
    reaper.end_step()
    assert final.headers == {CLOSED_SESSION_HEADER: "a"}
    assert ender.ended == []


def test_a_sequence_that_no_client_knows_is_ended_as_soon_as_the_frontend_has_finished_its_step(
    reaper: SequenceReaper, ender: FakeEnder, clock: FakeClock
) -> None:
    step(reaper, "made-for-it", "a")
    reaper.begin_step(["made-for-it", "a"])
    for sequence, fresh in (("made-for-it", True), ("a", False)):
        reaper.release(*row_of(sequence, steps=1, fresh=fresh), Reply("{}"), own=True, alone=True)
    reaper.end_step()
    clock.now_s += QUIET_S - 0.05
    reaper.sweep([])
    assert ender.ended == []
    clock.now_s += 0.06
    reaper.sweep(["made-for-it"])
    assert ender.ended == [], "a row of the sequence is pending"
    reaper.sweep([])
    assert ender.ended == ["made-for-it"]
    clock.now_s += LINGER_S
    reaper.sweep([])
    assert ender.ended == ["made-for-it", "a"]


@pytest.mark.parametrize("why", ["too many wait", "too many are being ended", "the frontend accepts no end requests"])
def test_the_clients_own_reply_ends_the_sequence_if_an_end_request_can_not(
    why: str, reaper: SequenceReaper, crowded: SequenceReaper, ender: FakeEnder, clock: FakeClock
) -> None:
    if why == "too many wait":
        reaper = crowded
    elif why == "too many are being ended":
        ender.pending = 2
    else:
        ender.able = False
    for final in (closes("a"), Reply("{}", status=404)):
        reaper.begin_step(["a"])
        reaper.release(*row_of("a"), final, own=True, alone=True)
        reaper.end_step()
        assert final.headers == {CLOSED_SESSION_HEADER: "a"}
        clock.now_s += 1
        step(reaper)
    assert ender.ended == []


def test_two_sequences_wait_for_their_end_and_a_third_is_ended_at_once(
    reaper: SequenceReaper, ender: FakeEnder, clock: FakeClock
) -> None:
    replies = []
    for session in ("a", "b", "c"):
        reaper.begin_step([session])
        replies.append(closes(session))
        reaper.release(*row_of(session), replies[-1], own=True, alone=True)
        reaper.end_step()
    assert [CLOSED_SESSION_HEADER in final.headers for final in replies] == [False, False, True]
    assert all({name.lower() for name in final.headers} == {CLOSED_SESSION_HEADER.lower()} for final in replies)
    clock.now_s += 1.51
    reaper.sweep([])
    assert ender.ended == ["a", "b"]
    reaper.begin_step(["d"])
    final = closes("d")
    reaper.release(*row_of("d"), final, own=True, alone=True)
    assert CLOSED_SESSION_HEADER not in final.headers


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(
    ("before", "steps", "alone"),
    [(["a"], 0, True), ([], 1, True), ([], 0, False)],
    ids=["shortly after another row", "after earlier steps", "while another row is pending"],
)
def test_if_a_thread_may_wait_the_client_gets_the_header_in_a_spelling_that_the_frontend_ignores(
    crowded: SequenceReaper, ender: FakeEnder, clock: FakeClock, before: list[str], steps: int, alone: bool, ours: bool
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


def test_a_row_after_a_quiet_time_ends_its_sequence_itself(
    crowded: SequenceReaper, ender: FakeEnder, clock: FakeClock
) -> None:
    step(crowded, "a")
    clock.now_s += 0.25
    crowded.begin_step(["a"])
    final = closes("a")
    crowded.release(*row_of("a"), final, own=True, alone=True)
    crowded.end_step()
    assert final.headers == {CLOSED_SESSION_HEADER: "a"}


def test_a_sequence_is_ended_once_no_row_uses_it(reaper: SequenceReaper, ender: FakeEnder, clock: FakeClock) -> None:
    reaper.end("a")
    for _ in range(3):
        step(reaper, "a")
        clock.now_s += 2
        reaper.sweep(["a"])
    assert ender.ended == []
    reaper.sweep([])
    assert ender.ended == ["a"]


def test_closing_a_session_on_another_sequence_ends_both(
    reaper: SequenceReaper, ender: FakeEnder, clock: FakeClock
) -> None:
    reaper.begin_step(["made-for-it"])
    final = closes("a")
    reaper.release(*row_of("made-for-it"), final, own=True, alone=True)
    reaper.end_step()
    assert final.headers == {CLOSED_SESSION_HEADER.lower(): "a"}
    clock.now_s += 2
    reaper.sweep([])
    assert sorted(ender.ended) == ["a", "made-for-it"]


def test_a_client_that_keeps_asking_on_a_closed_session_never_meets_an_end_request(
    reaper: SequenceReaper, ender: FakeEnder, clock: FakeClock
) -> None:
    for _ in range(20):
        for pause_s in (0.1, 1.4):
            clock.now_s += pause_s
            reaper.begin_step(["a"])
            final = Reply("{}", status=404)
            reaper.release(*row_of("a"), final, own=True, alone=True)
            reaper.end_step()
            assert final.headers == {}
    assert ender.ended == []
    clock.now_s += 1.51
    reaper.sweep([])
    assert ender.ended == ["a"]


def test_a_rejected_row_of_an_open_session_ends_no_sequence(
    reaper: SequenceReaper, ender: FakeEnder, clock: FakeClock
) -> None:
    reaper.begin_step(["a"])
    final = Reply("{}", status=400)
    reaper.release(*row_of("a"), final, own=False, alone=True)
    reaper.end_step()
    clock.now_s += 1
    reaper.sweep([])
    assert final.headers == {}
    assert ender.ended == []
