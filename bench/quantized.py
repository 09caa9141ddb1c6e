"""What `kv_dtype: int8` and `weights: int8` change: answers of the shapes model, and the time of decode steps.

Answers: each variant holds the same conversations about held-out pictures, five questions each, with its own earlier
answers as history. A token differs if the baseline's answer does not have it at the same place. Shares are those of the
tokens of the longer one of both answers. An answer is right as in `models/shapes/evaluate.py`. Attention of single
tokens is compiled for this small model too, as it is for models of usual size.

Steps: decode steps of a larger model with random weights, with caches of random numbers; the variants alternate.

The answers are saved in pieces of 50 pictures. With --resume a run that was ended continues.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from deploy.options import whole_number
from llava_sessions.chat.transcript import Conversation
from llava_sessions.engine import model as engine_model
from llava_sessions.engine.attention import Segment
from llava_sessions.engine.budget import choose_budget
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.kv import KVShape, SessionKV
from llava_sessions.engine.kv_pool import KVPool
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import AskSession, CloseSession, Finished, OpenSession, Sampling
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.text.processors import load_processor
from models.shapes.evaluate import HASTY, LONGEST_ANSWER_TOKENS, is_right
from models.shapes.scenes import HELD_OUT_SEEDS, dialogue
from models.shapes.sketches import make_sketch

from . import harness
from .harness import DEMO_MODEL, Options, Result, Run, median, spread
from .make_checkpoint import CACHE

TURNS = 5
PIECE = 50  # pictures
CELLS = ((1, 1000), (1, 4000), (8, 1000), (8, 4000))  # chats, tokens in the cache of each
SMOKE_CELLS = ((1, 20), (2, 40))


@dataclass(frozen=True)
class Variant:
    """A way to load the model, as in `Model.load`. `timed`: its decode steps are measured too."""

    name: str
    dtype: str
    weights: str = "auto"
    kv_dtype: str = "auto"
    timed: bool = True

    def load(self, checkpoint: Path) -> Model:
        """Load the model on the CPU."""
        return Model.load(checkpoint, self.dtype, "cpu", weights=self.weights, kv_dtype=self.kv_dtype)


def variants(options: Options) -> list[Variant]:
    """Return the variants; the first one is the baseline. Weights in int8 need bfloat16."""
    dtype = str(options.dtype).removeprefix("torch.")
    found = [Variant(dtype, dtype), Variant("int8 KV", dtype, kv_dtype="int8")]
    if dtype == "bfloat16":
        found += [
            Variant("int8 weights", dtype, "int8"),
            Variant("int8 weights and KV", dtype, "int8", "int8"),
            Variant("float32", "float32", timed=False),
        ]
    return found


# --- answers ---


@dataclass(frozen=True)
class Answer:
    """The tokens of one answer, and whether it is the true one."""

    token_ids: list[int]
    is_right: bool


class Talk:
    """The shapes model in an engine, and conversations with it."""

    def __init__(self, variant: Variant) -> None:
        self._tokens = ChatTemplate(load_processor(DEMO_MODEL))
        model = variant.load(DEMO_MODEL)
        self._engine = Engine(model, self._tokens.answer_text, choose_budget(model.device))

    def answers(self, seeds: range) -> list[Answer]:
        """Hold a conversation about each seed's picture, all at once; return all answers, turn by turn."""
        scenes = {str(seed): make_sketch(seed) for seed in seeds}
        questions = {str(seed): dialogue(scenes[str(seed)], seed, TURNS, HASTY) for seed in seeds}
        chats = {}
        for name, scene in scenes.items():
            opening = self._tokens.opening([(name, scene.draw())])
            chats[name] = Conversation(opening)
            self._engine.apply(OpenSession(name, opening.token_ids, opening.pictures))
        found = []
        for turn in range(TURNS):
            finished = self._turn(chats, {name: asked[turn].text for name, asked in questions.items()})
            for name, asked in questions.items():
                right = is_right(finished[name].text.strip(), asked[turn].answer)
                found.append(Answer(finished[name].answer_ids, right))
        for name in chats:
            self._engine.apply(CloseSession(name))
        return found

    def _turn(self, chats: dict[str, Conversation], texts: dict[str, str]) -> dict[str, Finished]:
        """Ask one question in each chat and return the answers."""
        prompts = {name: self._tokens.prompt(chats[name].opened_on, text) for name, text in texts.items()}
        for name, token_ids in prompts.items():
            self._engine.apply(AskSession(name, name, token_ids, Sampling(LONGEST_ANSWER_TOKENS)))
        finished = {}
        while self._engine.has_work:
            for event in self._engine.step():
                if isinstance(event, Finished):
                    finished[event.turn_id] = event
                    chats[event.turn_id].commit(prompts[event.turn_id], event.kept_ids)
        return finished


def all_answers(variant: Variant, pictures: int, folder: Path) -> list[Answer]:
    """Return the answers of a variant. Pieces that `folder` has are read, others are computed and saved there."""
    pieces = [range(start, min(start + PIECE, pictures)) for start in range(0, pictures, PIECE)]
    talk = None
    found: list[Answer] = []
    with tqdm(total=pictures * TURNS, desc=variant.name, unit="question") as bar:
        for piece in pieces:
            path = folder / f"{variant.name.replace(' ', '-')}-{piece.start}-{piece.stop}.json"
            if not path.exists():
                talk = talk or Talk(variant)
                first = HELD_OUT_SEEDS.start
                answers = talk.answers(range(first + piece.start, first + piece.stop))
                path.write_text(json.dumps([[answer.token_ids, answer.is_right] for answer in answers]))
            found += [Answer(*saved) for saved in json.loads(path.read_text())]
            bar.update(len(piece) * TURNS)
    return found


def compared(answers: list[Answer], baseline: list[Answer]) -> dict[str, float]:
    """Return the figures of a variant's answers, in percent and in percentage points."""
    pairs = [(one.token_ids, other.token_ids) for one, other in zip(answers, baseline, strict=True)]
    equal = sum(a == b for ids, others in pairs for a, b in zip(ids, others, strict=False))
    right, right_before = (sum(answer.is_right for answer in each) for each in (answers, baseline))
    return {
        "right %": 100 * right / len(answers),
        "points": 100 * (right - right_before) / len(answers),
        "tokens that differ %": 100 * (1 - equal / sum(max(map(len, pair)) for pair in pairs)),
        "answers that differ %": 100 * sum(ids != others for ids, others in pairs) / len(pairs),
    }


# --- steps ---


def filled_caches(shape: KVShape, chats: int, tokens: int, steps: int) -> list[SessionKV]:
    """Return caches of random numbers with room for `steps` more tokens."""
    torch.manual_seed(0)
    pool = KVPool()
    caches = [SessionKV(shape, pool) for _ in range(chats)]
    for kv in caches:
        kv.reserve(tokens + steps)
        for layer in range(shape.layers):
            keys, values = torch.randn(2, shape.kv_heads, tokens, shape.head_dim).to(shape.dtype)
            kv.write(layer, 0, keys, values)
        kv.length = tokens
    return caches


def step_times(model: Model, caches: list[SessionKV], steps: int) -> Iterator[float]:
    """Yield the milliseconds of decode steps. The caches have their old lengths afterwards."""
    lengths = [kv.length for kv in caches]
    for _ in range(steps):
        began = time.perf_counter()
        model.forward([Segment(kv, [5], None, [], True) for kv in caches]).logits.argmax(-1).tolist()
        yield (time.perf_counter() - began) * 1e3
    for kv, length in zip(caches, lengths, strict=True):
        kv.crop(length)


def all_times(options: Options, chosen: list[Variant], run: Run) -> dict[str, dict[str, list[float]]]:
    """Return the milliseconds of steps by variant and cell. In each round the variants are in another order."""
    models = {variant.name: variant.load(options.checkpoint) for variant in chosen}
    steps = options.pick(12, 2)
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for chats, tokens in options.pick(CELLS, SMOKE_CELLS):
        cell = cell_name(chats, tokens)
        shapes = {model.kv_shape for model in models.values()}
        caches = {shape: filled_caches(shape, chats, tokens, steps + 1) for shape in shapes}
        for number in range(options.rounds):
            run.say(f"decode steps, {cell}: round {number + 1} of {options.rounds}")
            for name in harness.alternate(list(models), number):
                model = models[name]
                times = list(step_times(model, caches[model.kv_shape], steps + 1))
                taken[name].setdefault(cell, []).extend(times[1:])
    return taken


def cell_name(chats: int, tokens: int) -> str:
    """Return the words of a cell of the table."""
    return f"{chats} chat{'s' if chats > 1 else ''} of {tokens:,} tokens"


# --- the record ---


def more_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    words = f"held-out pictures, {TURNS} questions each (1000)"
    parser.add_argument("--pictures", type=whole_number(1), default=1000, help=words)
    parser.add_argument("--resume", action="store_true", help="continue a run that was ended")


def main(argv: list[str] | None = None) -> Result:
    """Run the benchmark."""
    options = harness.parse("quantized", __doc__, argv, 3, more_options)
    pictures = options.pick(options.extra.pictures, 2)
    folder = CACHE / f"{options.name}-answers{'-smoke' if options.smoke else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    if not options.extra.resume:
        for path in folder.glob("*.json"):
            path.unlink()
    chosen = variants(options)
    usual, engine_model.COMPILE_FROM_BYTES = engine_model.COMPILE_FROM_BYTES, 0
    try:
        answers = {variant.name: all_answers(variant, pictures, folder) for variant in chosen}
    finally:
        engine_model.COMPILE_FROM_BYTES = usual
    run = Run(options)
    times = all_times(options, [variant for variant in chosen if variant.timed], run)
    return run.finish(report(options, answers, times), paint)


def report(options: Options, answers: dict[str, list[Answer]], times: dict[str, dict[str, list[float]]]) -> Result:
    """Return the table: a row for each variant, a column for each cell of chats and tokens."""
    cells = [cell_name(*cell) for cell in options.pick(CELLS, SMOKE_CELLS)]
    figures = ["right %", "points", "tokens that differ %", "answers that differ %"]
    result = Result(["variant", *figures, *(f"{cell}, ms" for cell in cells)])
    baseline = next(iter(answers))
    for name, found in answers.items():
        shares = compared(found, answers[baseline])
        row = {"variant": name} | {column: f"{share:.2f}" for column, share in shares.items()}
        if name != baseline:
            result.ratios[f"{name}: right answers, points from {baseline}"] = shares["points"]
            result.ratios[f"{name}: tokens that differ from {baseline}, %"] = shares["tokens that differ %"]
        for cell, taken in times.get(name, {}).items():
            row[f"{cell}, ms"] = spread(taken)
            if name != baseline:
                ratio = median(taken) / median(times[baseline][cell])
                result.ratios[f"decode step of {cell}, {name} / {baseline}"] = ratio
        result.rows.append(row)
    result.settings = {"questions": len(answers[baseline])}
    result.samples = {"times_ms": times}
    return result


def paint(axes: object, result: Result) -> None:
    """Draw the time of a step by variant, relative to the baseline."""
    import numpy as np

    times = result.samples["times_ms"]
    names = list(times)
    cells = list(times[names[0]])
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        heights = [median(times[name][cell]) / median(times[names[0]][cell]) for cell in cells]
        axes.bar(np.arange(len(cells)) + number * width, heights, width, label=name)
    axes.set_xticks(np.arange(len(cells)) + 0.4 - width / 2, cells)
    axes.set_ylabel(f"time of a decode step / {names[0]}")
    axes.legend(ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)


if __name__ == "__main__":
    main()
