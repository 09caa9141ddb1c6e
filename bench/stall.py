"""Longest gap between two tokens of eight running answers while a ninth session opens with a new picture.

Gaps are recorded before and during the opening. No gap should be longer than encoding one picture plus prefilling one
chunk; both are also timed alone in the same run.
"""

from __future__ import annotations

import argparse
import time

from . import harness
from .driver import EngineChats, Pictures, Prompts, load_engine, prepare
from .harness import Options, Result, Run, median, number, percentile

QUIET = "8 chats answering"
OPENING = "while a ninth opens"


def one_round(options: Options, chats: EngineChats, jpegs: list[bytes], prompts: Prompts) -> dict[str, list[float]]:
    """Return the gaps of all streams before and during the opening of another session."""
    streams = [f"chat{index}" for index in range(options.extra.streams)]
    for name in streams:
        chats.open(name, prepare(chats.tokens, jpegs[0]))
    chats.run()
    quiet_steps = options.pick(24, 4)
    for name in streams:
        chats.ask(name, prompts.words(20), options.pick(64, 16))
    while any(not chats.turns[name][-1].token_times for name in streams):
        chats.step()
    began = time.perf_counter()
    for _ in range(quiet_steps):
        chats.step()
    ninth = prepare(chats.tokens, jpegs[1])  # in the handler another thread does this, so it delays no token
    opens_at = time.perf_counter()
    chats.open("ninth", ninth)
    while "ninth" not in chats.opened_ms:
        chats.step()
    ended = time.perf_counter()
    gaps = {
        QUIET: _gaps(chats, streams, began, opens_at),
        OPENING: _gaps(chats, streams, opens_at, ended),
        "ninth open": [chats.opened_ms["ninth"]],
    }
    chats.close_all()
    return gaps


def _gaps(chats: EngineChats, streams: list[str], began: float, ended: float) -> list[float]:
    """Return the ms between consecutive tokens whose later one arrived between two times."""
    found = []
    for name in streams:
        times = chats.turns[name][-1].token_times
        inside = [at for at in range(1, len(times)) if began < times[at] <= ended]
        found += [(times[at] - times[at - 1]) * 1e3 for at in inside]
    return found


def alone(chats: EngineChats, jpeg: bytes) -> dict[str, float]:
    """Open one session alone; return the ms of its first step and of its longest other step (one chunk)."""
    chats.open("alone", prepare(chats.tokens, jpeg))
    steps = []
    while chats.engine.has_work:
        began = time.perf_counter()
        chats.step()
        steps.append((time.perf_counter() - began) * 1e3)
    chats.close_all()
    return {"first": steps[0], "chunk": max(steps[1:], default=0.0)}


def measure(options: Options, run: Run) -> dict[str, list[float]]:
    """Return the gaps of all rounds, and the times of an opening alone."""
    chats = load_engine(options)
    pictures = Pictures(options.seed)
    prompts = Prompts(options.seed)
    one_round(options, chats, [pictures.jpeg(), pictures.jpeg()], prompts)  # unmeasured
    taken: dict[str, list[float]] = {
        QUIET: [],
        OPENING: [],
        "ninth open": [],
        "first step alone": [],
        "chunk alone": [],
    }
    for index in range(options.rounds):
        run.say(f"round {index + 1} of {options.rounds}")
        for name, values in one_round(options, chats, [pictures.jpeg(), pictures.jpeg()], prompts).items():
            taken[name] += values
        cost = alone(chats, pictures.jpeg())
        taken["first step alone"].append(cost["first"])
        taken["chunk alone"].append(cost["chunk"])
    return taken


def report(options: Options, taken: dict[str, list[float]]) -> Result:
    """Return the table, and the longest gap over the allowed one."""
    result = Result(["gaps between tokens", "median ms", "p99 ms", "worst ms", "count"], samples=taken)
    for kind in (QUIET, OPENING):
        gaps = taken[kind]
        result.rows.append(
            {
                "gaps between tokens": kind,
                "median ms": median(gaps),
                "p99 ms": percentile(gaps, 0.99),
                "worst ms": max(gaps),
                "count": len(gaps),
            }
        )
    # The first step of an opening encodes its picture and runs its first chunk.
    allowed = median(taken["first step alone"]) + median(taken[QUIET])
    result.ratios["worst gap / (picture + chunk alone + a quiet step)"] = max(taken[OPENING]) / allowed
    result.settings = {"streams": options.extra.streams}
    first, chunk, ninth = (number(median(taken[name])) for name in ("first step alone", "chunk alone", "ninth open"))
    result.notes = [
        f"Alone, picture and first chunk take {first} ms, a further chunk {chunk} ms; the ninth opened in {ninth} ms."
    ]
    return result


def paint(axes, result: Result) -> None:
    """Draw the share of gaps that are longer than x."""
    for kind, colour in ((QUIET, "tab:gray"), (OPENING, "black")):
        gaps = sorted(result.samples[kind])
        shares = [1 - index / len(gaps) for index in range(len(gaps))]
        axes.step(gaps, shares, where="post", color=colour, label=kind)
    axes.set(xscale="log", xlabel="gap between two tokens, ms", ylabel="share of gaps that are longer", title="Stall")
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = harness.parse("stall", __doc__, argv, rounds=5, more=_arguments)
    run = Run(options)
    return run.finish(report(options, measure(options, run)), paint)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streams", type=int, default=8)


if __name__ == "__main__":
    main()
