"""Measure the shapes model on held-out pictures: `python models/shapes/evaluate.py` prints accuracy by question type.

Answers are greedy and the history holds the model's own earlier answers. An answer is right if it is the true one word
by word; where it lists shapes, their order does not matter. `--pictures-of` selects the generator of the pictures.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from deploy.options import Parser
from models.shapes.distances import FieldPicture, make_field_picture
from models.shapes.plain import PlainDrawing, plain_drawings
from models.shapes.scenes import HELD_OUT_SEEDS, QUESTION_TYPES, Ask, Question, Scene, dialogue, make_scene, true_answer
from models.shapes.sketches import Sketch, make_sketch

FOLDER = Path(__file__).resolve().parent
Pictured = Scene | Sketch | FieldPicture | PlainDrawing
GENERATORS: dict[str, Callable[[int], Pictured]] = {
    "sketches": make_sketch,
    "scenes": make_scene,
    "fields": make_field_picture,
    "small": lambda seed: make_field_picture(seed, smallest=0.05, largest=0.12),
}
FLOORS_OVERALL = {"sketches": 0.95, "scenes": 0.95, "fields": 0.90}
FLOOR_PER_TYPE = 0.90
_LISTED = re.compile(r"\b(?:a|two|three|four|five|six) \w+ \w+(?=,| and |\.| at | on | in )")
LONGEST_ANSWER_TOKENS = 48
HASTY = 0.25  # share of questions in lower case or without a question mark


@dataclass
class Chat:
    """One picture, what will be asked about it, and what the model answered so far."""

    picture: Image.Image
    questions: list[Question]
    answers: list[str] = field(default_factory=list)

    def messages(self) -> list[dict]:
        """The conversation up to the next question, with the model's own answers."""
        messages: list[dict] = []
        for turn, question in enumerate(self.questions[: len(self.answers) + 1]):
            image = [{"type": "image"}] if turn == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question.text}]})
            if turn < len(self.answers):
                messages.append({"role": "assistant", "content": self.answers[turn]})
        return messages


class Model:
    """The saved model, run in float32 by plain `generate`."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer_next(self, chats: list[Chat]) -> None:
        """One more answer in each chat, all in one batch."""
        texts = [self.processor.apply_chat_template(chat.messages(), add_generation_prompt=True) for chat in chats]
        pictures = [chat.picture for chat in chats]
        inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        tokens = self.model.generate(**inputs, max_new_tokens=LONGEST_ANSWER_TOKENS)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        for chat, answer in zip(chats, self.processor.batch_decode(new, skip_special_tokens=True), strict=True):
            chat.answers.append(answer.strip())


@dataclass
class Score:
    """Right answers and questions, by type; `wrong` keeps what went wrong for --wrong."""

    asked: Counter = field(default_factory=Counter)
    right: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, seed: int, chat: Chat) -> None:
        for turn, (question, answer) in enumerate(zip(chat.questions, chat.answers, strict=True)):
            self.asked[question.kind] += 1
            self.right[question.kind] += is_right(answer, question.answer)
            if not is_right(answer, question.answer):
                before = f" (after {chat.questions[turn - 1].text!r} {chat.answers[turn - 1]!r})" if turn else ""
                line = f"{seed} {question.kind}: {question.text!r}{before} said {answer!r}, true is {question.answer!r}"
                self.wrong.append(line)

    @property
    def overall(self) -> float:
        return self.right.total() / self.asked.total()

    def of_type(self, kind: str) -> float:
        return self.right[kind] / self.asked[kind]

    def table(self) -> str:
        """Markdown, one row a type."""
        rows = [
            f"| `{kind}` | {self.right[kind]} | {self.asked[kind]} | {self.of_type(kind):.2%} |"
            for kind in QUESTION_TYPES
            if self.asked[kind]
        ]
        head = ["| question type | right | asked | exact match |", "|---|---|---|---|"]
        foot = [f"| **all** | {self.right.total()} | {self.asked.total()} | **{self.overall:.2%}** |"]
        return "\n".join(head + rows + foot)

    def below_floors(self, floor: float) -> list[str]:
        """Return the question types below FLOOR_PER_TYPE, and "all" if the overall share is below `floor`."""
        low = [kind for kind in self.asked if self.of_type(kind) < FLOOR_PER_TYPE]
        return low + (["all"] if self.overall < floor else [])


def is_right(answer: str, truth: str) -> bool:
    """Compare two answers; shapes in a list may be in any order."""
    return answer == truth or _unordered(answer) == _unordered(truth)


def _unordered(answer: str) -> tuple[str, list[str]]:
    rest = _LISTED.sub("#", answer.replace("There are", "There is"))
    return rest.replace(", #", " and #"), sorted(_LISTED.findall(answer))


def evaluate(
    model: Model,
    pictures: int,
    turns: int,
    batch: int,
    first_seed: int = HELD_OUT_SEEDS.start,
    generator: Callable[[int], Pictured] = make_sketch,
) -> Score:
    """Ask `turns` questions about each of `pictures` held-out pictures."""
    seeds = range(first_seed, first_seed + pictures)
    if seeds.start not in HELD_OUT_SEEDS or seeds.stop > HELD_OUT_SEEDS.stop:
        raise ValueError(f"only held-out seeds count ({HELD_OUT_SEEDS}), got {seeds}")
    score = Score()
    with tqdm(total=pictures * turns, desc="asking", unit="question") as bar:
        for start in range(0, pictures, batch):
            chunk = seeds[start : start + batch]
            scenes = [generator(seed) for seed in chunk]
            chats = [
                Chat(scene.draw(), dialogue(scene, seed, turns, HASTY))
                for scene, seed in zip(scenes, chunk, strict=True)
            ]
            for _ in range(turns):
                model.answer_next(chats)
                bar.update(len(chats))
            for seed, chat in zip(chunk, chats, strict=True):
                score.add(seed, chat)
    return score


def probe(model: Model, batch: int) -> str:
    """Ask what is in each plain drawing of one shape; return a table of right answers by size."""
    asked, right = Counter[str](), defaultdict[str, int](int)
    every = list(plain_drawings())
    for drawings in (every[start : start + batch] for start in range(0, len(every), batch)):
        question = Question("list", "What do you see?", "")
        chats = [Chat(drawing.draw(), [question]) for drawing in drawings]
        model.answer_next(chats)
        for drawing, chat in zip(drawings, chats, strict=True):
            size = f"{drawing.objects[0].size:.0%} of the side"
            asked[size] += 1
            right[size] += chat.answers[0] == true_answer(drawing, Ask("list"))
    rows = [f"| {size} | {right[size]} | {asked[size]} |" for size in asked]
    return "\n".join(["| one shape of | named | drawings |", "|---|---|---|", *rows])


def main() -> None:
    parser = Parser(prog="models/shapes/evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="folder of the model (default: models/shapes)")
    parser.add_argument("--pictures", type=int, default=2_000, help="held-out pictures (default 2000)")
    parser.add_argument(
        "--pictures-of",
        choices=[*GENERATORS, "plain"],
        default="sketches",
        help="generator: `sketches`, `scenes`, `fields` (of other code), `small` (shapes), `plain` (probe)",
    )
    parser.add_argument("--turns", type=int, default=5, help="questions about each picture (default 5)")
    parser.add_argument("--batch", type=int, default=100, help="pictures answered together (default 100)")
    parser.add_argument("--first-seed", type=int, default=HELD_OUT_SEEDS.start, help="the first picture's seed")
    parser.add_argument("--wrong", type=int, default=0, help="show so many wrong answers")
    options = parser.parse_args()
    model = Model(options.model)
    if options.pictures_of == "plain":
        print(probe(model, options.batch))
        return
    generator = GENERATORS[options.pictures_of]
    score = evaluate(model, options.pictures, options.turns, options.batch, options.first_seed, generator)
    print(score.table())
    for line in score.wrong[: options.wrong]:
        print(line)
    floor = FLOORS_OVERALL.get(options.pictures_of)
    low = score.below_floors(floor) if floor else []
    if low:
        print(f"below the floors ({floor:.0%} overall, {FLOOR_PER_TYPE:.0%} a type): {', '.join(low)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
