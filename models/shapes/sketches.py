"""Pictures as people draw them: up to six shapes of any size anywhere, clutter, screenshots, and nothing known at all.

A sketch is made in two steps. `make_sketch(seed)` decides what is where: sizes, places, outlines, colours.
`Sketch.draw` paints it. All lengths are in units of the shorter side of the picture.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image

from models.shapes import outlines, palette, surroundings
from models.shapes.drawing import Rgb
from models.shapes.outlines import Outline, Point
from models.shapes.scenes import COLOURS, KINDS, PLACES, Shape
from models.shapes.strokes import Figure, paint_figure

MOST_SHAPES = 6
LEAST_PX = 16  # no shape is smaller than this in a picture of its nominal size
LEAST_SIZE, MOST_SIZE = 0.12, 0.85  # of the shorter side
_MARGIN = 0.02  # of a side: a shape's centre keeps this distance from the border of two places
_COUNTS = (0.12, 0.26, 0.24, 0.15, 0.1, 0.07, 0.06)  # shares of pictures with 0, 1, ... 6 known shapes


@dataclass(frozen=True)
class Sketch:
    """What is in a picture: `objects` are the shapes that the model knows, in the order in which it lists them."""

    objects: tuple[Shape, ...]
    figures: tuple[Figure, ...]  # all figures from back to front, known or not
    width_px: int
    height_px: int
    surroundings: surroundings.Surroundings

    def draw(self, most_px: int | None = None) -> Image.Image:
        """Return the picture, RGB; `most_px` limits its shorter side."""
        shorter = min(self.width_px, self.height_px)
        scale = min(1.0, most_px / shorter) if most_px else 1.0
        size = round(self.width_px * scale), round(self.height_px * scale)
        over = self.surroundings.oversampling
        canvas = self.surroundings.paint((size[0] * over, size[1] * over))
        for figure in self.figures:
            paint_figure(canvas, figure, min(canvas.size))
        if over > 1:
            canvas = canvas.reduce(over)
        return self.surroundings.develop(canvas)


def make_sketch(seed: int) -> Sketch:
    """Return the sketch of a seed, the same on every machine."""
    rng = random.Random(seed)
    width, height = _picture_size(rng)
    shorter = min(width, height)
    across, down = width / shorter, height / shorter
    count = rng.choices(range(MOST_SHAPES + 1), _COUNTS)[0]
    names = _names(rng, count)
    unknown = rng.choices((0, 1, 2, 3), (4, 4, 2, 1))[0] if not count else int(count < 4 and rng.random() < 0.12)
    spots = _layout(rng, count + unknown, (across, down), LEAST_PX / shorter, unknown)
    paints: list[Rgb] = []
    figures: list[Figure] = []
    shapes: list[tuple[Shape, Point]] = []
    loose = _Habits.pick(rng)
    for number, (middle, size) in enumerate(spots):
        known = number >= unknown and number - unknown < count
        kind, colour = names[number - unknown] if known else ("", rng.choice(COLOURS))
        figure = _figure(rng, kind, colour, middle, size, loose, (across, down), shorter)
        figures.append(figure)
        paints += [figure.fill or figure.line or (0, 0, 0)]
        if known:
            place = _place(middle, (across, down))
            shapes.append((Shape(kind, colour, place, size), (middle[0] / across, middle[1] / down)))
    rng.shuffle(figures)
    around = surroundings.pick(rng, paints, busy=count == 0)
    ordered = sorted(shapes, key=lambda item: (PLACES.index(item[0].place), item[1][0]))
    objects = tuple(_with_shift(shape, middle) for shape, middle in ordered)
    return Sketch(objects, tuple(figures), width, height, around)


def _with_shift(shape: Shape, middle: Point) -> Shape:
    """Return the shape with its centre written as a shift from the middle of its place, in cells."""
    row, column = divmod(PLACES.index(shape.place), 3)
    shift = middle[0] * 3 - column - 0.5, middle[1] * 3 - row - 0.5
    return Shape(shape.kind, shape.colour, shape.place, shape.size, shift)


def centre(shape: Shape) -> Point:
    """Return the centre of a sketch's shape as shares of the picture's width and height."""
    row, column = divmod(PLACES.index(shape.place), 3)
    return (column + 0.5 + shape.shift[0]) / 3, (row + 0.5 + shape.shift[1]) / 3


def _picture_size(rng: random.Random) -> tuple[int, int]:
    """Return width and height: the shorter side has 64 to 1600 pixels."""
    shorter = round(math.exp(rng.uniform(math.log(64), math.log(1600))))
    form = rng.random()
    ratio = 1.0 if form < 0.4 else rng.choice((4 / 3, 1.5, 16 / 9)) if form < 0.65 else rng.uniform(1.0, 2.0)
    if form > 0.95:
        ratio = rng.uniform(1.8, 2.4)
    longer = min(1600, round(shorter * ratio))
    shorter = min(shorter, longer)
    return (longer, shorter) if rng.random() < 0.68 else (shorter, longer)


def _names(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Return (kind, colour) pairs; half of the sketches use few kinds or few colours, a tenth repeats a pair."""
    kinds, colours = KINDS, COLOURS
    if rng.random() < 0.3:
        kinds = tuple(rng.sample(KINDS, 1 + count // 2))
    elif rng.random() < 0.4:
        colours = tuple(rng.sample(COLOURS, min(len(COLOURS), 1 + count // 2)))
    pairs = rng.sample([(kind, colour) for kind in kinds for colour in colours], count)
    if count > 1 and rng.random() < 0.12:
        pairs[rng.randrange(1, count)] = pairs[0]
    return pairs


def _layout(rng: random.Random, count: int, extent: Point, least: float, unknown: int) -> list[tuple[Point, float]]:
    """Return centres and sizes of `count` figures that touch or overlap only a little."""
    least = max(LEAST_SIZE, least)
    closeness = rng.choice((0.86, 0.95, 1.05, 1.2, 1.35))
    room = math.sqrt(extent[0] * extent[1])
    most = MOST_SIZE if count <= 1 else min(MOST_SIZE, 1.05 * room / math.sqrt(count))
    alike = rng.uniform(least, max(least, most)) if rng.random() < 0.35 else None
    for attempt in range(400):
        shrink = 0.985**attempt
        spots: list[tuple[Point, float]] = []
        for number in range(count):
            low = max(least, 0.2) if number < unknown else least
            high = max(low, most * shrink)
            size = max(low, min(high, alike * shrink)) if alike else rng.uniform(low, high)
            spot = _free_spot(rng, spots, size, extent, closeness)
            if spot is None:
                break
            spots.append((spot, size))
        if len(spots) == count:
            return spots
    return spots


def _free_spot(
    rng: random.Random, spots: list[tuple[Point, float]], size: float, extent: Point, closeness: float
) -> Point | None:
    half = size / 2 * rng.choice((1.0, 1.0, 1.0, 0.93))  # now and then the border of the picture cuts a little off
    for _ in range(30):
        x = rng.uniform(min(half, extent[0] / 2), max(extent[0] - half, extent[0] / 2))
        y = rng.uniform(min(half, extent[1] / 2), max(extent[1] - half, extent[1] / 2))
        if rng.random() < 0.2:
            x = extent[0] / 2
        if rng.random() < 0.2:
            y = extent[1] / 2
        if not (_is_clear(x / extent[0]) and _is_clear(y / extent[1])):
            continue
        if all(math.dist((x, y), other) > closeness * (size + of_other) / 2 for other, of_other in spots):
            return x, y
    return None


def _is_clear(share: float) -> bool:
    return abs(share - 1 / 3) >= _MARGIN and abs(share - 2 / 3) >= _MARGIN


@dataclass(frozen=True)
class _Habits:
    """How the person who made the drawing works; alike for all of its figures."""

    wobble: float
    line_share: float  # of outlined figures without a fill
    edge_share: float  # of filled figures with a line around them
    pen: float  # width of lines in units of the shorter side

    @classmethod
    def pick(cls, rng: random.Random) -> _Habits:
        wobble = rng.uniform(0.008, 0.035) if rng.random() < 0.35 else 0.0
        line_share = rng.choices((0.0, 1.0, 0.4), (70, 18, 12))[0]
        edge_share = rng.choices((0.0, 1.0), (82, 18))[0]
        return cls(wobble, line_share, edge_share, math.exp(rng.uniform(math.log(0.011), math.log(0.05))))


def _figure(
    rng: random.Random,
    kind: str,
    colour: str,
    middle: Point,
    size: float,
    habits: _Habits,
    extent: Point,
    shorter_px: int,
) -> Figure:
    builder = outlines.KNOWN[kind] if kind else rng.choice(outlines.UNKNOWN)
    for _ in range(30):
        outline: Outline = builder(rng)
        if habits.wobble:
            outline = outlines.wobbled(outlines.fitted(outline, 2.0, (0.0, 0.0)), rng, habits.wobble)
        outline = outlines.fitted(outline, size, middle)
        if kind != "triangle" or _place(_mean(outline), extent) == _place(middle, extent):
            break
    paint = palette.shade(colour, rng)
    pen = max(min(habits.pen, size * 0.16), 1.6 / shorter_px)
    if rng.random() < habits.line_share:
        return Figure(tuple(outline), None, paint, pen, kind, colour)
    line = None
    if rng.random() < habits.edge_share:
        line = rng.choice(((0, 0, 0), (0, 0, 0), (40, 40, 40), tuple(part // 2 for part in paint)))
        pen = min(pen, size * 0.06)
    return Figure(tuple(outline), paint, line, pen, kind, colour)


def _mean(points: Outline) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _place(point: Point, extent: Point) -> str:
    """Return the name of the ninth of the picture that holds a point; `extent` is the picture's width and height."""
    column, row = (min(2, int(3 * along / whole)) for along, whole in zip(point, extent, strict=True))
    return PLACES[3 * row + column]
