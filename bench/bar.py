"""The project's performance targets on the benchmark model, and the figure that each one reads.

For the rows that compare with kept KV, the floors are the results of vLLM's CPU build for this model's shape on another
machine.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One target: the benchmark and the ratio in its JSON, the floor, the aim, and which direction is better."""

    what: str
    bench: str
    ratio: str
    floor: float
    aim: float
    less_is_better: bool = False
    percent: bool = False

    def verdict(self, value: float) -> str:
        """Return "aim", "floor" or "missed"."""
        sign = -1 if self.less_is_better else 1
        if sign * value >= sign * self.aim:
            return "aim"
        return "floor" if sign * value >= sign * self.floor else "missed"

    def show(self, value: float) -> str:
        """Return the figure as the table prints it."""
        if self.percent:
            return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"
        return f"{value:.2f}" if self.less_is_better else f"{value:.1f}x"


BAR = (
    Measure("TTFT turn 5, stateless / engine", "turns", "TTFT of turn 5, stateless / engine", 10, 14),
    Measure("TTFT turn 5, pixels cached / engine", "turns", "TTFT of turn 5, pixels cached / engine", 9, 12),
    Measure("TTFT of the first question, stateless / engine", "turns", "TTFT of turn 1, stateless / engine", 9, 12),
    Measure(
        "decode step, 1 session: share of the bandwidth bound",
        "decode",
        "share of the bandwidth bound, 1 chats",
        0.5,
        0.75,
        percent=True,
    ),
    Measure(
        "decode tokens/s at 16 over separate forwards", "decode", "tokens/s at 16, engine / separate forwards", 7, 10
    ),
    Measure("follow-up TTFT: engine / KV kept", "turns", "follow-up TTFT, engine / KV kept", 0.77, 0.55, True),
    Measure(
        "time per token: engine / KV kept", "turns", "follow-up time per token, engine / KV kept", 0.59, 0.45, True
    ),
    Measure(
        "8 sessions x 5 turns, tokens/s: engine / one at a time",
        "chats",
        "tokens/s, engine / KV kept, one at a time",
        6,
        9,
    ),
    Measure(
        "open of a picture already open, over its first open",
        "open",
        "same picture again / first open, engine",
        0.05,
        0.02,
        less_is_better=True,
        percent=True,
    ),
    Measure(
        "restore of an offloaded session, over rebuilding it",
        "memory",
        "restore / rebuild",
        0.1,
        0.04,
        less_is_better=True,
        percent=True,
    ),
)
