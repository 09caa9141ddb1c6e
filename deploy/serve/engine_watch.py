"""When to send new sessions elsewhere because the engine was lost."""

from __future__ import annotations

from pathlib import Path

# Seconds for which a new engine must serve before it gets new sessions, by the number of losses.
HOLD_S = (0.0, 5.0, 15.0, 60.0)
FORGET_S = 120.0  # after this time of service the losses are counted from the first again


def engine_is_absent(temp: Path) -> bool:
    """Return whether a worker has no engine. It keeps a file in its temporary folder for that time."""
    return any(temp.glob("engine-absent-*"))


class EngineWatch:
    """Derives from the absence of the engine whether new sessions should avoid this server. Times are in seconds."""

    def __init__(self) -> None:
        self.is_avoided = False
        self._is_absent = False
        self._losses = 0
        self._present_since_s = 0.0

    def observe(self, absent: bool, now_s: float) -> bool:
        """Take an observation. Return whether `is_avoided` has changed."""
        if absent and not self._is_absent:
            served_s = now_s - self._present_since_s
            self._losses = 1 if served_s > FORGET_S else self._losses + 1
        elif self._is_absent and not absent:
            self._present_since_s = now_s
        self._is_absent = absent
        hold_s = HOLD_S[min(self._losses, len(HOLD_S)) - 1] if self._losses else 0.0
        before = self.is_avoided
        self.is_avoided = absent or now_s - self._present_since_s < hold_s
        return self.is_avoided != before
