"""Owns the engine's loop: commands in, steps, reports out, in the thread that runs it.

Must not know processes, pipes, sessions, payloads or TorchServe.
"""

from __future__ import annotations

import queue
from collections.abc import Callable

from ..ipc.messages import Command, Ping, Report
from .engine import Engine


class EngineLoop:
    """Steps an engine for as long as it has work, and tells what came of it."""

    def __init__(self, engine: Engine, report: Callable[[Report], None]) -> None:
        """`report` is called in the loop's thread, between two steps."""
        self._engine = engine
        self._report = report
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def submit(self, command: Command) -> None:
        """Hand a command to the loop; it takes effect before the next step."""
        self._commands.put(command)

    def stop(self) -> None:
        """Have `run` return after the step that runs."""
        self._commands.put(None)

    def run(self) -> None:
        """Run until `stop`. An error that the engine does not contain ends it: its state can't be trusted then."""
        while self._take_commands():
            events = self._engine.step()
            if events:
                self._report(Report(events, self._engine.memory()))

    def _take_commands(self) -> bool:
        """Apply what has come; wait for something when there is nothing to do. False when the loop shall end."""
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
