"""Training pictures as the image processor hands them to the model, and what each of their patches shows."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from models.shapes.build import GRID, IMAGE_PX
from models.shapes.drawing import Background
from models.shapes.scenes import COLOURS, HELD_OUT_SEEDS, KINDS, PLACES, Scene, Shape, make_scene
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

    def save(self, path: Path) -> None:
        """Write a file for an Album; it is whole or absent."""
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, pixels=self.pixels, shapes=self.shapes, cover=self.cover)
        part.replace(path)

    def normalized(self) -> Tensor:
        """Return the model's input, as the image processor makes it."""
        mean = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1) * 255
        spread = torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1) * 255
        pixels = torch.from_numpy(np.ascontiguousarray(self.pixels)).permute(0, 3, 1, 2)
        return ((pixels.float() - mean) / spread).bfloat16()

    def picked(self, rows: np.ndarray, turn: int) -> Pictures:
        """Return some of the pictures, mirrored or turned in one of eight ways; no kind or colour changes by that."""
        pixels, shapes, cover = self.pixels[rows], self.shapes[rows], self.cover[rows]
        x, y = shapes[..., 2], shapes[..., 3]
        if turn & 1:
            pixels, cover, x = pixels[:, :, ::-1], cover[:, :, ::-1], 1 - x
        if turn & 2:
            pixels, cover, y = pixels[:, ::-1], cover[:, ::-1], 1 - y
        if turn & 4:
            pixels, cover, x, y = pixels.swapaxes(1, 2), cover.swapaxes(1, 2), y, x
        return Pictures(pixels, np.stack([shapes[..., 0], shapes[..., 1], x, y], -1), cover)


class Album:
    """The pictures that a process trains on: all files of a folder, or every `parts`th of them."""

    def __init__(self, folder: Path, part: int = 0, parts: int = 1) -> None:
        paths = sorted(folder.glob("*.npz"))[part::parts]
        self.files = [Pictures(**np.load(path)) for path in paths]

    def batch(self, count: int, rng: np.random.Generator) -> Pictures:
        """Return random pictures: a quarter each from one file and turned in one way."""
        quarters = []
        for _ in range(4):
            pictures = self.files[rng.integers(len(self.files))]
            rows = rng.integers(0, len(pictures.pixels), count // 4)
            quarters.append(pictures.picked(rows, int(rng.integers(8))))
        return Pictures(
            np.concatenate([quarter.pixels for quarter in quarters]),
            np.concatenate([quarter.shapes for quarter in quarters]),
            np.concatenate([quarter.cover for quarter in quarters]),
        )


def scene_of_row(shapes: np.ndarray) -> Scene:
    """Return the scene of a row of `Pictures.shapes`, for its dialogues only: it cannot be drawn again."""
    placed = []
    for kind, colour, x, y in shapes[shapes[:, 0] >= 0].tolist():
        column, row = min(2, int(3 * x)), min(2, int(3 * y))
        shape = Shape(KINDS[int(kind)], COLOURS[int(colour)], PLACES[3 * row + column], size=1.0, shift=(x, y))
        placed.append((3 * row + column, x, shape))
    ordered = sorted(placed, key=lambda item: item[:2])
    return Scene(tuple(shape for _, _, shape in ordered), Background("plain", (0, 0, 0), (0, 0, 0), 0.0, 0, 0))


def scene_of(seed: int) -> Scene | Sketch:
    """Return what a training seed shows: mostly sketches, some of the simpler scenes."""
    return make_scene(seed) if random.Random(seed).random() < _SCENES else make_sketch(seed)


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
