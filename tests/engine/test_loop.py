"""The engine's loop reports what is known before the long parts of a step. The order of calls is compared, no time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.huge_pages import HugePages
from llava_sessions.engine.loop import EngineLoop, StepTimes
from llava_sessions.ipc.messages import (
    AskSession,
    Cancelled,
    CloseSession,
    Command,
    OpenFailed,
    OpenSession,
    Ping,
    Prefilled,
    PreparedPicture,
    Report,
    Sampling,
    StopTurn,
)
from tests.support.engine_chats import QUESTIONS, Chats, noise


class Recording:
    """Runs an engine's loop, and records the engine's long calls and the reported events in order."""

    def __init__(self, chats: Chats, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.reports: list[Report] = []
        self.chats = chats
        for name in ("encode_batch", "forward"):
            monkeypatch.setattr(chats.engine.model, name, self._recorded(name, getattr(chats.engine.model, name)))
        self.loop = EngineLoop(chats.engine, self._report)

    def run(self, *commands: Command, until: type) -> list[str]:
        """Submit the commands, and run until an event of a type; return the calls."""
        self._until = until
        for command in commands:
            self.loop.submit(command)
        self.loop.run()
        return self.calls

    def _recorded(self, name: str, method: Callable) -> Callable:
        def call(*args):
            self.calls.append(name)
            return method(*args)

        return call

    def _report(self, report: Report) -> None:
        self.reports.append(report)
        self.calls += [type(event).__name__ for event in report.events]
        if any(isinstance(event, self._until) for event in report.events):
            self.loop.stop()


def opening(chats: Chats, name: str, seed: int) -> OpenSession:
    made = chats.tokens.opening([(f"noise {seed}", noise(seed))])
    return OpenSession(name, made.token_ids, made.pictures)


def test_an_admission_is_reported_before_the_picture_is_encoded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = Chats(tiny)
    recording = Recording(chats, monkeypatch)
    calls = recording.run(opening(chats, "a", 1), until=Prefilled)
    assert calls == ["Admitted", "encode_batch", "forward", "Prefilled"]
    assert recording.reports[0].memory.sessions == 1


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        pytest.param(CloseSession("a"), ["Cancelled", "Closed"], id="close"),
        pytest.param(StopTurn("turn-a", "cancelled", keep_answer=False), ["Cancelled"], id="cancel"),
        pytest.param(StopTurn("turn-a", "shutdown", keep_answer=True), ["Finished"], id="cut"),
        pytest.param(AskSession("nobody", "t", [5], Sampling(4)), ["TurnFailed"], id="failure"),
        pytest.param(AskSession("a", "t", [5], Sampling(4)), ["TurnFailed"], id="second question"),
        pytest.param(OpenSession("huge", [1] * 10_000, ()), ["OutOfCapacity"], id="rejection"),
    ],
)
def test_what_a_command_does_is_reported_before_a_long_step(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, command: Command, expected: list[str]
) -> None:
    chats = Chats(tiny)
    chats.engine.device_memory.budget = DeviceBudget(2**22, 0)
    chats.open("a", 1)
    chats.ask("a", QUESTIONS[0], Sampling(100, ignore_eos=True))
    chats.run(steps=4)
    calls = Recording(chats, monkeypatch).run(opening(chats, "b", 2), command, until=Prefilled)
    assert calls[: calls.index("encode_batch")] == ["Admitted", *expected]


def test_a_picture_that_fails_is_reported_before_the_forward_of_others(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    chats.ask("a", QUESTIONS[0], Sampling(100, ignore_eos=True))
    chats.run(steps=4)
    blind = PreparedPicture("bad", {"pixel_values": np.zeros((1, 3, 20, 20), dtype=np.float32)})
    bad = OpenSession("bad", chats.conversations["a"].opening.token_ids, (blind,))
    calls = Recording(chats, monkeypatch).run(bad, until=OpenFailed)
    assert calls[:4] == ["Admitted", "encode_batch", "OpenFailed", "forward"]


def test_the_time_in_the_queue_of_commands_counts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that arrives during a long step waits for its end."""
    chats = Chats(tiny)
    chats.open("a", 1)
    chats.run()
    prompt_ids = chats.tokens.prompt(chats.conversations["a"].opened_on, QUESTIONS[0])
    arrivals: list[float] = []
    apply = chats.engine.apply

    def delayed(command: Command, arrived_at: float) -> None:
        arrivals.append(arrived_at)
        apply(command, arrived_at - 10.0)

    monkeypatch.setattr(chats.engine, "apply", delayed)
    recording = Recording(chats, monkeypatch)
    recording.loop.submit(AskSession("a", "turn-a", prompt_ids, Sampling(4, deadline_ms=9_000)))
    submitted_at = time.perf_counter()
    calls = recording.run(until=Cancelled)
    assert arrivals[0] <= submitted_at
    assert calls == ["TurnAdmitted", "Cancelled"]
    cancelled = recording.reports[0].events[-1]
    assert cancelled == Cancelled("turn-a", "deadline")
    assert cancelled.timings.total_ms >= 10_000


def test_reports_carry_the_duration_of_the_longest_recent_step(tiny: Path) -> None:
    chats = Chats(tiny)
    reports: list[Report] = []
    times = iter([0.0, 7.5])  # the first step

    def report(one: Report) -> None:
        reports.append(one)
        if any(isinstance(event, Prefilled) for event in one.events):
            loop.submit(CloseSession("a"))
        elif len(reports) > 2:
            loop.stop()

    loop = EngineLoop(chats.engine, report, clock=lambda: next(times, 8.0))
    loop.submit(opening(chats, "a", 1))
    loop.run()
    assert [one.longest_step_s for one in reports] == [0.0, 0.0, 7.5]


def test_the_part_in_huge_pages_is_read_once_a_minute(tmp_path: Path) -> None:
    file = tmp_path / "smaps_rollup"
    times = iter([0.0, 59.0, 60.0, 120.0])
    pages = HugePages(file, clock=lambda: next(times))
    head = "55d0-7ffc ---p 00000000 00:00 0    [rollup]\nRss:    900 kB\n"
    file.write_text(f"{head}Anonymous:    800 kB\nAnonHugePages:    600 kB\n")
    pages.refresh()
    assert pages.ratio == 0.75
    file.write_text(f"{head}Anonymous:    0 kB\nAnonHugePages:    0 kB\n")
    pages.refresh()
    assert pages.ratio == 0.75
    pages.refresh()
    assert pages.ratio == 0.0
    file.unlink()
    pages.refresh()
    assert pages.ratio == 0.0


def test_a_ping_without_work_is_answered_with_the_part_in_huge_pages(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = Chats(tiny)
    reports: list[Report] = []
    loop = EngineLoop(chats.engine, reports.append)
    monkeypatch.setattr(HugePages, "refresh", lambda pages: setattr(pages, "ratio", 0.5))
    loop.submit(opening(chats, "a", 1))
    loop.submit(Ping())
    loop.stop()
    loop.run()
    assert [report.huge_page_ratio for report in reports] == [0.0], "the opening is work"
    chats.run()
    loop.submit(Ping())
    loop.stop()
    loop.run()
    assert reports[-1].huge_page_ratio == 0.5


def test_a_long_step_is_forgotten_after_two_periods() -> None:
    steps = StepTimes()
    steps.add(0.0, 6.0)
    steps.add(100.0, 101.0)
    assert steps.longest_s == 6.0
    steps.add(400.0, 401.0)
    assert steps.longest_s == 6.0
    steps.add(800.0, 800.5)
    assert steps.longest_s == 1.0
