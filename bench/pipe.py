"""Overhead of the engine process: the same chats through its pipe and in this process, blocks alternating.

The checkpoint is loaded twice: in this process, stepped by the caller, and in an engine process behind the handler's
supervisor. Decode: 8 chats generate 32 tokens each, in parallel. TTFT: a question of 30 tokens to one chat, until the
caller has the first token's text.
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

# Events that end the work of a command.
_ENDS = (Prefilled, OpenFailed, Finished, TurnFailed, OutOfCapacity)


class PipedEngine:
    """An engine process with the interface of `Engine`: commands go through the pipe, a step waits for a report."""

    def __init__(self, options: Options) -> None:
        dtype = str(options.dtype).removeprefix("torch.")
        settings = EngineSettings(str(options.checkpoint), "", dtype, str(options.device), prefill_chunk_tokens=256)
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._supervisor = EngineSupervisor(settings, self._inbox, hang_s=600, give_up=lambda: None)
        self._door = self._supervisor.start().client
        self._running = 0

    @property
    def has_work(self) -> bool:
        """Whether a command's last event is still outstanding."""
        return self._running > 0

    def apply(self, command: Command) -> None:
        """Send a command."""
        self._running += isinstance(command, OpenSession | AskSession)
        self._door.submit(command)

    def step(self) -> list[Event]:
        """Return the events of the next report."""
        report = self._inbox.get()
        if isinstance(report, EngineLost):
            raise RuntimeError(f"the benchmark lost its engine: {report.reason}")
        self._running -= sum(isinstance(event, _ENDS) for event in report.events)
        return report.events

    def stop(self) -> None:
        """Stop the process."""
        self._supervisor.stop()


def measure(options: Options, run: Run) -> dict[str, dict[str, list[float]]]:
    """Return `{side: {"ttft_ms": [...], "tokens_s": [...]}}`."""
    inside = load_engine(options)
    piped = PipedEngine(options)
    sides = {"in-process": inside, "over the pipe": EngineChats(piped, inside.tokens)}
    taken = {name: {"ttft_ms": [], "tokens_s": []} for name in sides}
    names = [f"chat{number}" for number in range(options.pick(8, 2))]
    pictures = Pictures(options.seed)
    prompts = Prompts(options.seed)
    jpegs = [pictures.jpeg() for _ in names]
    for side, chats in sides.items():
        run.say(f"opening {len(names)} chats {side}")
        for name, jpeg in zip(names, jpegs, strict=True):
            chats.open(name, prepare(chats.tokens, jpeg))
        chats.run()
    for number in range(options.rounds):
        run.say(f"round {number + 1} of {options.rounds}")
        for side in harness.alternate(list(sides), number):
            chats = sides[side]
            times = taken[side]
            for name in names[: options.pick(3, 1)]:
                times["ttft_ms"].append(chats.answer(name, prompts.words(30), 2).ttft_ms)
            times["tokens_s"].append(_decode(chats, names, prompts.words(4), options.pick(32, 4)))
        run.bandwidth.measure(1)
    piped.stop()
    return taken


def _decode(chats: EngineChats, names: list[str], words: str, tokens: int) -> float:
    """Return tokens per second of all chats, from when all of them are answering until the first one finishes."""
    for name in names:
        chats.ask(name, words, tokens)
    chats.run()
    turns = [chats.turns[name][-1] for name in names]
    began = max(turn.token_times[0] for turn in turns)
    ended = min(turn.token_times[-1] for turn in turns)
    made = sum(began < at <= ended for turn in turns for at in turn.token_times)
    return made / (ended - began)


def report(taken: dict[str, dict[str, list[float]]]) -> Result:
    """Return the table and the two overheads: of decode throughput, and of TTFT."""
    result = Result(["side", "TTFT ms", "decode tokens/s"])
    for side, times in taken.items():
        row = {"side": side, "TTFT ms": spread(times["ttft_ms"]), "decode tokens/s": median(times["tokens_s"])}
        result.rows.append(row)
    inside = taken["in-process"]
    piped = taken["over the pipe"]
    pairs = zip(piped["tokens_s"], inside["tokens_s"], strict=True)
    result.ratios = {
        "decode tokens/s, over the pipe / in-process": median(a / b for a, b in pairs),
        "TTFT that the pipe adds, ms": median(piped["ttft_ms"]) - median(inside["ttft_ms"]),
    }
    result.samples = taken
    result.notes = ["The ratio is the median over rounds of both sides' throughput in the same round."]
    return result


def paint(axes, result: Result) -> None:
    """Draw the throughput of each round, both sides."""
    for side, colour in (("in-process", "tab:blue"), ("over the pipe", "black")):
        axes.plot(result.samples[side]["tokens_s"], marker="o", color=colour, label=side)
    axes.set(xlabel="round", ylabel="tokens a second, 8 chats", title="The engine in a process of its own")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = harness.parse("pipe", __doc__, argv, rounds=8)
    run = Run(options)
    return run.finish(report(measure(options, run)), paint)


if __name__ == "__main__":
    main()
