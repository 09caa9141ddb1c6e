"""The queue through which everything reaches the pump's thread."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Inbox:
    """Reports of the engine, news of its process, and steps to run between two rows. Thread-safe."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def put(self, item: Any) -> None:
        """Add an item: a `FromEngine`, or a function without arguments."""
        self._items.put(item)

    def get(self, timeout_s: float = 0.0) -> Any:
        """Remove and return the oldest item. Raise `queue.Empty` if none arrives in time."""
        if timeout_s <= 0:
            return self._items.get_nowait()
        return self._items.get(timeout=timeout_s)

    def when_done(self, future: Future[T], step: Callable[[Future[T]], None]) -> None:
        """Run `step(future)` on the pump's thread: at once if the future is done, else when it is."""
        if future.done():
            step(future)
        else:
            future.add_done_callback(lambda done: self.put(partial(step, done)))
