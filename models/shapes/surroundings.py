"""Everything in a sketch that is no figure: background, text, scribbles, a screenshot's frame, the file's artefacts."""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from models.shapes import drawing, palette
from models.shapes.drawing import Rgb

_TEXT = (
    "Untitled Document File Edit View Help my drawing shapes notes page 1 draft hello world test figure Fig. 2 "
    "Monday 12:30 Save Share 100% new layer brush A B C x y title the quick brown fox lorem ipsum score: 42"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Surroundings:
    """The background's colours and style, and what else is on it."""

    style: str
    first: Rgb
    second: Rgb
    inks: tuple[Rgb, ...]  # colours for text and scribbles
    texts: int
    scribbles: int
    window: bool
    seed: int
    oversampling: int
    jpeg_quality: int  # 0: no JPEG
    blur: float

    def paint(self, size: tuple[int, int]) -> Image.Image:
        """Return the canvas before any figure is on it."""
        rng = random.Random(self.seed)
        canvas = _background(self, size, rng)
        unit = min(size)
        pen = ImageDraw.Draw(canvas)
        for _ in range(self.scribbles):
            _scribble(pen, size, unit, rng, rng.choice(self.inks))
        for _ in range(self.texts):
            _text(pen, size, unit, rng, rng.choice(self.inks))
        if self.window:
            _window(pen, size, unit, rng)
        return canvas

    def develop(self, picture: Image.Image) -> Image.Image:
        """Return the picture with the traces of a lens and of a file format."""
        if self.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(self.blur * min(picture.size)))
        if self.jpeg_quality:
            coded = io.BytesIO()
            picture.save(coded, "JPEG", quality=self.jpeg_quality)
            picture = Image.open(coded).convert("RGB")
        return picture


def pick(rng: random.Random, paints: list[Rgb], busy: bool) -> Surroundings:
    """Return random surroundings whose background differs from all `paints`; `busy` ones hold more text and lines."""
    first = palette.ground_for(paints, rng) if paints else palette.ground(rng)
    second = palette.near(first, paints, rng)
    style = rng.choices(("plain", "gradient", "stripes", "noise", "blobs", "grid"), (62, 11, 7, 9, 5, 6))[0]
    inks = tuple(
        rng.choice(((0, 0, 0), (60, 60, 60), (120, 120, 120), (255, 255, 255), (30, 60, 160), palette.ground(rng)))
        for _ in range(3)
    )
    return Surroundings(
        style=style,
        first=first,
        second=second,
        inks=inks,
        texts=rng.choices((0, 1, 2, 5), (50, 20, 15, 15) if busy else (86, 7, 4, 3))[0],
        scribbles=rng.choices((0, 1, 3, 8), (55, 15, 15, 15) if busy else (94, 3, 2, 1))[0],
        window=rng.random() < 0.08,
        seed=rng.randrange(2**31),
        oversampling=rng.choice((1, 2)),
        jpeg_quality=rng.randint(30, 95) if rng.random() < 0.3 else 0,
        blur=rng.uniform(0.002, 0.008) if rng.random() < 0.08 else 0.0,
    )


def _background(around: Surroundings, size: tuple[int, int], rng: random.Random) -> Image.Image:
    width, height = size
    if around.style == "plain":
        return Image.new("RGB", size, around.first)
    if around.style == "grid":
        canvas = Image.new("RGB", size, around.first)
        pen = ImageDraw.Draw(canvas)
        step = max(3.0, rng.uniform(0.03, 0.15) * min(size))
        for number in range(int(width / step) + 1):
            pen.line([(number * step, 0), (number * step, height)], fill=around.second)
        if rng.random() < 0.7:
            for number in range(int(height / step) + 1):
                pen.line([(0, number * step), (width, number * step)], fill=around.second)
        return canvas
    if around.style in ("noise", "blobs"):
        grain = rng.randint(3, 7) if around.style == "blobs" else rng.choice((24, 48, 96, 200))
        share = np.random.RandomState(rng.randrange(2**31)).random_sample((grain, grain)).astype(np.float32)
        return drawing.blend(around.first, around.second, share).resize(size, Image.Resampling.BILINEAR)
    angle = rng.choice((0.0, math.pi / 2, rng.uniform(0, math.pi)))
    x = (np.arange(width, dtype=np.float32) + 0.5) / width - 0.5
    y = (np.arange(height, dtype=np.float32) + 0.5) / height - 0.5
    along = x[None, :] * math.cos(angle) + y[:, None] * math.sin(angle)
    share = np.clip(along / (abs(math.cos(angle)) + abs(math.sin(angle))) + 0.5, 0.0, 0.9999)
    if around.style == "stripes":
        share = (np.floor(share * rng.randint(4, 20)) % 2).astype(np.float32)
    return drawing.blend(around.first, around.second, share)


def _text(pen: ImageDraw.ImageDraw, size: tuple[int, int], unit: int, rng: random.Random, ink: Rgb) -> None:
    height = max(8.0, rng.uniform(0.03, 0.1) * unit)
    words = " ".join(rng.choices(_WORDS, k=rng.randint(1, 4)))
    spot = (
        rng.uniform(-0.05, 0.7) * size[0],
        rng.choice((rng.uniform(0, 0.08), rng.uniform(0.85, 0.95), rng.random())) * size[1],
    )
    pen.text(spot, words, fill=ink, font=ImageFont.load_default(height))


def _scribble(pen: ImageDraw.ImageDraw, size: tuple[int, int], unit: int, rng: random.Random, ink: Rgb) -> None:
    width = max(1, round(rng.uniform(0.004, 0.02) * unit))
    if rng.random() < 0.4:
        ends = [(rng.uniform(0, size[0]), rng.uniform(0, size[1])) for _ in range(2)]
        pen.line(ends, fill=ink, width=width)
        return
    x, y, angle = rng.uniform(0.1, 0.9) * size[0], rng.uniform(0.1, 0.9) * size[1], rng.uniform(0, 6.3)
    bend, points = rng.uniform(-0.2, 0.2), []
    for _ in range(rng.randint(8, 50)):
        points.append((x, y))
        bend += rng.uniform(-0.35, 0.35)
        bend *= 0.9
        angle += bend
        x, y = x + 0.03 * unit * math.cos(angle), y + 0.03 * unit * math.sin(angle)
    pen.line(points, fill=ink, width=width, joint="curve")


def _window(pen: ImageDraw.ImageDraw, size: tuple[int, int], unit: int, rng: random.Random) -> None:
    """Paint the title bar and the frame of a window over the background."""
    bar = rng.uniform(0.04, 0.1) * unit
    shade = rng.choice(((230, 230, 230), (50, 50, 55), (200, 205, 215), (245, 245, 245), (30, 90, 170)))
    margin = rng.choice((0.0, 0.0, rng.uniform(0.005, 0.03))) * unit
    if margin:
        for side in (
            (0, 0, margin, size[1]),
            (size[0] - margin, 0, size[0], size[1]),
            (0, size[1] - margin, size[0], size[1]),
        ):
            pen.rectangle(side, fill=shade)
    pen.rectangle((0, 0, size[0], bar), fill=shade)
    buttons = rng.choice((((255, 95, 86), (255, 189, 46), (39, 201, 63)), ((120, 120, 120),) * 3, ()))
    left = rng.random() < 0.5
    for number, paint in enumerate(buttons):
        x = (0.5 + number) * bar if left else size[0] - (0.5 + number) * bar
        pen.ellipse((x - bar * 0.22, bar * 0.28, x + bar * 0.22, bar * 0.72), fill=paint)
    if rng.random() < 0.7:
        ink = (255, 255, 255) if sum(shade) < 380 else (40, 40, 40)
        pen.text(
            (size[0] * 0.4, bar * 0.2),
            " ".join(rng.choices(_WORDS, k=2)),
            fill=ink,
            font=ImageFont.load_default(max(6.0, bar * 0.6)),
        )
