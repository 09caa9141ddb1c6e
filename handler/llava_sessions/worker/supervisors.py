"""One engine process on each device, each kept running by a supervisor of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..ipc.messages import EngineSettings, Report
from .devices import device_labels
from .engines import EngineLost, EngineProcess, EngineStartError, EngineSupervisor, EngineUp, FromEngine
from .inbox import Inbox

log = logging.getLogger(__name__)


class Absence:
    """The engines of a worker that are being replaced. Thread-safe: each supervisor has a thread of its own."""

    def __init__(self, labels: Sequence[str], give_up: Callable[[], None], file: Path | None = None) -> None:
        """`file` exists while no engine serves; the launcher watches it.

        `give_up` is called when no engine of the worker can be started any more.
        """
        self._labels = labels
        self._give_up = give_up
        self._file = file
        self._absent: set[int] = set()
        self._failing: set[int] = set()
        self._lock = threading.Lock()

    def mark(self, engine: int, absent: bool) -> None:
        """Note that an engine was lost, or that a new one is ready."""
        with self._lock:
            if absent:
                self._absent.add(engine)
            else:
                self._absent.discard(engine)
                self._failing.discard(engine)
            if self._file is None:
                return
            try:
                if len(self._absent) == len(self._labels):
                    self._file.touch()
                else:
                    self._file.unlink(missing_ok=True)
            except OSError as error:  # a full disk costs the announcement, not the engine
                log.warning("engine_absence_unmarked reason=%s", error)

    def give_up(self, engine: int) -> bool:
        """Give the worker up if the starts of all engines keep failing. Return whether to start this one again."""
        with self._lock:
            self._failing.add(engine)
            is_last = len(self._failing) == len(self._labels)
        if is_last:
            self._give_up()
            return False
        log.error("engine_unavailable device=%s", self._labels[engine])
        return True


class EngineSupervisors:
    """Starts the engines of a worker side by side, and keeps them running."""

    def __init__(
        self,
        settings: Sequence[EngineSettings],
        inbox: Inbox,
        hang_s: float,
        give_up: Callable[[], None],
        absence_file: Path | None = None,
        spawn: Callable[[EngineSettings], EngineProcess] = EngineProcess,
    ) -> None:
        """`settings`: of each engine. The other arguments are as in `EngineSupervisor` and `Absence`.

        The inbox receives a `FromEngine` for each item of an engine.
        """
        self._labels = labels = device_labels([one.device for one in settings])
        absence = Absence(labels, give_up, absence_file)
        self._supervisors = [
            EngineSupervisor(
                settings[number],
                _NumberedInbox(inbox, number),
                hang_s,
                partial(absence.give_up, number),
                spawn,
                mark=partial(absence.mark, number),
                label=labels[number] if len(labels) > 1 else "",
            )
            for number in range(len(settings))
        ]

    @property
    def labels(self) -> Sequence[str]:
        """The devices of the engines, as in metrics and logs. Known after `wait`."""
        return self._labels

    @property
    def pids(self) -> list[int | None]:
        """Process IDs of the current engines."""
        return [supervisor.pid for supervisor in self._supervisors]

    def launch(self) -> None:
        """Start the first engines without waiting; call `wait` next."""
        for supervisor in self._supervisors:
            supervisor.launch()

    def wait(self) -> list[EngineUp]:
        """Wait until the first engine of each device is ready. If one does not start, stop all and raise its error."""
        ready = []
        for supervisor, label in zip(self._supervisors, self._labels, strict=True):
            try:
                ready.append(supervisor.wait())
            except EngineStartError as error:
                self.stop()
                raise EngineStartError(f"{label}: {error}") if len(self._labels) > 1 else error from None
        if len(ready) == 1 and ready[0].facts is not None:
            self._labels = (ready[0].facts.device,)
        return ready

    def stop(self) -> None:
        """Kill the engines and start no others."""
        for supervisor in self._supervisors:
            supervisor.stop()


@dataclass(frozen=True)
class _NumberedInbox:
    """Puts the items of one engine into the worker's inbox with the engine's number."""

    inbox: Inbox
    engine: int

    def put(self, item: Report | EngineLost | EngineUp) -> None:
        self.inbox.put(FromEngine(self.engine, item))
