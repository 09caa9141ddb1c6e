"""Stop asking a store that just failed, and log each outage once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from .stores import Store, StoreError

log = logging.getLogger(__name__)

T = TypeVar("T")


class CircuitBreaker:
    """Counts the failures of one kind of work in a store, and pauses after each. Thread-safe."""

    def __init__(self, store: Store, work: str, consequence: str, clock: Callable[[], float]) -> None:
        """`work` and `consequence` (of a failure) are words for the log; `clock`: seconds."""
        self._store = store
        self._work = work
        self._consequence = consequence
        self._clock = clock
        self._lock = threading.Lock()
        self._failing = False
        self._next_try_s = 0.0
        self.failures_total = 0

    @property
    def is_failing(self) -> bool:
        """Whether the latest work failed."""
        with self._lock:
            return self._failing

    def run(self, work: Callable[[], T]) -> T:
        """Do the work. Raise `StoreError` if it fails, or without a try if the store just failed."""
        with self._lock:
            if self._failing and self._clock() < self._next_try_s:
                self.failures_total += 1
                raise StoreError("paused after a failure")
            self._next_try_s = self._clock() + self._store.pause_s  # one try at a time during an outage
        try:
            result = work()
        except StoreError as error:
            self._note(error)
            raise
        self._note(None)
        return result

    def _note(self, error: StoreError | None) -> None:
        with self._lock:
            was_failing = self._failing
            self._failing = error is not None
            if self._failing:
                self.failures_total += 1
                self._next_try_s = self._clock() + self._store.pause_s
        facts = f"store={self._store.name} work={self._work}"
        if error is not None and not was_failing:
            log.warning("journal_failing %s reason=%s; chats go on, %s", facts, error, self._consequence)
        elif error is None and was_failing:
            log.info("journal_works_again %s", facts)
