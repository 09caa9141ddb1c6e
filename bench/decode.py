"""Decode steps of 1, 4, 8 and 16 chats with contexts of 700 to 1,200 tokens: time, tokens per second, and the share of
the memory-bandwidth bound.

The bound: a step reads the weight of every linear of the language model and its head once, in the engine's format, and
the KV of every chat once. The bound is these bytes divided by the read bandwidth.

On a shared machine the bandwidth may halve within a minute. A block of steps is therefore compared with the better of
the readings directly before and after it, and the share is the median of the blocks. A second column uses the best
reading of the whole run. A ratio gives the share of that reading which the linears alone reach with one row. No step
can exceed it by much.

The engine is compared with separate forwards of `transformers`, one chat after the other, each on a `DynamicCache` of
the same length, filled with noise. Blocks of steps of both sides alternate.
"""

from __future__ import annotations

import argparse
import time

from . import harness
from .driver import EngineChats, Pictures, Prompts, load_engine, prepare
from .harness import Options, Result, Run, median, spread
from .limits import Linears
from .reference import Reference, decode_separately, random_caches


def contexts(options: Options, chats: EngineChats) -> dict[str, int]:
    """Open the chats, each with another number of tokens in its cache; return `{name: tokens}`."""
    most = max(options.extra.sessions)
    shortest, longest = options.pick((700, 1200), (40, 80))
    pictures = Pictures(options.seed)
    prompts = Prompts(options.seed)
    jpeg = pictures.jpeg()
    for number in range(most):
        name = f"chat{number}"
        opening = prepare(chats.tokens, jpeg)
        context_tokens = shortest + (longest - shortest) * number // max(most - 1, 1)
        chats.open(name, opening)
        chats.run()
        chats.answer(name, prompts.words(max(context_tokens - len(opening.token_ids) - 8, 1)), 1)
    return {name: len(conversation.token_ids) for name, conversation in chats.conversations.items()}


def chosen(names: list[str], count: int) -> list[str]:
    """Return `count` chats from the shortest to the longest context, or the middle one if `count` is 1."""
    if count == 1:
        return [names[len(names) // 2]]
    return [names[index * (len(names) - 1) // (count - 1)] for index in range(count)]


def engine_steps(chats: EngineChats, names: list[str], steps: int) -> list[float]:
    """Return the milliseconds of steps in which every chat gets one token and no other work runs."""
    for name in names:
        chats.ask(name, "and", steps + 2)
    while any(not chats.turns[name][-1].token_times for name in names):
        chats.step()  # the questions; some chats may have their second token when the last one gets its first
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        chats.step()
        times.append((time.perf_counter() - began) * 1e3)
    chats.run()
    return times[: min(len(chats.turns[name][-1].token_times) for name in names) - 1]


def separate_steps(reference: Reference, caches: list, steps: int) -> list[float]:
    """Return the milliseconds of rounds of one forward per cache. The caches are cropped to their old length."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        decode_separately(reference, caches, token=5)
        times.append((time.perf_counter() - began) * 1e3)
    for cache in caches:
        cache.crop(-steps)
    return times


def measure(options: Options, run: Run) -> tuple[dict[int, dict], int, int, float]:
    """Return `{chats: {"engine": [...], "separate": [...], "bandwidth": [...], "kv_tokens": n}}` and three numbers.

    They are the bytes of the weights, the bytes of a token's KV, and the bytes per second that the linears read with
    one row. `engine` has a list of steps for each reading of the bandwidth.
    """
    reference = Reference(options.checkpoint, options.dtype, options.device)
    chats = load_engine(options)
    linears = Linears(reference)
    run.say("filling the caches")
    lengths = contexts(options, chats)
    taken = {
        count: {
            "engine": [],
            "separate": [],
            "bandwidth": [],
            "kv_tokens": sum(lengths[name] for name in chosen(list(lengths), count)),
        }
        for count in options.extra.sessions
    }
    caches = dict(zip(lengths, random_caches(reference, list(lengths.values())), strict=True))
    steps, rounds_of_forwards = options.pick((12, 3), (3, 1))
    for number in range(options.rounds):
        run.say(f"round {number + 1} of {options.rounds}")
        for count, times in taken.items():
            names = chosen(list(lengths), count)
            before = run.bandwidth.measure(2)
            times["engine"].append(engine_steps(chats, names, steps))
            times["bandwidth"].append(max(before, run.bandwidth.measure(2)))
            linears.measure_row(1)
            separate = separate_steps(reference, [caches[name] for name in names], rounds_of_forwards)
            times["separate"] += separate[1:] or separate  # the first one grows the caches' memory
    token_bytes = chats.engine.model.kv_shape.token_bytes
    return taken, linears.weight_bytes, token_bytes, linears.row_bytes_s


def report(
    options: Options, run: Run, taken: dict[int, dict], weight_bytes: int, token_bytes: int, row_bytes_s: float
) -> Result:
    """Return the table and the ratios that `bar.py` reads."""
    columns = [
        "chats",
        "KV tokens",
        "step ms",
        "tokens/s",
        "share of bound",
        "by the best",
        "separate ms",
        "times faster",
    ]
    result = Result(columns)
    for count, times in taken.items():
        read_bytes = weight_bytes + times["kv_tokens"] * token_bytes
        steps = [step for block in times["engine"] for step in block]
        shares = [
            read_bytes / bytes_s * 1e3 / median(block)
            for block, bytes_s in zip(times["engine"], times["bandwidth"], strict=True)
        ]
        step_ms = median(steps)
        separate_ms = median(times["separate"])
        by_the_best = read_bytes / run.bandwidth.read_bytes_s * 1e3 / step_ms
        result.rows.append(
            {
                "chats": count,
                "KV tokens": times["kv_tokens"],
                "step ms": spread(steps),
                "tokens/s": count * 1e3 / step_ms,
                "share of bound": median(shares),
                "by the best": by_the_best,
                "separate ms": spread(times["separate"]),
                "times faster": separate_ms / step_ms,
            }
        )
        result.ratios[f"share of the bandwidth bound, {count} chats"] = median(shares)
        result.ratios[f"the same by the best reading of the run, {count} chats"] = by_the_best
        result.ratios[f"tokens/s at {count}, engine / separate forwards"] = separate_ms / step_ms
    result.ratios["bandwidth of the linears alone with one row / read bandwidth"] = (
        row_bytes_s / run.bandwidth.read_bytes_s
    )
    result.settings = {"weight_bytes": weight_bytes, "kv_bytes_per_token": token_bytes}
    result.samples = {str(count): times for count, times in taken.items()}
    result.notes = [
        "Times are medians [best]; each block of steps against the bandwidth read just before and after it."
    ]
    return result


def paint(axes, result: Result) -> None:
    """Draw tokens per second over the number of chats: engine, separate forwards, bound."""
    counts = [row["chats"] for row in result.rows]
    lines = {
        "bandwidth bound": (
            [row["tokens/s"] / row["share of bound"] for row in result.rows],
            "tab:gray",
            "--",
        ),
        "engine": ([row["tokens/s"] for row in result.rows], "black", "-"),
        "separate forwards": ([row["tokens/s"] / row["times faster"] for row in result.rows], "tab:blue", "-"),
    }
    for label, (values, colour, style) in lines.items():
        axes.plot(counts, values, marker="o", color=colour, linestyle=style, label=label)
    axes.set(xlabel="chats", ylabel="tokens a second", title="Decoding, 700 to 1,200 tokens of context")
    axes.set_xticks(counts)
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = harness.parse("decode", __doc__, argv, rounds=4, more=_arguments)
    run = Run(options)
    return run.finish(report(options, run, *measure(options, run)), paint)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 8, 16], help="how many chats at once")


if __name__ == "__main__":
    main()
