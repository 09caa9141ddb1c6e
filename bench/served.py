"""Cost of the way through HAProxy and TorchServe: the same answers served and in process, in one run.

Starts the whole service (`python -m deploy.serve`) with a random-weight model. With `--old CHECKOUT` the service of
another checkout is measured too, in alternating order. A round, on each side:

- 1, 8 and 32 streams at once: time per token, tokens/s, and for a service the CPU time and the context switches of its
  processes for each token.
- A follow-up question to an idle server, next to a running stream, and next to a running answer that is not streamed:
  time to first token.
- A question to an unknown session, whose rejection runs no model: alone, next to the same two answers, and while
  another session is being opened. This is the delay of a new request on its way to the worker.
- An idle service: context switches per second.
"""

from __future__ import annotations

import argparse
import random
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import harness
from .driver import EngineChats, Pictures, Prompts, load_engine, prepare
from .harness import Options, Result, Run, median
from .processes import ALL, ENGINE, HAPROXY, JAVA, PARTS, WORKER, Meter, Usage, own_cpu_s
from .route import ROOT, service
from .streams import Answer, Client

IN_PROCESS = "in process"
# Streams at once, and the tokens of each.
STREAMS = {1: 96, 8: 64, 32: 32}
SMOKE_STREAMS = {1: 8, 2: 8}
FRONT = (JAVA, WORKER, HAPROXY)
IDLE_S = 3.0
ALONE, STREAM, WHOLE, OPEN = "alone", "next to a stream", "next to a whole answer", "next to an opening"
LONG_TOKENS = 24  # of the answer that runs next to a question
QUESTION = {"type": "send_text_prompt", "ignore_eos": True}


@dataclass
class Side:
    """What was measured on one side. `streams`: `{count: {figure: [value of each round]}}`."""

    streams: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    ttft_ms: dict[str, list[float]] = field(default_factory=dict)
    reject_ms: dict[str, list[float]] = field(default_factory=dict)
    idle: dict[str, list[float]] = field(default_factory=dict)

    def note(self, table: dict, key: object, values: dict[str, float]) -> None:
        """Add one value to each figure of a table."""
        for name, value in values.items():
            table.setdefault(key, {}).setdefault(name, []).append(round(value, 4))


# --- rates ------------------------------------------------------------------------------------------------------------


def rates(times: list[list[float]]) -> dict[str, float]:
    """Return the time per token, and the tokens per second while all streams run, from the times of their tokens."""
    began = max(each[0] for each in times)
    ended = min(each[-1] for each in times)
    made = sum(began < at <= ended for each in times for at in each)
    per_token = median((each[-1] - each[0]) / max(len(each) - 1, 1) * 1e3 for each in times)
    return {"ms/token": per_token, "tokens/s": made / max(ended - began, 1e-9)}


class Window:
    """Readings at the first tokens of all streams and at the end of the first stream."""

    def __init__(self, read: Callable[[], object], tokens: int) -> None:
        self._read = read
        self._tokens = tokens
        self._made = 0
        self.first: object = None
        self.last: object = None
        self.made = 0

    def observe(self, counts: list[int]) -> None:
        """Take the numbers of tokens that each stream has."""
        if self.first is None and min(counts) > 0:
            self.first = self._read()
            self._made = sum(counts)
        elif self.first is not None and self.last is None and max(counts) >= self._tokens:
            self.last = self._read()
            self.made = sum(counts) - self._made


# --- in process -------------------------------------------------------------------------------------------------------


def engine_streams(chats: EngineChats, names: list[str], words: str, tokens: int) -> dict[str, float]:
    """Run one answer in each chat at once."""
    window = Window(own_cpu_s, tokens)
    for name in names:
        chats.ask(name, words, tokens)
    while chats.engine.has_work:
        chats.step()
        window.observe([len(chats.turns[name][-1].token_times) for name in names])
    figures = rates([chats.turns[name][-1].token_times for name in names])
    return {**figures, "engine ms": (window.last - window.first) / max(window.made, 1) * 1e3}


def measure_engine(options: Options, chats: EngineChats, names: list[str], side: Side) -> None:
    """Measure one round in process."""
    prompts = Prompts(options.seed)
    engine_streams(chats, names[:1], prompts.words(4), 8)  # warms up
    for count, tokens in counts_of(options).items():
        side.note(side.streams, count, engine_streams(chats, names[:count], prompts.words(4), tokens))
    for _ in range(options.pick(6, 2)):
        side.ttft_ms.setdefault(ALONE, []).append(chats.answer(names[0], prompts.words(24), 2).ttft_ms)


def counts_of(options: Options) -> dict[int, int]:
    """Return the numbers of streams, and the tokens of each stream."""
    return options.pick(STREAMS, SMOKE_STREAMS)


# --- served -----------------------------------------------------------------------------------------------------------


def served_streams(client: Client, meter: Meter, sessions: list[str], words: str, tokens: int) -> dict[str, float]:
    """Stream one answer in each session at once."""
    window = Window(meter.read, tokens)
    asked = {**QUESTION, "prompt_text": words, "max_new_tokens": tokens}
    answers = client.stream(sessions, asked, lambda each: window.observe([len(one.times) for one in each]))
    if any(len(answer.times) != tokens for answer in answers):
        raise RuntimeError(f"an answer has not {tokens} tokens: {bytes(answers[0].received[-500:])!r}")
    return {**rates([answer.times for answer in answers]), **_per_token(window)}


def _per_token(window: Window) -> dict[str, float]:
    """Return CPU milliseconds and context switches per token, by part."""
    if not isinstance(window.first, Usage) or not isinstance(window.last, Usage):
        raise RuntimeError("the streams did not run at the same time")
    used = window.last - window.first
    cpu = {f"{part} ms": used.cpu_s.get(part, 0.0) / window.made * 1e3 for part in PARTS}
    switches = {f"{part} switches": used.switches.get(part, 0) / window.made for part in (*PARTS, ALL)}
    return {**cpu, **switches}


class Neighbour:
    """A request that runs in a thread while others are measured."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._thread = threading.Thread(target=run)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


def measure_service(options: Options, url: str, side: Side) -> None:
    """Measure one round of a service that has just started."""
    client = Client(url)
    meter = Meter()
    prompts = Prompts(options.seed)
    pictures = Pictures(options.seed)
    jpeg = pictures.jpeg()
    counts = counts_of(options)
    sessions = [client.open(jpeg) for _ in range(max(counts))]
    for _ in range(options.pick(2, 1)):  # warms up, Java's compiler too
        served_streams(client, meter, sessions[:8], prompts.words(4), options.pick(40, 8))
    for count, tokens in counts.items():
        side.note(side.streams, count, served_streams(client, meter, sessions[:count], prompts.words(4), tokens))
    for _ in range(options.pick(6, 1)):
        measure_latency(client, sessions, prompts, pictures.jpeg(), side)
    before = meter.read()
    time.sleep(options.pick(IDLE_S, 0.5))
    used = meter.read() - before
    for part in (JAVA, WORKER, ENGINE):
        side.idle.setdefault(f"{part} switches/s", []).append(used.switches[part] / used.wall_s)
        side.idle.setdefault(f"{part} CPU ms/s", []).append(used.cpu_s[part] * 1e3 / used.wall_s)


def measure_latency(client: Client, sessions: list[str], prompts: Prompts, jpeg: bytes, side: Side) -> None:
    """Measure a question and a rejection, alone and next to other requests."""
    shift = random.Random(prompts.words(1))
    answering = {**QUESTION, "prompt_text": prompts.words(8), "max_new_tokens": LONG_TOKENS}
    opened: list[str] = []
    neighbours: dict[str, Callable[[], object]] = {
        ALONE: lambda: None,
        STREAM: lambda: client.stream(sessions[1:2], answering),
        WHOLE: lambda: client.whole(answering, sessions[1]),
        OPEN: lambda: opened.append(client.open(jpeg)),
    }
    for kind, run in neighbours.items():
        with Neighbour(run):
            time.sleep(0.15 + 0.05 * shift.random())
            side.reject_ms.setdefault(kind, []).append(_reject_ms(client))
            if kind != OPEN:
                time.sleep(0.05 * shift.random())
                asked = {**QUESTION, "prompt_text": prompts.words(24), "max_new_tokens": 2}
                (answer,) = client.stream(sessions[:1], asked)
                side.ttft_ms.setdefault(kind, []).append(answer.ttft_ms)
        time.sleep(0.3)
    client.close(opened[0])


def _reject_ms(client: Client) -> float:
    """Return the time from a question to an unknown session to its rejection."""
    answer: Answer = client.whole({**QUESTION, "prompt_text": "none"}, f"no-such-session-{secrets.token_hex(8)}")
    if answer.status != 404:
        raise RuntimeError(f"an unknown session got status {answer.status}")
    return (time.perf_counter() - answer.asked_at) * 1e3


# --- the run ----------------------------------------------------------------------------------------------------------


def measure(options: Options, run: Run, checkouts: dict[str, Path]) -> dict[str, Side]:
    """Measure all sides in alternating order."""
    sides = {name: Side() for name in (IN_PROCESS, *checkouts)}
    chats = load_engine(options)
    opening = prepare(chats.tokens, Pictures(options.seed).jpeg())
    names = [f"chat{number}" for number in range(max(counts_of(options)))]
    dtype = str(options.dtype).removeprefix("torch.")
    for number in range(options.rounds):
        for name in harness.alternate(list(sides), number):
            side = sides[name]
            if name == IN_PROCESS:
                for each in names:
                    chats.open(each, opening)
                    chats.run()
                measure_engine(options, chats, names, side)
                chats.close_all()
            else:
                with service(checkouts[name], options.checkpoint, dtype) as (_, url):
                    measure_service(options, url, side)
            made = {count: {key: values[-1] for key, values in each.items()} for count, each in side.streams.items()}
            run.say(f"round {number + 1} of {options.rounds}, {name}: {made}")
        run.bandwidth.measure(1)
    return sides


def report(sides: dict[str, Side]) -> Result:
    """Return the table of streams, and the ratios of each service to the engine in process."""
    columns = ["side", "streams", "ms/token", "tokens/s", *(f"{part} ms" for part in PARTS)]
    columns += [f"{part} switches" for part in (JAVA, WORKER, ENGINE, ALL)]
    result = Result(columns)
    inside = sides[IN_PROCESS]
    for name, side in sides.items():
        for count, figures in side.streams.items():
            row = {key: median(values) for key, values in figures.items()}
            result.rows.append({"side": name, "streams": count, **row})
            if name == IN_PROCESS:
                continue
            base = inside.streams[count]
            for figure in ("ms/token", "tokens/s"):
                pairs = zip(figures[figure], base[figure], strict=True)
                result.ratios[f"{name} / in process: {figure}, {count} streams"] = median(a / b for a, b in pairs)
            front = sum(median(figures[f"{part} ms"]) for part in FRONT)
            result.ratios[f"{name}: CPU of java, worker and HAProxy, ms/token, {count} streams"] = front
            more = median(figures["engine ms"]) - median(base["engine ms"])
            result.ratios[f"{name}: CPU of the engine beyond in process, ms/token, {count} streams"] = more
        for what, table in (("TTFT", side.ttft_ms), ("rejection", side.reject_ms)):
            for kind, values in table.items():
                result.ratios[f"{name}: {what} {kind}, ms"] = median(values)
                result.ratios[f"{name}: {what} {kind}, ms, longest"] = max(values)
        for what, values in side.idle.items():
            result.ratios[f"{name}: idle {what}"] = median(values)
        result.samples[name] = vars(side)
    result.notes = ["CPU ms and context switches are per token, from the first tokens of all streams to the first end."]
    return result


def paint(axes, result: Result) -> None:
    """Draw the CPU time per token of each part, by side and number of streams."""
    rows = [row for row in result.rows if row["side"] != IN_PROCESS]
    labels = [f"{row['side']}\n{row['streams']} streams" for row in rows]
    bottom = [0.0] * len(rows)
    for part in (JAVA, WORKER, HAPROXY):
        heights = [row[f"{part} ms"] for row in rows]
        axes.bar(labels, heights, bottom=bottom, label=part, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set(ylabel="CPU ms per token", title="What the way through TorchServe costs")
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--old", type=Path, help="another checkout to measure in the same run")

    options = harness.parse("served", __doc__, argv, rounds=3, more=more)
    if options.preset == "tiny" and not options.smoke:
        options.name = "served-tiny"
    old = options.extra.old
    checkouts = ({} if old is None else {"old": old.resolve()}) | {"new": ROOT}
    run = Run(options)
    return run.finish(report(measure(options, run, checkouts)), paint)


if __name__ == "__main__":
    main()
