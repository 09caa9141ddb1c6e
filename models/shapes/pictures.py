"""Training pictures as the image processor hands them to the model, and what each of their patches shows."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from models.shapes.build import GRID, IMAGE_PX
from models.shapes.scenes import COLOURS, HELD_OUT_SEEDS, KINDS, make_scene
from models.shapes.sketches import MOST_SHAPES, Sketch, centre, make_sketch

_SCENES = 0.1  # share of the simpler pictures of `scenes`
_MOST_PX = 360  # larger pictures are drawn smaller: the model sees 144 pixels of them


@dataclass(frozen=True)
class Pictures:
    """`pixels` [pictures, px, px, 3] bytes; the rest describes the known shapes of each picture.

    `shapes` [pictures, 6, 4]: kind, colour and centre (0 to 1 across and down), -1 where there is no shape.
    `cover` [pictures, GRID, GRID]: 1 + the number of the shape at the middle of each patch, 0 for none.
    """

    pixels: np.ndarray
    shapes: np.ndarray
    cover: np.ndarray

    @classmethod
    def of(cls, seeds: range) -> Pictures:
        """Draw the pictures of training seeds."""
        if seeds.stop > HELD_OUT_SEEDS.start:
            raise ValueError(f"`seeds` must end before {HELD_OUT_SEEDS.start}, got {seeds}")
        pixels = np.zeros((len(seeds), IMAGE_PX, IMAGE_PX, 3), np.uint8)
        shapes = np.full((len(seeds), MOST_SHAPES, 4), -1, np.float32)
        cover = np.zeros((len(seeds), GRID, GRID), np.uint8)
        for row, seed in enumerate(seeds):
            pixels[row], shapes[row], cover[row] = _drawn(seed)
        return cls(pixels, shapes, cover)


def scene_of(seed: int) -> Sketch:
    """Return what a training seed shows: mostly sketches, some of the simpler scenes."""
    return make_scene(seed) if random.Random(seed).random() < _SCENES else make_sketch(seed)  # type: ignore[return-value]


def _drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scene = scene_of(seed)
    if isinstance(scene, Sketch):
        picture, extent = scene.draw(_MOST_PX), (scene.width_px, scene.height_px)
        areas = [(figure.kind, figure.colour, figure.outline) for figure in scene.figures]
    else:
        picture, extent = scene.draw(random.Random(seed).choice((112, 144, 224, 336))), (1, 1)
        areas = [(shape.kind, shape.colour, shape.mark().corners(1)) for shape in scene.objects]
    shapes = np.full((MOST_SHAPES, 4), -1, np.float32)
    for row, shape in enumerate(scene.objects):
        shapes[row] = KINDS.index(shape.kind), COLOURS.index(shape.colour), *centre(shape)
    small = picture.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)
    return np.asarray(small), shapes, _cover(areas, shapes, extent)


def _cover(areas: list, shapes: np.ndarray, extent: tuple[int, int]) -> np.ndarray:
    """Return which shape is in front at the middle of each patch."""
    fine = GRID * 3
    plan = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(plan)
    across, down = extent[0] / min(extent), extent[1] / min(extent)
    for kind, colour, outline in areas:
        corners = [(x / across * fine, y / down * fine) for x, y in outline]
        pen.polygon(corners, fill=_number(kind, colour, corners, shapes, fine) if kind else 0)
    return np.asarray(plan)[1::3, 1::3]


def _number(kind: str, colour: str, corners: list, shapes: np.ndarray, fine: int) -> int:
    """Return 1 + the row of the shape of this kind and colour that is nearest to the outline."""
    x = (min(x for x, _ in corners) + max(x for x, _ in corners)) / 2 / fine
    y = (min(y for _, y in corners) + max(y for _, y in corners)) / 2 / fine
    alike = (shapes[:, 0] == KINDS.index(kind)) & (shapes[:, 1] == COLOURS.index(colour))
    distance = np.hypot(shapes[:, 2] - x, shapes[:, 3] - y) + np.where(alike, 0, 9)
    return 1 + int(distance.argmin())
