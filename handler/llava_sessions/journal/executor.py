"""Runs work in threads, in order for each key."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

log = logging.getLogger(__name__)

_THREADS_PER_STORE = 8


class KeyedExecutor:
    """Runs work beside the caller: in order within a lane, lanes side by side."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(_THREADS_PER_STORE, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._jobs: dict[str, deque[tuple[Future, Callable[[], Any]]]] = {}

    def run(self, lane: str, work: Callable[[], Any]) -> Future:
        """What comes of the work; cancelled where the lanes are closed."""
        future: Future = Future()
        with self._lock:
            waiting = self._jobs.get(lane)
            if waiting is not None:
                waiting.append((future, work))
                return future
            self._jobs[lane] = deque([(future, work)])
            try:
                self._pool.submit(self._work_off, lane)
            except RuntimeError:  # it is closed
                del self._jobs[lane]
                future.cancel()
        return future

    def pending(self) -> list[Future]:
        """All that is not done."""
        with self._lock:
            return [future for jobs in self._jobs.values() for future, _ in jobs]

    def close(self) -> None:
        """Cancel what has not begun."""
        self._pool.shutdown(wait=False)
        for future in self.pending():
            future.cancel()

    def _work_off(self, lane: str) -> None:
        while True:
            with self._lock:
                if not self._jobs[lane]:
                    del self._jobs[lane]
                    return
                future, work = self._jobs[lane][0]  # stays in sight of `pending` until it is done
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    log.exception("journal_error")
                    future.set_exception(error)
            with self._lock:
                self._jobs[lane].popleft()
