"""324 plain drawings of one shape by the simplest calls of PIL."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from models.shapes.scenes import Shape

SIZES = (0.2, 0.35, 0.6)  # of the side
SIDES_PX = (64, 128, 224, 400, 640, 900)
_GROUNDS = {"white": "white", "grey": (128, 128, 128), "dark": (30, 30, 30)}
_PAINTS = {
    "white": ("red", "blue", "green", "black", "purple", "yellow"),
    "grey": ("red", "blue", "yellow", "white", "black", (0, 255, 0)),
    "dark": ("red", "yellow", (0, 255, 0), "white", (148, 0, 211), (30, 144, 255)),
}
_NAMES = {(0, 255, 0): "green", (148, 0, 211): "purple", (30, 144, 255): "blue"}


@dataclass(frozen=True)
class PlainDrawing:
    """A drawing with one shape in the middle; has the members of a scene that questions and evaluation use."""

    objects: tuple[Shape, ...]
    picture: Image.Image

    def draw(self) -> Image.Image:
        return self.picture


def plain_drawings() -> Iterator[PlainDrawing]:
    """Yield every kind in every size on every background and in every number of pixels."""
    for size in SIZES:
        for side in SIDES_PX:
            for ground, paint_of_ground in _GROUNDS.items():
                for number, kind in enumerate(("circle", "square", "triangle", "star", "diamond", "cross")):
                    paint = _PAINTS[ground][(number + SIDES_PX.index(side)) % 6]
                    picture = Image.new("RGB", (side, side), paint_of_ground)
                    _draw(ImageDraw.Draw(picture), kind, side / 2, size * side / 2, paint)
                    yield PlainDrawing((Shape(kind, _NAMES.get(paint, paint), "middle", size),), picture)


def _draw(pen: ImageDraw.ImageDraw, kind: str, middle: float, half: float, paint: str | tuple[int, int, int]) -> None:
    low, high = middle - half, middle + half
    if kind == "circle":
        pen.ellipse((low, low, high, high), fill=paint)
    elif kind == "square":
        pen.rectangle((low, low, high, high), fill=paint)
    elif kind == "triangle":
        pen.polygon([(middle, low), (high, high), (low, high)], fill=paint)
    elif kind == "diamond":
        pen.polygon([(middle, low), (high, middle), (middle, high), (low, middle)], fill=paint)
    elif kind == "cross":
        arm = half / 3
        pen.rectangle((middle - arm, low, middle + arm, high), fill=paint)
        pen.rectangle((low, middle - arm, high, middle + arm), fill=paint)
    else:
        corners = []
        for step in range(10):
            angle, reach = math.pi * step / 5 - math.pi / 2, half * (0.4 if step % 2 else 1.0)
            corners.append((middle + reach * math.cos(angle), middle + reach * math.sin(angle)))
        pen.polygon(corners, fill=paint)
