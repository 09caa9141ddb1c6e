"""Shades of the seven colours as people draw them, and backgrounds that differ from them."""

from __future__ import annotations

import colorsys
import random

from models.shapes.drawing import Rgb, colour_distance

_NAMED: dict[str, tuple[str, ...]] = {
    "red": ("#ff0000", "#ff0000", "#d62024", "#dc143c", "#b22222", "#e74c3c", "#cc0000", "#8b0000"),
    "yellow": ("#ffff00", "#ffff00", "#fad61e", "#ffd700", "#f1c40f", "#ffeb3b", "#e6dc00"),
    "green": ("#008000", "#00ff00", "#1a963e", "#006400", "#32cd32", "#2ecc71", "#228b22", "#00c800"),
    "blue": ("#0000ff", "#0000ff", "#224ed6", "#1e90ff", "#4169e1", "#3498db", "#00008b", "#0000c8"),
    "purple": (
        "#800080",
        "#800080",
        "#8e2cac",
        "#9b59b6",
        "#8a2be2",
        "#9400d3",
        "#ff00ff",
        "#a020f0",
        "#ee82ee",
        "#4b0082",
    ),
    "white": ("#ffffff", "#ffffff", "#fafafa", "#f5f5f5"),
    "black": ("#000000", "#000000", "#101012", "#1e1e1e"),
}
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
        return from_hex(rng.choice(_NAMED[colour]))
    (hue, most_hue), (saturation, most_saturation), (value, most_value) = _RANGES[colour]
    return _rgb(rng.uniform(hue, most_hue), rng.uniform(saturation, most_saturation), rng.uniform(value, most_value))


def from_hex(text: str) -> Rgb:
    """Return the colour of "#rrggbb"."""
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


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
