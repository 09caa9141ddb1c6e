"""A second generator of pictures, for evaluation only: it shares no drawing code with the first.

Shapes are signed distance fields on a numpy grid. Proportions, colours and layouts are its own.
`make_field_picture(seed)` returns a picture and its true shapes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from models.shapes.scenes import COLOURS, KINDS, PLACES, Shape

Grid = np.ndarray
Distance = Callable[[Grid, Grid], Grid]  # negative inside; the unit is half of the shape's size

_PAINTS = {
    "red": ("#ff0000", "#e6194b", "#d62728", "#c0392b", "#f44336"),
    "yellow": ("#ffff00", "#ffe119", "#f1c40f", "#fdd835", "#ffd700"),
    "green": ("#008000", "#00ff00", "#3cb44b", "#2ca02c", "#27ae60", "#228b22"),
    "blue": ("#0000ff", "#4363d8", "#1f77b4", "#2980b9", "#1e90ff", "#000080"),
    "purple": ("#800080", "#911eb4", "#9467bd", "#8e44ad", "#8a2be2", "#9c27b0"),
    "white": ("#ffffff", "#fafafa"),
    "black": ("#000000", "#111111", "#222222"),
}
_GROUNDS = (
    "#ffffff",
    "#ffffff",
    "#ffffff",
    "#f5f5f5",
    "#d9d9d9",
    "#a0a0a0",
    "#707070",
    "#303030",
    "#101820",
    "#f5e6c8",
    "#c8e6f5",
    "#4a5a4a",
)


@dataclass(frozen=True)
class FieldPicture:
    """A picture and the shapes in it; has the two members of a scene that questions and evaluation use."""

    objects: tuple[Shape, ...]
    picture: Image.Image

    def draw(self) -> Image.Image:
        return self.picture


def _disc(x: Grid, y: Grid) -> Grid:
    return np.hypot(x, y) - 1


def _box(x: Grid, y: Grid, across: float = 1.0, down: float = 1.0) -> Grid:
    dx, dy = np.abs(x) - across, np.abs(y) - down
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _gable(x: Grid, y: Grid) -> Grid:
    """A triangle with a horizontal base: corners (0, -1), (1, 1) and (-1, 1)."""
    return np.maximum((2 * np.abs(x) - y - 1) / math.sqrt(5), y - 1)


def _regular(x: Grid, y: Grid, sides: int) -> Grid:
    angle = 2 * math.pi / sides
    turn = np.arctan2(x, -y)
    folded = np.abs((turn + angle / 2) % angle - angle / 2)
    return np.hypot(x, y) * np.cos(folded - angle / 2) - math.cos(angle / 2)


def _star(x: Grid, y: Grid, inner: float = 0.43) -> Grid:
    """Five points: the distance from the line between a tip and the notch next to it."""
    angle = math.pi / 5
    turn = np.arctan2(x, -y)
    folded = np.abs((turn + angle) % (2 * angle) - angle)
    radius = np.hypot(x, y)
    px, py = radius * np.sin(folded), radius * np.cos(folded)
    nx, ny = inner * math.sin(angle), inner * math.cos(angle)
    length = math.hypot(nx, ny - 1)
    return ((px - 0) * (1 - ny) + (py - 1) * nx) / length


def _lozenge(x: Grid, y: Grid, across: float = 0.78) -> Grid:
    return (np.abs(x) / across + np.abs(y) - 1) / math.hypot(1 / across, 1)


def _plus(x: Grid, y: Grid, arm: float = 0.3) -> Grid:
    return np.minimum(_box(x, y, arm, 1.0), _box(x, y, 1.0, arm))


def _heart(x: Grid, y: Grid) -> Grid:
    u, v = x * 1.25, -y * 1.25 + 0.1
    return (u**2 + v**2 - 1) ** 3 - u**2 * v**3


def _hook(x: Grid, y: Grid) -> Grid:
    return np.minimum(_box(x + 0.7, y, 0.3, 1.0), _box(x, y - 0.7, 1.0, 0.3))


def _dart(x: Grid, y: Grid) -> Grid:
    head = np.maximum(np.abs(y) * 0.8 + x - 1, -x)
    return np.minimum(head * 0.7, _box(x + 0.5, y, 0.5, 0.25))


def _shape_distance(kind: str, rng: random.Random) -> Distance:
    if kind == "circle":
        return _disc
    if kind == "square":
        return _box
    if kind == "triangle":
        return rng.choice((_gable, lambda x, y: _regular(x, y - 0.25, 3)))
    if kind == "star":
        inner = rng.uniform(0.36, 0.5)
        return lambda x, y: _star(x, y, inner)
    if kind == "diamond":
        across = rng.choice((1.0, rng.uniform(0.6, 0.85)))
        return lambda x, y: _lozenge(x, y, across)
    arm = rng.uniform(0.2, 0.36)
    return lambda x, y: _plus(x, y, arm)


_STRANGE: tuple[Distance, ...] = (_heart, lambda x, y: _regular(x, y, 6), _hook, _dart)


def make_field_picture(seed: int, smallest: float = 0.12, largest: float = 0.85) -> FieldPicture:
    """Return the picture of a seed; sizes are in shares of the shorter side."""
    rng = random.Random(f"fields {seed}")
    shorter = rng.choice((64, 96, 160, 240, 320, 480, 640, 900))
    width, height = rng.choice(((1, 1), (1, 1), (4, 3), (3, 4), (16, 9), (2, 1)))
    unit = shorter / min(width, height)
    width, height = round(width * unit), round(height * unit)
    ground = _rgb(rng.choice(_GROUNDS))
    canvas = _ground(rng, width, height, ground)
    count = rng.choices(range(7), (8, 30, 26, 16, 10, 6, 4))[0]
    shapes: list[tuple[Shape, float]] = []
    pairs = _pairs(rng, count, ground)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    style = rng.choices(("fill", "line", "edge"), (75, 15, 10))[0]
    for (kind, colour, paint), (across, down, size) in zip(
        pairs,
        _spots(
            rng, count, width, height, max(smallest * shorter, 16.0 if smallest >= 0.12 else 6.0), largest * shorter
        ),
        strict=False,
    ):
        _stamp(canvas, x - across, y - down, size, _shape_distance(kind, rng), paint, style, _turn(kind, rng))
        column, row = int(across / width * 3), int(down / height * 3)
        shapes.append((Shape(kind, colour, PLACES[3 * row + column], size / shorter), across))
    if not count and rng.random() < 0.75:
        paint = _rgb(rng.choice(_PAINTS[rng.choice(COLOURS)]))
        size = rng.uniform(0.25, 0.7) * shorter
        _stamp(canvas, x - width / 2, y - height / 2, size, rng.choice(_STRANGE), paint, "fill", 0.0)
    if rng.random() < 0.15:
        canvas += np.random.RandomState(seed % 2**31).normal(0, rng.uniform(2, 10), canvas.shape)
    shapes.sort(key=lambda item: (PLACES.index(item[0].place), item[1]))
    picture = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), "RGB")
    return FieldPicture(tuple(shape for shape, _ in shapes), picture)


def _rgb(text: str) -> tuple[int, int, int]:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def _ground(rng: random.Random, width: int, height: int, first: tuple[int, int, int]) -> Grid:
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = first
    form = rng.random()
    fade = rng.uniform(0.85, 0.97)
    if form < 0.12:
        canvas *= np.linspace(1, fade, height, dtype=np.float32)[:, None, None]
    elif form < 0.2:
        y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
        canvas *= (1 - (1 - fade) * (x**2 + y**2) / 2)[..., None]
    elif form < 0.25:
        canvas[:, :: max(4, width // 16)] *= fade
    return canvas


def _pairs(rng: random.Random, count: int, ground: tuple[int, int, int]) -> list[tuple[str, str, tuple[int, int, int]]]:
    """Return different (kind, colour) pairs with a paint that can be seen on the ground."""
    pairs: dict[tuple[str, str], tuple[int, int, int]] = {}
    while len(pairs) < count:
        kind, colour = rng.choice(KINDS), rng.choice(COLOURS)
        paint = _rgb(rng.choice(_PAINTS[colour]))
        if sum(abs(a - b) for a, b in zip(paint, ground, strict=True)) >= 150:
            pairs.setdefault((kind, colour), paint)
    return [(kind, colour, paint) for (kind, colour), paint in pairs.items()]


def _spots(
    rng: random.Random, count: int, width: int, height: int, least: float, most: float
) -> list[tuple[float, float, float]]:
    """Return centres and sizes in pixels: in a row, in a column, or scattered; no centre is close to a third."""
    if not count:
        return []
    most = max(least, min(most, (width * height / count) ** 0.5 * 0.85))
    form = rng.choice(("row", "scatter", "scatter")) if count in (2, 3) else "scatter"
    while True:
        spots: list[tuple[float, float, float]] = []
        if form == "row":
            wide = width >= height
            longer, other = (width, height) if wide else (height, width)
            size = max(least, rng.uniform(0.4, 0.9) * min(longer / count, other))
            for number in range(count):
                along, level = longer * (number + 0.5) / count, other / 2
                spots.append((along, level, size) if wide else (level, along, size))
        else:
            for _ in range(count * 60):
                size = least * (most / least) ** rng.random()
                x, y = rng.uniform(size / 2, width - size / 2), rng.uniform(size / 2, height - size / 2)
                if all(math.hypot(x - u, y - v) > (size + s) * 0.55 for u, v, s in spots):
                    spots.append((x, y, size))
                if len(spots) == count:
                    break
        clear = all(
            abs(v / whole - third) > 0.025
            for x, y, _ in spots
            for v, whole in ((x, width), (y, height))
            for third in (1 / 3, 2 / 3)
        )
        if len(spots) == count and (clear or form == "row"):
            return spots
        most = max(least, most * 0.97)


def _turn(kind: str, rng: random.Random) -> float:
    if rng.random() < 0.5 or kind == "circle":
        return 0.0
    return rng.uniform(-0.22, 0.22)


def _stamp(
    canvas: Grid,
    x: Grid,
    y: Grid,
    size: float,
    distance: Distance,
    paint: tuple[int, int, int],
    style: str,
    turn: float,
) -> None:
    """Blend a shape into the canvas; `x` and `y` are pixels from its centre."""
    half = size / 2
    cosine, sine = math.cos(turn), math.sin(turn)
    depth = distance((x * cosine + y * sine) / half, (y * cosine - x * sine) / half) * half
    if style == "line":
        pen = max(1.5, size * 0.07)
        depth = np.abs(depth + pen / 2) - pen / 2
    share = np.clip(0.5 - depth, 0, 1)[..., None]
    canvas *= 1 - share
    canvas += share * np.array(paint, np.float32)
    if style == "edge":
        edge = np.clip(0.5 - (np.abs(depth + size * 0.02) - size * 0.02), 0, 1)[..., None]
        canvas *= 1 - edge
