"""Eight chats of five turns at once, closed loop: each chat asks its next question as soon as it has its answer.

Measures tokens per second over the whole run, including openings, and the time to the first token (TTFT) of turn 1,
which includes the picture, and of the later turns. The engine is compared with the same chats served one question at a
time, first come, first served: by `generate` with each chat's KV cache kept, and by the engine itself.

The limit of the ratio on this machine is the time of the linears of encoding and prefill alone, at the rate measured in
the same run. An engine with free attention and free decoding would not be faster.
"""

from __future__ import annotations

import argparse
import time
from collections import deque

from . import harness
from .driver import EngineChats, Pictures, Prompts, TurnTimes, load_engine, prepare
from .harness import Options, Result, Run, median, percentile, spread
from .limits import Linears, picture_flops, token_flops
from .reference import Chat, KeptKV, Reference

ENGINE = "engine"
ENGINE_SERIAL = "engine, one at a time"
KEPT = "KV kept, one at a time"
Load = list[tuple[bytes, list[str]]]  # a chat: its picture and its questions


def make_load(options: Options, pictures: Pictures, prompts: Prompts) -> Load:
    """Return new pictures and questions for every chat."""
    words = max(options.extra.prompt_tokens - 8, 1)
    return [
        (pictures.jpeg(), [prompts.words(words) for _ in range(options.extra.turns)])
        for _ in range(options.extra.sessions)
    ]


def in_parallel(chats: EngineChats, load: Load, answer_tokens: int) -> list[list[TurnTimes]]:
    """Run all chats at once. A first question follows its opening immediately, so its TTFT includes the picture."""
    questions = {f"chat{number}": deque(texts) for number, (_, texts) in enumerate(load)}
    for name, (jpeg, _) in zip(questions, load, strict=True):
        asked_at = time.perf_counter()
        chats.open(name, prepare(chats.tokens, jpeg))
        chats.ask(name, questions[name].popleft(), answer_tokens)
        chats.turns[name][-1].asked_at = asked_at
    while chats.engine.has_work:
        for name in chats.step():
            if questions[name]:
                chats.ask(name, questions[name].popleft(), answer_tokens)
    return [chats.turns[name] for name in questions]


def engine_one_at_a_time(chats: EngineChats, load: Load, answer_tokens: int) -> list[list[TurnTimes]]:
    """Give the engine one question at a time."""

    def open_and_ask(number: int, asked_at: float, turn: int) -> TurnTimes:
        name = f"chat{number}"
        (jpeg, texts) = load[number]
        if turn == 0:
            chats.open(name, prepare(chats.tokens, jpeg))
        answer = chats.answer(name, texts[turn], answer_tokens)
        answer.asked_at = asked_at
        return answer

    return _first_come_first_served(load, open_and_ask)


def one_at_a_time(
    reference: Reference, load: Load, answer_tokens: int, kind: type[Chat] = KeptKV
) -> list[list[TurnTimes]]:
    """Run `generate` for one question at a time. `kind` keeps a KV cache for each chat, or less."""
    chats = [kind(reference) for _ in load]

    def open_and_ask(number: int, asked_at: float, turn: int) -> TurnTimes:
        jpeg, texts = load[number]
        if turn == 0:
            chats[number].open(jpeg)
        return chats[number].answer(texts[turn], answer_tokens, asked_at)

    return _first_come_first_served(load, open_and_ask)


def _first_come_first_served(load: Load, serve) -> list[list[TurnTimes]]:
    """Serve one question at a time. Every chat asks at the start, and again when it has its answer.

    `serve(chat, asked_at, turn)` runs one turn.
    """
    taken: list[list[TurnTimes]] = [[] for _ in load]
    began = time.perf_counter()
    queue = deque((number, began) for number in range(len(load)))
    while queue:
        number, asked_at = queue.popleft()
        taken[number].append(serve(number, asked_at, len(taken[number])))
        if len(taken[number]) < len(load[number][1]):
            queue.append((number, time.perf_counter()))
    return taken


def measure(options: Options, run: Run) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Return the figures of every round by side, and a lower bound of a round's seconds: its arithmetic."""
    reference = Reference(options.checkpoint, options.dtype, options.device)
    chats = load_engine(options)
    linears = Linears(reference)
    tokens = options.extra.answer_tokens
    sides = [
        (ENGINE, lambda load: in_parallel(chats, load, tokens)),
        (KEPT, lambda load: one_at_a_time(reference, load, tokens)),
        (ENGINE_SERIAL, lambda load: engine_one_at_a_time(chats, load, tokens)),
    ]
    pictures = Pictures(options.seed)
    prompts = Prompts(options.seed)
    for _, serve in sides:  # unmeasured
        serve([(pictures.jpeg(), [prompts.words(4)])])
        chats.close_all()
    taken = {
        label: {"tokens_s": [], "ttft_1_ms": [], "ttft_later_ms": [], "tpot_ms": [], "later_tokens_s": []}
        for label, _ in sides
    }
    for number in range(options.rounds):
        load = make_load(options, pictures, prompts)
        for label, serve in harness.alternate(sides, number):
            began = time.perf_counter()
            turns = serve(load)
            seconds = time.perf_counter() - began
            if label == ENGINE:
                answers = sum(len(turn.answer_ids) for chat in turns for turn in chat)
                rows = sum(len(conversation.token_ids) for conversation in chats.conversations.values()) - answers
            chats.close_all()
            note(taken[label], turns, seconds)
            linears.measure_rows()
            run.say(f"round {number + 1} of {options.rounds}: {label}: {taken[label]['tokens_s'][-1]:.1f} tokens/s")
    flops = len(load) * picture_flops(reference) + rows * token_flops(reference)
    return taken, flops / linears.flops_s


def note(figures: dict[str, list[float]], chats: list[list[TurnTimes]], seconds: float) -> None:
    """Append the figures of one round."""
    turns = [turn for chat in chats for turn in chat]
    figures["tokens_s"].append(sum(len(turn.answer_ids) for turn in turns) / seconds)
    figures["later_tokens_s"].append(later_rate(chats))
    figures["ttft_1_ms"] += [chat[0].ttft_ms for chat in chats]
    figures["ttft_later_ms"] += [turn.ttft_ms for chat in chats for turn in chat[1:]]
    figures["tpot_ms"] += [turn.tpot_ms for turn in turns]


def later_rate(chats: list[list[TurnTimes]]) -> float:
    """Return tokens per second after every chat has its first answer, which excludes the pictures."""
    since = max(chat[0].token_times[-1] for chat in chats)
    times = [at for chat in chats for turn in chat for at in turn.token_times if at > since]
    return len(times) / (max(times) - since) if times else float("nan")


def report(options: Options, taken: dict[str, dict], least_seconds: float) -> Result:
    """Return the table and the ratios that `bar.py` reads."""
    result = Result(
        ["side", "tokens/s", "tokens/s later", "TTFT turn 1 ms", "TTFT later ms", "p99 later ms", "per token ms"],
        samples=taken,
    )
    for label, figures in taken.items():
        result.rows.append(
            {
                "side": label,
                "tokens/s": median(figures["tokens_s"]),
                "tokens/s later": median(figures["later_tokens_s"]),
                "TTFT turn 1 ms": spread(figures["ttft_1_ms"]),
                "TTFT later ms": spread(figures["ttft_later_ms"]),
                "p99 later ms": percentile(figures["ttft_later_ms"], 0.99),
                "per token ms": spread(figures["tpot_ms"]),
            }
        )
    for label in (KEPT, ENGINE_SERIAL):
        ratio = median(taken[ENGINE]["tokens_s"]) / median(taken[label]["tokens_s"])
        result.ratios[f"tokens/s, engine / {label}"] = ratio
        later = median(taken[ENGINE]["later_tokens_s"]) / median(taken[label]["later_tokens_s"])
        result.ratios[f"tokens/s after every first answer, engine / {label}"] = later
    answered = options.extra.sessions * options.extra.turns * options.extra.answer_tokens
    limit = answered / least_seconds / median(taken[KEPT]["tokens_s"])
    result.ratios[f"limit of tokens/s by pictures and prompts alone / {KEPT}"] = limit
    names = ("sessions", "turns", "prompt_tokens", "answer_tokens")
    result.settings = {name: getattr(options.extra, name) for name in names}
    result.settings["least_seconds_of_pictures_and_prompts"] = least_seconds
    result.notes = [
        "tokens/s: median of the rounds, pictures included; later: from when every chat has its first answer.",
        "Times: median [best], waiting for others included.",
    ]
    return result


def paint(axes, result: Result) -> None:
    """Draw tokens per second, one bar per side."""
    labels = list(result.samples)
    values = [median(result.samples[label]["tokens_s"]) for label in labels]
    bars = axes.bar(labels, values, color=["black", "tab:blue", "tab:gray"], width=0.5)
    axes.bar_label(bars, fmt="%.1f")
    settings = result.settings
    axes.set(
        ylabel="answer tokens a second", title=f"{settings['sessions']} chats of {settings['turns']} turns, closed loop"
    )


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = harness.parse("chats", __doc__, argv, rounds=3, more=_arguments)
    run = Run(options)
    return run.finish(report(options, *measure(options, run)), paint)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=30)
    parser.add_argument("--answer-tokens", type=int, default=16)


if __name__ == "__main__":
    main()
