"""Weights in int8 against bfloat16: the time of a decode step, the memory of the weights, and the answers.

Both engines run in one process, and blocks of their steps alternate. The answers are those of the shapes model to
questions about held-out pictures, in bfloat16 with both kinds of weights.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from deploy.options import whole_number
from llava_sessions.engine.cpu.linears import PackedLinear
from llava_sessions.ipc.messages import AskSession, CloseSession, Event, Finished, OpenSession, Sampling
from models.shapes.evaluate import LONGEST_ANSWER_TOKENS, Chat, Score, evaluate

from . import harness
from .decode import chosen, contexts, engine_steps
from .driver import EngineChats, load_engine
from .harness import DEMO_MODEL, Options, Result, Run, median, spread

KINDS = ("auto", "int8")
_TURNS = 3
_BATCH = 25


class Answers:
    """The shapes model in an engine, in the form that `evaluate` asks."""

    def __init__(self, chats: EngineChats) -> None:
        self._engine = chats.engine
        self._tokens = chats.tokens
        self._pictures = itertools.count()
        self.token_ids: list[list[int]] = []

    def answer_next(self, chats: list[Chat]) -> None:
        """Answer the next question of each chat, all in one batch."""
        for number, chat in enumerate(chats):
            opened_on = None
            if not chat.answers:
                opening = self._tokens.opening([(f"picture {next(self._pictures)}", chat.picture)])
                opened_on = opening.opened_on
                self._engine.apply(OpenSession(f"{number}", opening.token_ids, opening.pictures))
            prompt_ids = self._tokens.prompt(opened_on, chat.questions[len(chat.answers)].text)
            self._engine.apply(AskSession(f"{number}", f"{number}", prompt_ids, Sampling(LONGEST_ANSWER_TOKENS)))
        events: list[Event] = []
        while self._engine.has_work:
            events += self._engine.step()
        finished = {int(event.turn_id): event for event in events if isinstance(event, Finished)}
        for number, chat in enumerate(chats):
            chat.answers.append(finished[number].text.strip())
            self.token_ids.append(finished[number].answer_ids)
            if len(chat.answers) == len(chat.questions):
                self._engine.apply(CloseSession(f"{number}"))
        self._engine.step()


def weight_bytes(chats: EngineChats) -> int:
    """Return the size of the linears of the language model and its head."""
    model = chats.engine.model
    parts = [part for part in model.text.modules() if isinstance(part, PackedLinear)]
    return sum(part.weight_bytes for part in (*parts, model._model.lm_head))


def measure_steps(options: Options, run: Run, sides: dict[str, EngineChats]) -> dict[int, dict[str, list[float]]]:
    """Return the milliseconds of the steps of each side, by the number of chats."""
    names = {kind: list(contexts(options, chats)) for kind, chats in sides.items()}
    taken = {count: {kind: [] for kind in sides} for count in options.extra.sessions}
    for number in range(options.rounds):
        run.say(f"round {number + 1} of {options.rounds}")
        for count, times in taken.items():
            for kind in harness.alternate(list(sides), number):
                times[kind] += engine_steps(sides[kind], chosen(names[kind], count), 12)
    return taken


def measure_answers(options: Options, run: Run) -> tuple[dict[str, Score], float]:
    """Return the scores of both sides, and the share of answers with the same tokens."""
    shapes = harness.replace(options, checkpoint=DEMO_MODEL, preset="shapes")
    scores = {}
    token_ids = {}
    for kind in KINDS:
        run.say(f"asking with {kind}")
        answers = Answers(load_engine(shapes, weights=kind))
        scores[kind] = evaluate(answers, options.extra.pictures, _TURNS, _BATCH)
        token_ids[kind] = answers.token_ids
    same = [one == other for one, other in zip(*token_ids.values(), strict=True)]
    return scores, sum(same) / len(same)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    options = harness.parse("int8", __doc__, argv, rounds=5, more=_arguments)
    if options.dtype != torch.bfloat16:
        sys.exit("int8 weights need a CPU with bfloat16")
    run = Run(options)
    sides = {kind: load_engine(options, weights=kind) for kind in KINDS}
    result = Result(["chats", "bfloat16 ms", "int8 ms", "times faster"])
    for count, times in measure_steps(options, run, sides).items():
        faster = median(times["auto"]) / median(times["int8"])
        cells = {"bfloat16 ms": spread(times["auto"]), "int8 ms": spread(times["int8"]), "times faster": faster}
        result.rows.append({"chats": count, **cells})
        result.ratios[f"decode step of {count}, bfloat16 / int8"] = faster
    sizes = {kind: weight_bytes(chats) for kind, chats in sides.items()}
    result.ratios["memory of the language model's linears, int8 / bfloat16"] = sizes["int8"] / sizes["auto"]
    result.settings = {"weight_bytes": sizes, "pictures": options.extra.pictures, "questions": _TURNS}
    if options.extra.pictures:
        scores, same = measure_answers(options, run)
        result.ratios["answers of the shapes model with the same tokens, of all"] = same
        for kind, score in scores.items():
            result.ratios[f"right answers of the shapes model, {kind}"] = score.overall
    run.finish(result)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 8], help="how many chats at once")
    parser.add_argument("--pictures", type=whole_number(0), default=200, help="of the shapes model (200); 0: none")


if __name__ == "__main__":
    main()
