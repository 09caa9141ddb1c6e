"""The engine's loop: apply commands, step the engine, report the events, all in the thread that runs the loop.

What is known before a long part of a step, such as an admission, is reported before that part begins.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

from ..ipc.messages import Command, Event, Ping, Report
from .engine import Engine
from .huge_pages import HugePages

# `StepTimes` forgets a step after one to two of these periods.
_PERIOD_S = 300.0


class StepTimes:
    """The longest of the recent steps."""

    def __init__(self) -> None:
        self._longest_s = [0.0, 0.0]  # of the previous period and of this one
        self._period_began_s: float | None = None

    def add(self, began_s: float, ended_s: float) -> None:
        """Note a step by its two times."""
        if self._period_began_s is None or ended_s - self._period_began_s > _PERIOD_S:
            self._period_began_s = ended_s
            self._longest_s = [self._longest_s[1], 0.0]
        self._longest_s[1] = max(self._longest_s[1], ended_s - began_s)

    @property
    def longest_s(self) -> float:
        """Duration of the longest recent step, in seconds."""
        return max(self._longest_s)


class EngineLoop:
    """Steps an engine while it has work and reports the events of each step."""

    def __init__(
        self, engine: Engine, report: Callable[[Report], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`report` is called in the loop's thread, between the phases of a step. `clock`: seconds."""
        self._engine = engine
        self._report = report
        self._clock = clock
        self._steps = StepTimes()
        self._huge_pages = HugePages()
        self._commands: queue.SimpleQueue[tuple[Command, float] | None] = queue.SimpleQueue()

    def submit(self, command: Command) -> None:
        """Queue a command; it is applied before the next step. Thread-safe."""
        self._commands.put((command, time.perf_counter()))

    def stop(self) -> None:
        """Make `run` return after the current step. Thread-safe."""
        self._commands.put(None)

    def run(self) -> None:
        """Run until `stop`. Raises an error that the engine does not handle: its state is then unreliable."""
        while self._apply_commands():
            began_s = self._clock()
            for events in self._engine.phases():
                if events:
                    self._send(events)
            self._steps.add(began_s, self._clock())

    def _send(self, events: list[Event]) -> None:
        self._report(Report(events, self._engine.memory(), self._steps.longest_s, self._huge_pages.ratio))

    def _apply_commands(self) -> bool:
        """Apply all queued commands; if the engine has no work, wait for one. Return False after `stop`."""
        while True:
            try:
                item = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if item is None:
                return False
            command, arrived_at = item
            if isinstance(command, Ping):
                if not self._engine.has_work:
                    self._huge_pages.refresh()
                self._send([])
            else:
                self._engine.apply(command, arrived_at)
