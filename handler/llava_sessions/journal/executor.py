"""Run work in threads, in order for each key."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

log = logging.getLogger(__name__)

_THREADS = 8

T = TypeVar("T")


class KeyedExecutor:
    """Run the work of one key in order, and the work of different keys in parallel. Thread-safe."""

    def __init__(self, name: str, pool: Executor | None = None) -> None:
        """`name`: prefix of the threads' names. `pool` replaces the threads, for tests."""
        self._pool = pool if pool is not None else ThreadPoolExecutor(_THREADS, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._jobs: dict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = {}

    def run(self, key: str, work: Callable[[], T]) -> Future[T]:
        """Return the result of `work` as a future, which is cancelled if the executor is closed."""
        future: Future[T] = Future()
        with self._lock:
            waiting = self._jobs.get(key)
            if waiting is not None:
                waiting.append((future, work))
                return future
            self._jobs[key] = deque([(future, work)])
            try:
                self._pool.submit(self._run_all, key)
            except RuntimeError:  # the pool is closed
                del self._jobs[key]
                future.cancel()
        return future

    def pending(self) -> list[Future[Any]]:
        """Return all futures that are not done."""
        with self._lock:
            return [future for jobs in self._jobs.values() for future, _ in jobs]

    def close(self) -> None:
        """Cancel the work that has not begun."""
        self._pool.shutdown(wait=False)
        for future in self.pending():
            future.cancel()

    def _run_all(self, key: str) -> None:
        while True:
            with self._lock:
                if not self._jobs[key]:
                    del self._jobs[key]
                    return
                future, work = self._jobs[key][0]  # `pending` lists the job until it is done
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)
            with self._lock:
                self._jobs[key].popleft()
