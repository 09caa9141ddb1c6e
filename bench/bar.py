"""The project's performance targets on the benchmark model, and the figure that each one reads.

For the rows that compare with kept KV, the floors are the results of vLLM's CPU build for this model's shape on another
machine.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One target: the benchmark and the ratio in its JSON, the floor, the aim, and which direction is better.

    `before`: the figure when the target was set.
    """

    what: str
    bench: str
    ratio: str
    floor: float
    aim: float
    less_is_better: bool = False
    percent: bool = False
    before: float | None = None

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
        if self.less_is_better:
            return f"{value:.2f}"
        return f"{value:.2f}x" if value < 2 else f"{value:.1f}x"


OPEN_OVER_COPY = "same picture again / copy of its prefix's KV"
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

# Against other servers (`bench.peers`) and against this machine's limits, on a CPU with amx_bf16.
PEERS_BAR = (
    Measure(
        "first answer of a new picture, served / vLLM served",
        "peers",
        "first answer, served / vLLM",
        1.0,
        0.8,
        less_is_better=True,
        before=1.59,
    ),
    Measure(
        "TTFT of turns 2-5, served / vLLM served",
        "peers",
        "TTFT of turns 2-5, served / vLLM",
        0.9,
        0.75,
        less_is_better=True,
        before=1.16,
    ),
    Measure(
        "worst turn's TTFT over the median turn's, served, turns 2-5",
        "peers",
        "worst turn's TTFT / median turn's, served",
        1.3,
        1.15,
        less_is_better=True,
        before=2.3,
    ),
    Measure(
        "time per token, served / vLLM served",
        "peers",
        "time per token, served / vLLM",
        0.85,
        0.75,
        less_is_better=True,
        before=1.19,
    ),
    Measure(
        "time per token, in process / OpenVINO",
        "peers",
        "time per token, in process / OpenVINO",
        1.0,
        0.9,
        less_is_better=True,
        before=1.24,
    ),
    Measure(
        "8 chats x 5, tokens/s, served / best peer",
        "peers",
        "8 chats, tokens/s, served / best peer",
        1.0,
        1.2,
        before=0.69,
    ),
    Measure(
        "decode of 1 chat: share of the bandwidth bound",
        "decode",
        "the same by the best reading of the run, 1 chats",
        0.75,
        0.82,
        percent=True,
        before=0.54,
    ),
    Measure(
        "decode of 16 chats: share of the bandwidth bound",
        "decode",
        "the same by the best reading of the run, 16 chats",
        0.62,
        0.72,
        percent=True,
        before=0.52,
    ),
    Measure(
        "time per token, served / in process",
        "peers",
        "time per token, served / in process",
        1.08,
        1.04,
        less_is_better=True,
        before=1.22,
    ),
    Measure(
        "8 chats x 5, tokens/s, served / in process",
        "peers",
        "8 chats, tokens/s, served / in process",
        0.92,
        0.97,
        before=0.80,
    ),
    Measure(
        "open of a picture already open, over a copy of its KV into touched memory",
        "open",
        OPEN_OVER_COPY,
        2.5,
        1.5,
        less_is_better=True,
        before=8.0,
    ),
)
