"""Shades of the seven colours as people draw them, and backgrounds that differ from them."""

from __future__ import annotations

import colorsys
import random

from models.shapes.drawing import Rgb, colour_distance

_NAMED: dict[str, tuple[Rgb, ...]] = {
    "red": ((255, 0, 0), (255, 0, 0), (214, 32, 36), (220, 20, 60), (178, 34, 34), (231, 76, 60), (204, 0, 0), (139, 0, 0)),
    "yellow": ((255, 255, 0), (255, 255, 0), (250, 214, 30), (255, 215, 0), (241, 196, 15), (255, 235, 59), (230, 220, 0)),
    "green": ((0, 128, 0), (0, 255, 0), (26, 150, 62), (0, 100, 0), (50, 205, 50), (46, 204, 113), (34, 139, 34), (0, 200, 0)),
    "blue": ((0, 0, 255), (0, 0, 255), (34, 78, 214), (30, 144, 255), (65, 105, 225), (52, 152, 219), (0, 0, 139), (0, 0, 200)),
    "purple": ((128, 0, 128), (128, 0, 128), (142, 44, 172), (155, 89, 182), (138, 43, 226), (148, 0, 211), (255, 0, 255),
               (160, 32, 240), (238, 130, 238), (75, 0, 130)),
    "white": ((255, 255, 255), (255, 255, 255), (250, 250, 250), (245, 245, 245)),
    "black": ((0, 0, 0), (0, 0, 0), (16, 16, 18), (30, 30, 30)),
}  # fmt: skip
# Hue in degrees, saturation and value: the least and the most of each.
_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-13, 10), (0.62, 1.0), (0.5, 1.0)),
    "yellow": ((46, 63), (0.55, 1.0), (0.8, 1.0)),
    "green": ((86, 160), (0.4, 1.0), (0.3, 1.0)),
    "blue": ((200, 248), (0.5, 1.0), (0.45, 1.0)),
    "purple": ((268, 312), (0.38, 1.0), (0.38, 1.0)),
    "white": ((0, 360), (0.0, 0.03), (0.94, 1.0)),
    "black": ((0, 360), (0.0, 0.25), (0.0, 0.14)),
}
LEAST_DISTANCE = 30.0


def shade(colour: str, rng: random.Random) -> Rgb:
    """Return one of the shades that people call `colour`; half of them are the usual named ones."""
    if rng.random() < 0.5:
        return rng.choice(_NAMED[colour])
    (hue, most_hue), (saturation, most_saturation), (value, most_value) = _RANGES[colour]
    return _rgb(rng.uniform(hue, most_hue), rng.uniform(saturation, most_saturation), rng.uniform(value, most_value))


def _rgb(hue: float, saturation: float, value: float) -> Rgb:
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def ground(rng: random.Random) -> Rgb:
    """Return a background colour: often white, else grey, dark, pale or anything."""
    form = rng.random()
    if form < 0.36:
        return (255, 255, 255)
    if form < 0.44:
        return _rgb(rng.uniform(0, 360), rng.uniform(0, 0.12), rng.uniform(0.9, 1.0))
    if form < 0.6:
        grey = rng.randint(60, 235)
        return grey, grey, grey
    if form < 0.74:
        return rng.choice(
            (
                (0, 0, 0),
                (20, 20, 20),
                (30, 30, 46),
                _rgb(rng.uniform(0, 360), rng.uniform(0, 0.6), rng.uniform(0.05, 0.3)),
            )
        )
    if form < 0.88:
        return _rgb(rng.uniform(0, 360), rng.uniform(0.1, 0.4), rng.uniform(0.75, 1.0))
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def ground_for(paints: list[Rgb], rng: random.Random) -> Rgb:
    """Return a background colour far enough from all `paints` to see them."""
    for _ in range(60):
        paint = ground(rng)
        if is_far(paint, paints):
            return paint
    return max(((255, 255, 255), (128, 128, 128), (0, 0, 0), (150, 100, 70)), key=lambda paint: _least(paint, paints))


def is_far(paint: Rgb, others: list[Rgb], least: float = LEAST_DISTANCE) -> bool:
    return all(colour_distance(paint, other) > least for other in others)


def _least(paint: Rgb, others: list[Rgb]) -> float:
    return min(colour_distance(paint, other) for other in others)


def near(paint: Rgb, others: list[Rgb], rng: random.Random) -> Rgb:
    """Return a colour not far from `paint` for a gradient or a pattern, still far from all `others`."""
    for _ in range(20):
        spread = rng.choice((15, 40, 90))
        second = tuple(min(255, max(0, part + rng.randint(-spread, spread))) for part in paint)
        middle = tuple((a + b) // 2 for a, b in zip(paint, second, strict=True))
        if is_far(second, others) and is_far(middle, others):  # type: ignore[arg-type]
            return second  # type: ignore[return-value]
    return paint
