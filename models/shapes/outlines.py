"""Outlines of the six kinds in many proportions, and of figures that the model does not know.

Each builder takes a random generator and returns the corners of a closed polygon around (0, 0); y grows downwards.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

Point = tuple[float, float]
Outline = list[Point]


def ring(corners: int, radii: tuple[float, ...] = (1.0,), turn: float = -math.pi / 2) -> Outline:
    """Return corners on circles whose radii alternate; the first corner is at the angle `turn`."""
    angles = [turn + 2 * math.pi * step / corners for step in range(corners)]
    reach = [radii[step % len(radii)] for step in range(corners)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(reach, angles, strict=True)]


def stretched(outline: Outline, across: float, down: float) -> Outline:
    """Return the outline scaled by one factor for each axis."""
    return [(x * across, y * down) for x, y in outline]


def rotated(outline: Outline, angle: float) -> Outline:
    """Return the outline turned by `angle` radians around (0, 0)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    return [(x * cosine - y * sine, x * sine + y * cosine) for x, y in outline]


def fitted(outline: Outline, size: float, middle: Point) -> Outline:
    """Return the outline with a bounding box around `middle` whose longer side is `size`."""
    left, right = min(x for x, _ in outline), max(x for x, _ in outline)
    top, bottom = min(y for _, y in outline), max(y for _, y in outline)
    scale = size / max(right - left, bottom - top)
    x0, y0 = (left + right) / 2, (top + bottom) / 2
    return [(middle[0] + (x - x0) * scale, middle[1] + (y - y0) * scale) for x, y in outline]


def wobbled(outline: Outline, rng: random.Random, amount: float) -> Outline:
    """Return the outline as an unsteady hand draws it: `amount` is the deviation in units of the outline."""
    waves = [(rng.randint(2, 7), rng.uniform(0, 6.3), rng.uniform(0, 6.3)) for _ in range(4)]
    points = _with_points_between(outline, 72)
    result: Outline = []
    for step, (x, y) in enumerate(points):
        turn = 2 * math.pi * step / len(points)
        dx = sum(math.sin(wave * turn + first) for wave, first, _ in waves) / 2
        dy = sum(math.sin(wave * turn + second) for wave, _, second in waves) / 2
        result.append((x + amount * dx, y + amount * dy))
    return result


def _with_points_between(outline: Outline, least: int) -> Outline:
    each = max(1, least // len(outline))
    points: Outline = []
    for (x, y), (to_x, to_y) in zip(outline, outline[1:] + outline[:1], strict=True):
        points += [(x + (to_x - x) * step / each, y + (to_y - y) * step / each) for step in range(each)]
    return points


# --- the six kinds ---------------------------------------------------------------------------------------------------


def _circle(rng: random.Random) -> Outline:
    return stretched(ring(64), 1.0, rng.choice((1.0, 1.0, rng.uniform(0.86, 1.16))))


def _square(rng: random.Random) -> Outline:
    outline = rounded_box(rng.uniform(0.1, 0.35)) if rng.random() < 0.15 else ring(4, (1.0,), math.pi / 4)
    outline = stretched(outline, 1.0, rng.choice((1.0, 1.0, rng.uniform(0.86, 1.16))))
    return rotated(outline, _tilt(rng, 20))


def rounded_box(radius: float) -> Outline:
    """Return a square of side 2 with rounded corners."""
    points: Outline = []
    for quarter, (x, y) in enumerate(((1, 1), (-1, 1), (-1, -1), (1, -1))):
        for step in range(7):
            angle = math.pi / 2 * (quarter + step / 6)
            middle_x, middle_y = x * (1 - radius), y * (1 - radius)
            points.append((middle_x + radius * math.cos(angle), middle_y + radius * math.sin(angle)))
    return points


def _triangle(rng: random.Random) -> Outline:
    form = rng.random()
    if form < 0.35:
        outline = ring(3)
    elif form < 0.75:
        outline = stretched([(0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)], 1.0, rng.uniform(0.65, 1.35))
    elif form < 0.87:
        outline = stretched([(-1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)], rng.choice((-1.0, 1.0)), rng.uniform(0.75, 1.3))
    else:
        outline = [(rng.uniform(-0.7, 0.7), -1.0), (1.0, rng.uniform(0.6, 1.0)), (-1.0, rng.uniform(0.6, 1.0))]
    turn = rng.random()
    if turn < 0.5:
        return outline
    return rotated(outline, math.pi if turn < 0.62 else rng.uniform(0, 2 * math.pi))


def _star(rng: random.Random) -> Outline:
    points = rng.choices((5, 6, 4, 8), (0.82, 0.08, 0.06, 0.04))[0]
    inner = rng.uniform(0.28, 0.42) if points == 4 else rng.choice((0.382, 0.4, 0.5, rng.uniform(0.3, 0.6)))
    if points == 8:
        inner = rng.uniform(0.4, 0.65)
    turn = 0.0 if rng.random() < 0.6 else rng.uniform(0, 2 * math.pi)
    return rotated(ring(2 * points, (1.0, inner)), turn if points != 4 else turn % 0.2)


def _diamond(rng: random.Random) -> Outline:
    across = rng.choices((1.0, rng.uniform(0.5, 0.85), rng.uniform(0.85, 1.1), rng.uniform(1.15, 1.7)), (4, 4, 2, 1))[0]
    return rotated(stretched(ring(4), across, 1.0), _tilt(rng, 15))


def _cross(rng: random.Random) -> Outline:
    arm = rng.choice((1 / 3, 0.25, rng.uniform(0.1, 0.42)))
    outline = plus(arm, 1.0)
    if rng.random() < 0.12:
        outline = [(x, y * 1.4 if y > 0.9 else y) for x, y in outline]
    turn = rng.random()
    if turn < 0.78:
        return rotated(outline, _tilt(rng, 20))
    return rotated(outline, math.pi / 4 + _tilt(rng, 15))


def plus(arm: float, reach: float) -> Outline:
    """Return a plus sign: half the width of its arms is `arm`, their length `reach`."""
    turned = [(-arm, -reach), (arm, -reach), (arm, -arm)]
    outline: Outline = []
    for _ in range(4):
        outline += turned
        turned = [(-y, x) for x, y in turned]
    return outline


def _tilt(rng: random.Random, degrees: float) -> float:
    return 0.0 if rng.random() < 0.6 else math.radians(rng.uniform(-degrees, degrees))


KNOWN: dict[str, Callable[[random.Random], Outline]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "diamond": _diamond,
    "cross": _cross,
}

# --- figures that the model does not know ----------------------------------------------------------------------------


def _heart(rng: random.Random) -> Outline:
    turns = [2 * math.pi * step / 60 for step in range(60)]
    return [
        (
            16 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in turns
    ]


def _polygon(rng: random.Random) -> Outline:
    return rotated(ring(rng.choice((5, 6, 6))), rng.choice((0.0, math.pi / 6, rng.uniform(0, 6.3))))


def _arrow(rng: random.Random) -> Outline:
    shaft, head = rng.uniform(0.12, 0.3), rng.uniform(0.0, 0.4)
    outline = [(-1, -shaft), (head, -shaft), (head, -0.7), (1, 0), (head, 0.7), (head, shaft), (-1, shaft)]
    return rotated(outline, rng.choice((0, math.pi / 2, math.pi, -math.pi / 2, rng.uniform(0, 6.3))))


def _crescent(rng: random.Random) -> Outline:
    angles = [math.pi * (0.5 + step / 24) for step in range(25)]
    outer = [(math.cos(a), math.sin(a)) for a in angles]
    depth = rng.uniform(0.2, 0.6)
    inner = [(depth * math.cos(a), math.sin(a)) for a in reversed(angles)]
    return rotated(outer + inner, rng.uniform(0, 6.3))


def _half_disc(rng: random.Random) -> Outline:
    outline = [(math.cos(math.pi * step / 24), -math.sin(math.pi * step / 24)) for step in range(25)]
    return rotated(outline, rng.choice((0, math.pi / 2, math.pi, rng.uniform(0, 6.3))))


def _bar(rng: random.Random) -> Outline:
    outline = stretched(ring(4, (1.0,), math.pi / 4), 1.0, rng.uniform(0.06, 0.22))
    return rotated(outline, rng.choice((0, math.pi / 2, rng.uniform(0, 6.3))))


def _angle(rng: random.Random) -> Outline:
    arm = rng.uniform(0.4, 0.9)
    return rotated(
        [(-1, -1), (-1 + arm, -1), (-1 + arm, 1 - arm), (1, 1 - arm), (1, 1), (-1, 1)], rng.randrange(4) * math.pi / 2
    )


def _lightning(rng: random.Random) -> Outline:
    return [(0.2, -1), (-0.6, 0.1), (-0.05, 0.1), (-0.3, 1), (0.6, -0.25), (0.05, -0.25), (0.5, -1)]


UNKNOWN: tuple[Callable[[random.Random], Outline], ...] = (
    _heart,
    _polygon,
    _polygon,
    _arrow,
    _arrow,
    _crescent,
    _half_disc,
    _bar,
    _angle,
    _lightning,
)
