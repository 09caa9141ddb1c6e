"""Pictures of simple scenes: outlines of the six kinds, one shade of each colour, four styles of background.

A picture is drawn at twice its size and reduced, so that edges are smooth at any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]
Point = tuple[float, float]

PAINTS: dict[str, Rgb] = {
    "red": (214, 32, 36),
    "yellow": (250, 214, 30),
    "green": (26, 150, 62),
    "blue": (34, 78, 214),
    "purple": (142, 44, 172),
    "white": (250, 250, 250),
    "black": (16, 16, 18),
}
STYLES = ("plain", "gradient", "stripes", "noise")
_OVERSAMPLING = 2
_NOISE_GRAIN = 48  # the noise is a grid of this many squares a side, whatever the size of the picture


@dataclass(frozen=True)
class Background:
    """A style and its two colours; `angle` (radians), `bands` and `noise_seed` matter to some styles only."""

    style: str
    first: Rgb
    second: Rgb
    angle: float
    bands: int
    noise_seed: int

    def paint(self, size_px: int) -> Image.Image:
        """Return the empty background as an RGB picture of `size_px` by `size_px`."""
        if self.style == "plain":
            return Image.new("RGB", (size_px, size_px), self.first)
        if self.style == "noise":
            return self._noise(size_px)
        share = self._ramp(size_px)
        if self.style == "stripes":
            share = (np.floor(share * self.bands) % 2).astype(np.float32)
        return blend(self.first, self.second, share)

    def _ramp(self, size_px: int) -> np.ndarray:
        """Return 0 to 1 along the direction `angle`, one value for each pixel."""
        axis = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px - 0.5
        along = axis[None, :] * math.cos(self.angle) + axis[:, None] * math.sin(self.angle)
        reach = (abs(math.cos(self.angle)) + abs(math.sin(self.angle))) / 2
        return np.clip(along / (2 * reach) + 0.5, 0.0, 0.9999)

    def _noise(self, size_px: int) -> Image.Image:
        # RandomState and not default_rng: numpy never changes its stream, so a seed gives one picture everywhere.
        share = np.random.RandomState(self.noise_seed).random_sample((_NOISE_GRAIN, _NOISE_GRAIN)).astype(np.float32)
        return blend(self.first, self.second, share).resize((size_px, size_px), Image.Resampling.BILINEAR)


def blend(first: Rgb, second: Rgb, share: np.ndarray) -> Image.Image:
    low, high = np.array(first, np.float32), np.array(second, np.float32)
    return Image.fromarray((low + (high - low) * share[..., None] + 0.5).astype(np.uint8), "RGB")


@dataclass(frozen=True)
class Mark:
    """A filled outline: its middle and radius are fractions of the picture's side, `tilt` is in radians."""

    kind: str
    paint: Rgb
    middle: Point
    radius: float
    tilt: float

    def corners(self, side_px: float) -> list[Point]:
        """Return the outline's corners in a picture of `side_px` by `side_px`."""
        return [_placed(point, self, side_px) for point in OUTLINES[self.kind]]


def paint_picture(background: Background, marks: list[Mark], size_px: int) -> Image.Image:
    """Return the background with all marks on it, RGB, `size_px` by `size_px`."""
    canvas_px = size_px * _OVERSAMPLING
    canvas = background.paint(canvas_px)
    pen = ImageDraw.Draw(canvas)
    for mark in marks:
        pen.polygon(mark.corners(canvas_px), fill=mark.paint)
    return canvas.reduce(_OVERSAMPLING)


def _placed(point: Point, mark: Mark, canvas_px: float) -> Point:
    sine, cosine = math.sin(mark.tilt), math.cos(mark.tilt)
    across, down = point
    x = mark.middle[0] + mark.radius * (across * cosine - down * sine)
    y = mark.middle[1] + mark.radius * (across * sine + down * cosine)
    return x * canvas_px, y * canvas_px


def _ring(corners: int, radii: tuple[float, ...], turn: float = -math.pi / 2) -> list[Point]:
    """Return corners on circles whose radii alternate; the first corner is at the angle `turn`."""
    angles = [turn + 2 * math.pi * step / corners for step in range(corners)]
    reach = [radii[step % len(radii)] for step in range(corners)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(reach, angles, strict=True)]


def _plus(arm: float, reach: float) -> list[Point]:
    quarter = [(-arm, -reach), (arm, -reach), (arm, -arm)]
    turned = quarter
    outline: list[Point] = []
    for _ in range(4):
        outline += turned
        turned = [(-y, x) for x, y in turned]
    return outline


# Unit outlines (radius about 1, y grows downwards), scaled so that the six kinds look about equally big.
OUTLINES: dict[str, list[Point]] = {
    "circle": _ring(72, (0.95,)),
    "square": [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)],
    "triangle": [(0.0, -0.98), (0.98, 0.8), (-0.98, 0.8)],
    "star": _ring(10, (1.08, 0.46)),
    "diamond": [(0.0, -1.1), (0.74, 0.0), (0.0, 1.1), (-0.74, 0.0)],
    "cross": _plus(0.33, 1.0),
}


def colour_distance(first: Rgb, second: Rgb) -> float:
    """Return how different two colours look (CIE76 in L*a*b*): 2 is just noticeable, 40 is obvious."""
    return math.dist(_lab(first), _lab(second))


def _lab(colour: Rgb) -> tuple[float, float, float]:
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in colour]
    red, green, blue = linear
    x = (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    z = (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)
