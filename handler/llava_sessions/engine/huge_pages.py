"""The part of this process's memory that is in huge pages, as Linux counts it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

# Linux walks all page tables of the process for a reading: some milliseconds for some gigabytes.
_PERIOD_S = 60.0


class HugePages:
    """A reading of `/proc/self/smaps_rollup` that is at most a minute old when it is made."""

    def __init__(
        self, path: Path = Path("/proc/self/smaps_rollup"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock`: seconds."""
        self._path = path
        self._clock = clock
        self._read_s: float | None = None
        self.ratio = 0.0

    def refresh(self) -> None:
        """Read again if the last reading is a minute old. Must not be called while a session has work.

        `ratio` is then the part (0 to 1) of the anonymous memory that is in huge pages. Weights and KV caches are
        anonymous memory; files such as libraries are not. 0 on other systems.
        """
        now_s = self._clock()
        if self._read_s is not None and now_s - self._read_s < _PERIOD_S:
            return
        self._read_s = now_s
        try:
            text = self._path.read_text()
        except OSError:
            return
        found = re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)
        sizes = {name: int(size) for name, size in found}
        anonymous = sizes.get("Anonymous", 0)
        self.ratio = sizes.get("AnonHugePages", 0) / anonymous if anonymous else 0.0
