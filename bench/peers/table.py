"""The tables, ratios and plot of a comparison."""

from __future__ import annotations

from ..harness import Result, median, spread
from .rounds import ALONE, PARALLEL, Sample, Samples
from .sides import KINDS


def report(samples: Samples) -> Result:
    """Return the table and the ratios that `bar.py` reads."""
    result = Result(
        [
            "side",
            "TTFT turn 1 ms",
            "TTFT turns 2-5 ms",
            "per token ms",
            "follow-up ms",
            "8 chats: tokens/s",
            "8 chats: TTFT turn 1 ms",
            "8 chats: CPU s",
            "others",
        ]
    )
    for name, kind in KINDS.items():
        alone, parallel = samples.of(name, ALONE), samples.of(name, PARALLEL)
        if alone or parallel:
            result.rows.append({"side": kind.label} | figures(alone) | parallel_figures(parallel))
    return result


def figures(alone: list[Sample]) -> dict:
    """Return the figures of one chat at a time."""
    turns = [sample.chats[0] for sample in alone]
    later = [turn for chat in turns for turn in chat[1:]]
    return {
        "TTFT turn 1 ms": spread(chat[0].ttft_ms for chat in turns),
        "TTFT turns 2-5 ms": spread(turn.ttft_ms for turn in later),
        "per token ms": spread(turn.tpot_ms for chat in turns for turn in chat),
        "follow-up ms": spread(turn.total_ms for turn in later),
    }


def parallel_figures(parallel: list[Sample]) -> dict:
    """Return the figures of eight chats at once."""
    if not parallel:
        return {}
    return {"8 chats: tokens/s": median(one.tokens_s for one in parallel)}


def paint(axes, result):
    pass
