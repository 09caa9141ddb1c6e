"""Limit the time of a blocking call that has no time limit of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from .errors import TimedOut

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T], discard: Callable[[T], None]) -> T:
    """Return the result of `work`, or raise its error. Raise `TimedOut` when the time is over.

    A thread does the work, and goes on after the time is over. `discard` then receives its result.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # raised again by the caller's thread
            future.set_exception(error)
        else:
            future.set_result(result)

    def drop(late: Future[T]) -> None:
        if late.exception() is None:
            discard(late.result())

    threading.Thread(target=run, daemon=True, name="llava-sessions-call").start()
    try:
        done = wait([future], max(0.0, seconds)).done
    except BaseException:
        future.add_done_callback(drop)
        raise
    if not done:
        future.add_done_callback(drop)
        raise TimedOut("the server must reply within the time-outs, got no whole reply head")
    return future.result()
