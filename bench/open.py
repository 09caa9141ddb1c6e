"""Time to open a session: with a new picture, with the picture of an open session, and with a different picture.

Timed in two parts: `prepare` (decoding the JPEG, resizing, tokenizing: the handler's part, without the network) and
`engine` (encoding and prefilling, until the session is ready for its first question).

An open of a picture that is open already copies the KV of its prefix. The bound is one copy of as many bytes between
two tensors that were written before, measured in the same run.
"""

from __future__ import annotations

import time

import torch

from . import harness
from .bar import OPEN_OVER_COPY
from .driver import EngineChats, Pictures, load_engine, prepare
from .harness import Options, Result, Run, median, spread
from .machine import synchronize

FIRST = "first open"
SAME = "same picture again"
DIFFERENT = "different picture"


def open_once(chats: EngineChats, name: str, jpeg: bytes) -> tuple[float, float]:
    """Open a session; return the milliseconds of preparation and of the engine."""
    began = time.perf_counter()
    opening = prepare(chats.tokens, jpeg)
    prepared = time.perf_counter()
    chats.open(name, opening)
    chats.run()
    return (prepared - began) * 1e3, chats.opened_ms[name]


class PrefixCopy:
    """A copy of the KV of one picture's prefix between two tensors that were written before."""

    def __init__(self, kv_bytes: int, device: torch.device) -> None:
        self._device = device
        self._source = torch.ones(kv_bytes, dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)
        self.taken_ms: list[float] = []

    def measure(self, repeats: int = 5) -> None:
        """Copy several times and add the times."""
        for _ in range(repeats):
            synchronize(self._device)
            began = time.perf_counter()
            self._target.copy_(self._source)
            synchronize(self._device)
            self.taken_ms.append((time.perf_counter() - began) * 1e3)


def measure(options: Options, run: Run) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """Return `{kind of open: {"prepare": [...], "engine": [...]}}` and the times of a copy of the prefix's KV, in ms.

    Each round starts with an empty engine.
    """
    chats = load_engine(options)
    pictures = Pictures(options.seed)
    taken = {kind: {"prepare": [], "engine": []} for kind in (FIRST, SAME, DIFFERENT)}
    open_once(chats, "warm", pictures.jpeg())
    open_once(chats, "again", pictures.jpeg())
    prefix_tokens = len(chats.conversations["warm"].token_ids)
    copy = PrefixCopy(prefix_tokens * chats.engine.model.kv_shape.token_bytes, options.device)
    chats.close_all()
    for _ in range(options.rounds):
        first = pictures.jpeg()
        other = pictures.jpeg()
        order = [
            (FIRST, "a", first),
            (SAME, "b", first),
            (SAME, "c", first),
            (DIFFERENT, "d", other),
            (SAME, "e", first),
        ]
        for kind, name, jpeg in order:
            for part, value in zip(("prepare", "engine"), open_once(chats, name, jpeg), strict=True):
                taken[kind][part].append(value)
        copy.measure()
        chats.close_all()
        run.bandwidth.measure(1)
    return taken, copy.taken_ms


def report(taken: dict[str, dict[str, list[float]]], copy_ms: list[float]) -> Result:
    """Return the table and the ratios that `bar.py` reads."""
    result = Result(["open", "prepare ms", "engine ms", "both ms", "of the first"], samples=taken)
    first = median(taken[FIRST]["engine"])
    for kind, parts in taken.items():
        both = [a + b for a, b in zip(parts["prepare"], parts["engine"], strict=True)]
        share = median(parts["engine"]) / first
        result.rows.append(
            {
                "open": kind,
                "prepare ms": spread(parts["prepare"]),
                "engine ms": spread(parts["engine"]),
                "both ms": spread(both),
                "of the first": f"{share:.1%}",
            }
        )
    result.ratios["same picture again / first open, engine"] = median(taken[SAME]["engine"]) / first
    result.ratios["same picture again / first open, with preparing"] = _both(taken[SAME]) / _both(taken[FIRST])
    result.ratios[OPEN_OVER_COPY] = median(taken[SAME]["engine"]) / median(copy_ms)
    result.settings = {"prefix_copy_ms": median(copy_ms)}
    result.notes = ["Times are medians [best]; `of the first` compares the engine's part."]
    return result


def _both(parts: dict[str, list[float]]) -> float:
    return median(a + b for a, b in zip(parts["prepare"], parts["engine"], strict=True))


def paint(axes, result: Result) -> None:
    """Draw preparation and engine, stacked."""
    kinds = list(result.samples)
    below = [0.0] * len(kinds)
    for part, colour in (("prepare", "tab:gray"), ("engine", "black")):
        values = [median(result.samples[kind][part]) for kind in kinds]
        axes.bar(kinds, values, bottom=below, color=colour, width=0.5, label=part)
        below = [a + b for a, b in zip(below, values, strict=True)]
    for index, total in enumerate(below):
        axes.text(index, total, f"{total:,.0f} ms", ha="center", va="bottom", fontsize=8)
    axes.set(ylabel="ms", title="Opening a session")
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = harness.parse("open", __doc__, argv, rounds=6)
    run = Run(options)
    return run.finish(report(*measure(options, run)), paint)


if __name__ == "__main__":
    main()
