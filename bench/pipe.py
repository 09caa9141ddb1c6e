"""What the engine costs in a process of its own: the same chats over its pipe and in-process, blocks alternating.

The same checkpoint is loaded twice: once here, stepped by the caller, and once in an engine process behind the
supervisor that the handler uses. Decode: 8 chats get 32 tokens at once. TTFT: a question of 30 tokens to one chat; what
is timed ends when the token's text is in the caller's hands.
"""

from __future__ import annotations

import queue

from llava_sessions.ipc.messages import (
    AskSession,
    Command,
    EngineSettings,
    Event,
    Finished,
    OpenFailed,
    OpenSession,
    OutOfCapacity,
    Prefilled,
    TurnFailed,
)
from llava_sessions.worker.engines import EngineLost, EngineSupervisor

from . import harness
from .driver import EngineChats, Pictures, Prompts, load_engine, prepare
from .harness import Options, Result, Run, median, spread

# What ends the work that a command began.
_ENDS = (Prefilled, OpenFailed, Finished, TurnFailed, OutOfCapacity)


class PipedEngine:
    """An engine process with the face of an `Engine`: commands go over the pipe, a step waits for the next report."""

    def __init__(self, options: Options) -> None:
        dtype = str(options.dtype).removeprefix("torch.")
        settings = EngineSettings(str(options.checkpoint), "", dtype, str(options.device), prefill_chunk_tokens=256)
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._supervisor = EngineSupervisor(settings, self._inbox, hang_s=600, give_up=lambda: None)
        self._door = self._supervisor.start().door
        self._running = 0

    @property
    def has_work(self) -> bool:
        """Whether anything is still to be told."""
        return self._running > 0

    def apply(self, command: Command) -> None:
        """Send a command."""
        self._running += isinstance(command, OpenSession | AskSession)
        self._door.submit(command)

    def step(self) -> list[Event]:
        """The next report's events."""
        report = self._inbox.get()
        if isinstance(report, EngineLost):
            raise RuntimeError(f"a bench must not lose its engine: {report.reason}")
        self._running -= sum(isinstance(event, _ENDS) for event in report.events)
        return report.events

    def stop(self) -> None:
        """End the process."""
        self._supervisor.stop()


def measure(options: Options, run: Run) -> dict[str, dict[str, list[float]]]:
    """`{side: {"ttft_ms": [...], "tokens_s": [...]}}`."""
    inside = load_engine(options)
    piped = PipedEngine(options)
    sides = {"in-process": inside, "over the pipe": EngineChats(piped, inside.tokens)}
    taken = {name: {"ttft_ms": [], "tokens_s": []} for name in sides}
    names = [f"chat{number}" for number in range(options.pick(8, 2))]
    pictures, prompts = Pictures(options.seed), Prompts(options.seed)
    jpegs = [pictures.jpeg() for _ in names]
    for side, chats in sides.items():
        run.say(f"opening {len(names)} chats {side}")
        for name, jpeg in zip(names, jpegs, strict=True):
            chats.open(name, prepare(chats.tokens, jpeg))
        chats.run()
    for number in range(options.rounds):
        run.say(f"round {number + 1} of {options.rounds}")
        for side in harness.alternate(list(sides), number):
            chats, times = sides[side], taken[side]
            for name in names[: options.pick(3, 1)]:
                times["ttft_ms"].append(chats.answer(name, prompts.words(30), 2).ttft_ms)
            times["tokens_s"].append(_decode(chats, names, prompts.words(4), options.pick(32, 4)))
        run.bandwidth.measure(1)
    piped.stop()
    return taken


def _decode(chats: EngineChats, names: list[str], words: str, tokens: int) -> float:
    """Tokens a second of all chats together, from the first one in which all of them answer to the first that ends."""
    for name in names:
        chats.ask(name, words, tokens)
    chats.run()
    turns = [chats.turns[name][-1] for name in names]
    began, ended = max(turn.token_times[0] for turn in turns), min(turn.token_times[-1] for turn in turns)
    made = sum(began < at <= ended for turn in turns for at in turn.token_times)
    return made / (ended - began)


def report(taken: dict[str, dict[str, list[float]]]) -> Result:
    """The table, and the two figures of the bar: at most 5 % of decode throughput and 5 ms of TTFT."""
    result = Result(["side", "TTFT ms", "decode tokens/s"])
    for side, times in taken.items():
        row = {"side": side, "TTFT ms": spread(times["ttft_ms"]), "decode tokens/s": median(times["tokens_s"])}
        result.rows.append(row)
    inside, piped = taken["in-process"], taken["over the pipe"]
    pairs = zip(piped["tokens_s"], inside["tokens_s"], strict=True)
    result.ratios = {
        "decode tokens/s, over the pipe / in-process": median(a / b for a, b in pairs),
        "TTFT that the pipe adds, ms": median(piped["ttft_ms"]) - median(inside["ttft_ms"]),
    }
    result.samples = taken
    result.notes = ["The ratio is the median over rounds of both sides' throughput in the same round."]
    return result


def paint(axes, result: Result) -> None:
    """Throughput of each round, both sides."""
    for side, colour in (("in-process", "tab:blue"), ("over the pipe", "black")):
        axes.plot(result.samples[side]["tokens_s"], marker="o", color=colour, label=side)
    axes.set(xlabel="round", ylabel="tokens a second, 8 chats", title="The engine in a process of its own")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> Result:
    """Entry point."""
    options = harness.parse("pipe", __doc__, argv, rounds=8)
    run = Run(options)
    return run.finish(report(measure(options, run)), paint)


if __name__ == "__main__":
    main()
