"""Futures of the work that is done in several stores."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


def done(value: T) -> Future[T]:
    """Return a future that is done."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


def combine(futures: list[Future[T]], failed: T, merge: Callable[[list[T]], R]) -> Future[R]:
    """Merge the results of all futures; a cancelled or broken one counts as `failed`."""
    if not futures:
        return done(merge([]))
    combined: Future[R] = Future()
    combined.set_running_or_notify_cancel()
    lock = threading.Lock()
    left = len(futures)

    def one_done(_: Future[T]) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        combined.set_result(merge([result_of(future, failed) for future in futures]))

    for future in futures:
        future.add_done_callback(one_done)
    return combined


def result_of(future: Future[T], failed: T) -> T:
    """Return the result of a future that is done. A broken one is logged."""
    if future.cancelled():
        return failed
    error = future.exception()
    if error is None:
        return future.result()
    log.error("journal_error", exc_info=error)
    return failed
