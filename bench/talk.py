"""Synthetic pictures and questions for load tests, the same for the same seed."""

from __future__ import annotations

import base64
import io
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

QUESTIONS = (
    "Which shapes are there?",
    "How many shapes are there?",
    "What is on the left?",
    "What colour is the largest shape?",
    "Is there a circle?",
    "What is in the middle?",
    "Is there anything at the bottom?",
    "And on the right?",
)
_COLOURS = ("red", "green", "blue", "orange", "purple", "black")
_GROUNDS = ("white", "lightgrey", "beige", "lightblue")


@dataclass(frozen=True)
class Conversation:
    """A conversation before it takes place: its picture as PNG, its questions, and the pauses before them in s."""

    picture: bytes
    questions: tuple[str, ...]
    pauses_s: tuple[float, ...]

    @property
    def data_url(self) -> str:
        """The picture as a data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.picture).decode()}"


def conversation(seed: int, turns: int, side_px: int, think_s: float) -> Conversation:
    """Return a conversation about a picture of its own. Pauses are exponential around `think_s`, the first is 0."""
    draw = random.Random(seed)
    questions = tuple(draw.choice(QUESTIONS) for _ in range(turns))
    pauses = tuple(draw.expovariate(1 / think_s) if number and think_s else 0.0 for number in range(turns))
    return Conversation(picture(draw, side_px), questions, pauses)


def picture(draw: random.Random, side_px: int) -> bytes:
    """Return a PNG with one to four shapes, `side_px` wide and high."""
    image = Image.new("RGB", (side_px, side_px), draw.choice(_GROUNDS))
    pen = ImageDraw.Draw(image)
    for _ in range(draw.randint(1, 4)):
        size = draw.uniform(0.15, 0.5) * side_px
        left, top = (draw.uniform(0, side_px - size) for _ in range(2))
        box = (left, top, left + size, top + size)
        colour = draw.choice(_COLOURS)
        kind = draw.choice((pen.ellipse, pen.rectangle, None))
        if kind is None:
            pen.polygon(((left, top + size), (left + size / 2, top), (left + size, top + size)), colour)
        else:
            kind(box, colour)
    image.putpixel((draw.randrange(side_px), draw.randrange(side_px)), tuple(draw.randbytes(3)))  # no two are equal
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
