"""Owns the engine's loop: runs an `Engine` beside the pump, commands in, reports out.

The loop is a thread of the worker process, so that a step overlaps with TorchServe's round trip. Must not know
sessions, payloads or TorchServe.
"""

from __future__ import annotations

import logging
import queue
import threading
import time

from .messages import Command, Report
from .service import Engine

log = logging.getLogger(__name__)

# After an error that the engine did not contain: long enough that a lasting one does not fill the log.
PAUSE_S = 0.5


class EngineWorker:
    """Steps an engine for as long as it has work; its reports go to the queue that the caller waits on."""

    def __init__(self, engine: Engine, reports: queue.SimpleQueue) -> None:
        self._engine = engine
        self._reports = reports
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the loop."""
        self._thread.start()

    def submit(self, command: Command) -> None:
        """Hand a command to the loop; it takes effect at the next step."""
        self._commands.put(command)

    def stop(self) -> None:
        """End the loop after the step that runs."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._take_commands():
            try:
                events = self._engine.step()
            except Exception:
                log.exception("step_lost")  # the loop is everybody's: it goes on
                time.sleep(PAUSE_S)
                continue
            if events:
                self._reports.put(Report(events, self._engine.memory()))

    def _take_commands(self) -> bool:
        """Apply what has come; wait for something when there is nothing to do. False when the loop shall end."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            self._engine.apply(command)
