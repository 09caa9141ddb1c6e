"""A budget of pixels that are decoded at once, in all threads."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator


class PixelBudget:
    """Admits pictures to decoding, in the order of arrival, while they have at most `max_pixels` together.

    Memory grows with the decoded pixels. With this budget it does not grow with the number of threads. Thread-safe.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._used = 0
        self._arrivals: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Wait until the budget has room for `pixels`, and hold them inside the block.

        A picture that is larger than the whole budget is admitted alone.
        """
        pixels = min(pixels, self._max_pixels)
        ticket = object()
        with self._changed:
            self._arrivals.append(ticket)
            self._changed.wait_for(lambda: self._arrivals[0] is ticket and self._used + pixels <= self._max_pixels)
            self._arrivals.popleft()
            self._used += pixels
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()
