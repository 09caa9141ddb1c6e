"""Python time of a decode step: the engine with a model of zero layers, for 1, 16 and 64 sessions.

The model has embeddings, rotary tables, last norm and head of the tiny preset, and no decoder layers. A step is what
the engine's loop does: plan, forward, draw, detokenize, and encode the report for the worker. The text of a step's
tokens is computed at once, as on a CPU, or during the next forward, as on CUDA; blocks of steps of both alternate.
Between the draw of a step and the next forward a GPU has nothing to do.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any

import torch

from llava_sessions.engine import engine as engine_module
from llava_sessions.ipc.messages import Report, StopTurn

from . import harness
from .driver import EngineChats, Pictures, Prompts, load_engine, prepare
from .harness import Options, Result, Run, median, spread

SESSIONS = (1, 16, 64)
AT_ONCE, DEFERRED = "at once", "during the next forward"
STEP, FORWARD, BETWEEN = "step", "forward", "between"


class Clock:
    """Times of forwards and draws."""

    def __init__(self) -> None:
        self.forward_ms: list[float] = []
        self.between_ms: list[float] = []
        self._drawn_at: float | None = None

    def forward(self, call: Callable) -> Callable:
        """Return `Model.forward` with its time noted."""

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            if self._drawn_at is not None:
                self.between_ms.append((began - self._drawn_at) * 1e3)
            result = call(*args)
            self.forward_ms.append((time.perf_counter() - began) * 1e3)
            return result

        return timed

    def draw(self, call: Callable) -> Callable:
        """Return `next_tokens` with the time of its end noted."""

        def timed(*args: Any) -> Any:
            result = call(*args)
            self._drawn_at = time.perf_counter()
            return result

        return timed

    def restart(self) -> None:
        """Forget all times."""
        self.forward_ms.clear()
        self.between_ms.clear()
        self._drawn_at = None


def open_chats(options: Options, most: int) -> tuple[EngineChats, Clock]:
    """Return a timed engine without decoder layers, with `most` chats that show one picture."""
    chats = load_engine(options)
    chats.engine.model.text.layers = torch.nn.ModuleList()
    opening = prepare(chats.tokens, Pictures(options.seed).jpeg())
    for number in range(most):
        chats.open(f"chat{number:04d}", opening)
    chats.run()
    clock = Clock()
    chats.engine.model.forward = clock.forward(chats.engine.model.forward)
    engine_module.next_tokens = clock.draw(engine_module.next_tokens)
    return chats, clock


def step(chats: EngineChats) -> None:
    """Run one step and encode its reports, as the engine's loop does."""
    for events in chats.engine.phases():
        if events:
            report = Report(events, chats.engine.memory(), 0.1, 0.5)
            pickle.dumps(report, protocol=pickle.HIGHEST_PROTOCOL)


def block(chats: EngineChats, clock: Clock, count: int, steps: int, words: str) -> dict[str, list[float]]:
    """Return the milliseconds of `steps` steps in which `count` chats get one token each. The turns are rolled back."""
    names = list(chats.conversations)[:count]
    for name in names:
        chats.ask(name, words, steps + 100)
    for _ in range(3):
        step(chats)  # the questions
    clock.restart()
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        step(chats)
        taken.append((time.perf_counter() - began) * 1e3)
    times = {STEP: taken, FORWARD: list(clock.forward_ms), BETWEEN: list(clock.between_ms)}
    for name in names:
        chats.engine.apply(StopTurn(f"{name}/{len(chats.turns[name])}", "cancelled", keep_answer=False))
    while chats.engine.has_work:
        chats.engine.step()
    return times


def measure(options: Options, run: Run) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return `{sessions: {order of text: {part: [ms]}}}`."""
    counts = options.pick(SESSIONS, (1, 2))
    chats, clock = open_chats(options, max(counts))
    prompts = Prompts(options.seed)
    taken: dict = {}
    for number in range(options.rounds):
        run.say(f"round {number + 1} of {options.rounds}")
        for count in counts:
            for order in harness.alternate([AT_ONCE, DEFERRED], number):
                chats.engine.defers_text = order == DEFERRED
                times = block(chats, clock, count, options.pick(40, 3), prompts.words(8))
                parts = taken.setdefault(str(count), {}).setdefault(order, {})
                for part, values in times.items():
                    parts.setdefault(part, []).extend(values)
    return taken


def report(taken: dict[str, dict[str, dict[str, list[float]]]]) -> Result:
    """Return the table and the ratios."""
    columns = [
        *("sessions", "step ms", "of it the forward ms", "engine alone ms"),
        *("draw to forward, text at once ms", "draw to forward, text later ms"),
    ]
    result = Result(columns, samples=taken)
    for count, orders in taken.items():
        at_once = orders[AT_ONCE]
        alone_ms = median(at_once[STEP]) - median(at_once[FORWARD])
        result.rows.append(
            {
                "sessions": count,
                "step ms": spread(at_once[STEP]),
                "of it the forward ms": spread(at_once[FORWARD]),
                "engine alone ms": alone_ms,
                "draw to forward, text at once ms": spread(at_once[BETWEEN]),
                "draw to forward, text later ms": spread(orders[DEFERRED][BETWEEN]),
            }
        )
        result.ratios[f"{count} sessions, ms of a step"] = median(at_once[STEP])
        result.ratios[f"{count} sessions, draw to forward, text later / at once"] = median(
            orders[DEFERRED][BETWEEN]
        ) / median(at_once[BETWEEN])
    result.notes = ["Times are medians [best]."]
    return result


def paint(axes, result: Result) -> None:
    """Draw the time of a step over the number of sessions."""
    counts = [int(row["sessions"]) for row in result.rows]
    for part, label in ((STEP, "step"), (FORWARD, "forward without layers"), (BETWEEN, "draw to next forward")):
        values = [median(orders[AT_ONCE][part]) for orders in result.samples.values()]
        axes.plot(counts, values, marker="o", label=label)
    axes.set(xlabel="sessions", ylabel="ms", title="Python time of a decode step without decoder layers")
    axes.set_xticks(counts)
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = harness.at_preset(harness.parse("step_overhead", __doc__, argv, rounds=6, preset="tiny"), "tiny")
    draw = engine_module.next_tokens
    run = Run(options)
    try:
        return run.finish(report(measure(options, run)), paint)
    finally:
        engine_module.next_tokens = draw


if __name__ == "__main__":
    main()
