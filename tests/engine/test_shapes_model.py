"""The committed weights on a small part of what the model's card reports."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest
from PIL import Image, ImageDraw

from models.shapes.answers import NOTHING_KNOWN, Ask, true_answer
from models.shapes.distances import make_field_picture
from models.shapes.evaluate import FOLDER, Chat, Model, evaluate
from models.shapes.plain import plain_drawings
from models.shapes.scenes import HELD_OUT_SEEDS, Pictured, Question, make_scene
from models.shapes.sketches import make_sketch

SEEN = Question("list", "What do you see?", "")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(FOLDER)


@pytest.mark.parametrize("generator", [make_sketch, make_field_picture, make_scene])
def test_nine_of_ten_answers_are_right(model: Model, generator: Callable[[int], Pictured]) -> None:
    """The card uses other seeds."""
    score = evaluate(model, 30, 2, 30, HELD_OUT_SEEDS.start + 1_000_000, generator)
    assert score.overall >= 0.9, "\n".join(score.wrong)


def test_plain_drawings_are_named(model: Model) -> None:
    drawings = list(islice(plain_drawings(), 0, None, 7))
    chats = [Chat(drawing.draw(), [SEEN]) for drawing in drawings]
    model.answer_next(chats)
    right = [
        chat.answers[0] == true_answer(drawing, Ask("list")) for chat, drawing in zip(chats, drawings, strict=True)
    ]
    assert sum(right) >= 0.95 * len(right)


def _heart(pen: ImageDraw.ImageDraw) -> None:
    pen.ellipse((60, 60, 160, 160), fill="red")
    pen.ellipse((140, 60, 240, 160), fill="red")
    pen.polygon([(67, 135), (233, 135), (150, 250)], fill="red")


def test_a_picture_without_a_shape_has_none(model: Model) -> None:
    empty, lines, heart = (Image.new("RGB", (300, 300), "white") for _ in range(3))
    pen = ImageDraw.Draw(lines)
    pen.line((20, 40, 280, 200), fill="blue", width=4)
    pen.line((30, 250, 250, 90), fill="black", width=3)
    _heart(ImageDraw.Draw(heart))
    chats = [Chat(picture, [SEEN]) for picture in (empty, lines, heart)]
    model.answer_next(chats)
    assert [chat.answers[0] for chat in chats] == [NOTHING_KNOWN] * 3
