"""Shapes and simple scenes: one to four shapes, each in its own ninth of the picture.

A picture has three rows and three columns. The nine places are "top left", "top", ... "bottom right".
No scene has two shapes of the same kind and colour; kinds repeat and colours repeat.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from models.shapes import drawing

KINDS = ("circle", "square", "triangle", "star", "diamond", "cross")
COLOURS = tuple(drawing.PAINTS)
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
HELD_OUT_SEEDS = range(10_000_000, 20_000_000)  # for the demo, the tests and the evaluation; training uses smaller ones
MOST_SHAPES = 4
_LEAST_DISTANCE = 48.0  # of any background colour from any shape's colour, see drawing.colour_distance


@dataclass(frozen=True)
class Shape:
    """One shape; `size` and `shift` are in cells (a third of the picture), `tilt` is in radians."""

    kind: str
    colour: str
    place: str
    size: float
    shift: tuple[float, float] = (0.0, 0.0)
    tilt: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    def mark(self) -> drawing.Mark:
        """The outline to draw."""
        row, column = divmod(PLACES.index(self.place), 3)
        middle = ((column + 0.5 + self.shift[0]) / 3, (row + 0.5 + self.shift[1]) / 3)
        return drawing.Mark(self.kind, drawing.PAINTS[self.colour], middle, self.size / 6, self.tilt)


class Pictured(Protocol):
    """All that a dialogue needs: shapes in the order in which an answer lists them, and a picture."""

    @property
    def objects(self) -> tuple[Shape, ...]: ...

    def draw(self) -> Image.Image: ...


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order (row by row) on a background."""

    objects: tuple[Shape, ...]
    background: drawing.Background

    def draw(self, size_px: int = 336) -> Image.Image:
        """The picture, RGB, `size_px` by `size_px`."""
        return drawing.paint_picture(self.background, [shape.mark() for shape in self.objects], size_px)


def make_scene(seed: int, objects: int | None = None) -> Scene:
    """The scene of a seed, the same on every machine; `objects` fixes how many shapes (1 to 9), else 1 to 4."""
    rng = random.Random(seed)
    count = objects or rng.choices((1, 2, 3, 4), (1, 2, 3, 3))[0]
    pairs = _pick_pairs(rng, count)
    places = sorted(rng.sample(range(9), count))
    shapes = tuple(
        _shape_at(rng, kind, colour, PLACES[cell]) for (kind, colour), cell in zip(pairs, places, strict=True)
    )
    return Scene(shapes, _pick_background(rng, {colour for _, colour in pairs}))


def _pick_pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Different (kind, colour) pairs; half of the scenes draw from few kinds or few colours so that both repeat."""
    kinds, colours = KINDS, COLOURS
    if rng.random() < 0.35:
        kinds = tuple(rng.sample(KINDS, 1 + count // 2))
    elif rng.random() < 0.45:
        colours = tuple(rng.sample(COLOURS, 1 + count // 2))
    return rng.sample([(kind, colour) for kind in kinds for colour in colours], count)


def _shape_at(rng: random.Random, kind: str, colour: str, place: str) -> Shape:
    size = rng.uniform(0.54, 0.84)
    free = (0.94 - size * 1.1) / 2  # stars and diamonds reach 1.1 radii; a margin keeps neighbours apart
    shift = (round(rng.uniform(-free, free), 4), round(rng.uniform(-free, free), 4))
    return Shape(kind, colour, place, round(size, 4), shift, round(rng.uniform(-0.12, 0.12), 4))


def _pick_background(rng: random.Random, colours: set[str]) -> drawing.Background:
    style = rng.choice(drawing.STYLES)
    first = _pick_paint(rng, colours, near=None)
    second = _pick_paint(rng, colours, near=first)
    angle = rng.uniform(0.0, 3.1416)
    return drawing.Background(style, first, second, round(angle, 4), rng.randint(4, 14), rng.randrange(2**31))


def _pick_paint(rng: random.Random, colours: set[str], near: drawing.Rgb | None) -> drawing.Rgb:
    """A muted colour far from all `colours`, and not too far from `near` (so all shades in between are far too)."""
    for _ in range(400):
        grey = rng.randrange(50, 226)
        paint = tuple(min(235, max(30, grey + rng.randrange(-38, 39))) for _ in range(3))
        if near and not 5 < drawing.colour_distance(paint, near) < 24:
            continue
        if all(drawing.colour_distance(paint, drawing.PAINTS[colour]) > _LEAST_DISTANCE for colour in colours):
            return paint
    return near or (128, 128, 128)
