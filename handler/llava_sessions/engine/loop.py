"""The engine's loop: apply commands, step the engine, report the events, all in the thread that runs the loop."""

from __future__ import annotations

import queue
from collections.abc import Callable

from ..ipc.messages import Command, Ping, Report
from .engine import Engine


class EngineLoop:
    """Steps an engine while it has work and reports the events of each step."""

    def __init__(self, engine: Engine, report: Callable[[Report], None]) -> None:
        """`report` is called in the loop's thread, between two steps."""
        self._engine = engine
        self._report = report
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def submit(self, command: Command) -> None:
        """Queue a command; it is applied before the next step. Thread-safe."""
        self._commands.put(command)

    def stop(self) -> None:
        """Make `run` return after the current step. Thread-safe."""
        self._commands.put(None)

    def run(self) -> None:
        """Run until `stop`. Raises an error that the engine does not handle: its state is then unreliable."""
        while self._apply_commands():
            events = self._engine.step()
            if events:
                self._report(Report(events, self._engine.memory()))

    def _apply_commands(self) -> bool:
        """Apply all queued commands; if the engine has no work, wait for one. Return False after `stop`."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            if isinstance(command, Ping):
                self._report(Report([], self._engine.memory()))
            else:
                self._engine.apply(command)
