"""One chat of five turns: time to the first token, time per output token, and time of the whole turn.

Compares the engine with four baselines on `generate`, from keeping nothing between turns to keeping the KV cache. All
five run every turn, one after the other, in another order in each round. Each round has a new picture. The column
`open` is the work before the first question: decoding, encoding and, in the engine, prefilling.
"""

from __future__ import annotations

import argparse
import time

from . import harness
from .driver import EngineChats, Pictures, Prompts, TurnTimes, load_engine, prepare
from .harness import Options, Result, Run, median, spread
from .reference import Chat, FeaturesCached, KeptKV, PixelsCached, Reference

ENGINE = "engine"


class EngineSide:
    """One session of the engine, with the methods of the reference chats."""

    label = ENGINE

    def __init__(self, chats: EngineChats) -> None:
        self._chats = chats

    def open(self, jpeg: bytes) -> None:
        """Start a chat about a picture; return when it is prefilled."""
        self._chats.close_all()
        self._chats.open("chat", prepare(self._chats.tokens, jpeg))
        self._chats.run()

    def answer(self, text: str, answer_tokens: int) -> TurnTimes:
        """Run one turn."""
        return self._chats.answer("chat", text, answer_tokens)


def measure(options: Options, run: Run) -> dict[str, dict]:
    """Return opening times and turns: `{label: {"open_ms": [...], "turns": [[TurnTimes of turn 1], ...]}}`."""
    reference = Reference(options.checkpoint, options.dtype, options.device)
    kinds = (Chat, PixelsCached, FeaturesCached, KeptKV)
    sides = [*(kind(reference) for kind in kinds), EngineSide(load_engine(options))]
    taken = {side.label: {"open_ms": [], "turns": [[] for _ in range(options.extra.turns)]} for side in sides}
    pictures = Pictures(options.seed)
    prompts = Prompts(options.seed)
    warm_up(sides, pictures.jpeg(), prompts)
    for number in range(options.rounds):
        run.say(f"round {number + 1} of {options.rounds}")
        jpeg = pictures.jpeg()
        order = harness.alternate(sides, number)
        for side in order:
            began = time.perf_counter()
            side.open(jpeg)
            taken[side.label]["open_ms"].append((time.perf_counter() - began) * 1e3)
        for turn in range(options.extra.turns):
            # The template adds some 8 tokens of its own.
            text = prompts.words(max(options.extra.prompt_tokens - 8, 1))
            for side in order:
                taken[side.label]["turns"][turn].append(side.answer(text, options.extra.answer_tokens))
        run.bandwidth.measure(1)
    return taken


def warm_up(sides: list, jpeg: bytes, prompts: Prompts) -> None:
    """Run a short chat on each side, unmeasured."""
    for side in sides:
        side.open(jpeg)
        for _ in range(2):
            side.answer(prompts.words(4), 2)


def report(options: Options, taken: dict[str, dict]) -> Result:
    """Return the table and the ratios that `bar.py` reads."""
    last = options.extra.turns
    result = Result(["side", "turn", "open ms", "TTFT ms", "per token ms", "total ms", "same answer"])
    for label, side in taken.items():
        for number, times in enumerate(side["turns"], start=1):
            result.rows.append(
                {
                    "side": label,
                    "turn": number,
                    "open ms": spread(side["open_ms"]) if number == 1 else None,
                    "TTFT ms": spread(t.ttft_ms for t in times),
                    "per token ms": spread(t.tpot_ms for t in times),
                    "total ms": spread(t.total_ms for t in times),
                    "same answer": _same(taken, label, number - 1),
                }
            )
    result.ratios = ratios(taken, last)
    result.settings = {name: getattr(options.extra, name) for name in ("turns", "prompt_tokens", "answer_tokens")}
    result.samples = {
        label: {
            "open_ms": side["open_ms"],
            "ttft_ms": [[t.ttft_ms for t in times] for times in side["turns"]],
            "tpot_ms": [[t.tpot_ms for t in times] for times in side["turns"]],
            "total_ms": [[t.total_ms for t in times] for times in side["turns"]],
        }
        for label, side in taken.items()
    }
    result.notes = [
        "Times are medians [best]. `same answer`: rounds in which the tokens equal those of `stateless`; after the",
        "first rounding tie of a lower precision, the conversations differ. Caches are filled at `open`.",
    ]
    return result


def ratios(taken: dict[str, dict], last: int) -> dict[str, float]:
    """Return ratios of medians of the same run. `follow-up`: every turn but the first."""

    def ttft(label: str, turn: int) -> float:
        return median(t.ttft_ms for t in taken[label]["turns"][turn - 1])

    def later(label: str, what: str) -> float:
        return median(getattr(t, what) for times in taken[label]["turns"][1:] for t in times)

    found = {
        f"TTFT of turn 1, {label} / engine": ttft(label, 1) / ttft(ENGINE, 1) for label in taken if label != ENGINE
    }
    for label in taken:
        if label != ENGINE:
            found[f"TTFT of turn {last}, {label} / engine"] = ttft(label, last) / ttft(ENGINE, last)
    for what, name in (("ttft_ms", "TTFT"), ("tpot_ms", "time per token"), ("total_ms", "total")):
        found[f"follow-up {name}, engine / KV kept"] = later(ENGINE, what) / later("KV kept", what)
    return found


def _same(taken: dict[str, dict], label: str, turn: int) -> str:
    own = taken[label]["turns"][turn]
    first = taken["stateless"]["turns"][turn]
    return f"{sum(a.answer_ids == b.answer_ids for a, b in zip(own, first, strict=True))}/{len(own)}"


def paint(axes, result: Result) -> None:
    """Draw the TTFT of each turn, one line per side."""
    for label, samples in result.samples.items():
        turns = range(1, len(samples["ttft_ms"]) + 1)
        style = {"linewidth": 2.5, "color": "black"} if label == ENGINE else {}
        axes.plot(turns, [median(times) for times in samples["ttft_ms"]], marker="o", label=label, **style)
    axes.set(
        yscale="log", xlabel="turn", ylabel="time to first token, ms", title="A chat of five turns about one picture"
    )
    axes.set_xticks(list(turns))
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = harness.parse("turns", __doc__, argv, rounds=5, more=_arguments)
    run = Run(options)
    return run.finish(report(options, measure(options, run)), paint)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=30)
    parser.add_argument("--answer-tokens", type=int, default=16)


if __name__ == "__main__":
    main()
