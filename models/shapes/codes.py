"""Codes: what the eye learns to write about each patch, and what the language model learns to read.

The code of a patch is a sum of fixed vectors. In a patch with the centre of a shape these are the vectors of the
shape's kind and colour and of the patch's place; any other patch has the vector of an empty place. The vectors come
from version 1 of the model: its features of simple scenes, split into parts by least squares. This version starts with
the language model of version 1, which can therefore read the codes of simple scenes from the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from models.shapes.build import GRID, IMAGE_TOKENS
from models.shapes.scenes import COLOURS, KINDS, PLACES, make_scene

_SCENES, _BATCH = 1_500, 50
_SIZES = (len(KINDS), len(COLOURS), len(PLACES))


@dataclass(frozen=True)
class Codes:
    """The vectors, divided by `scale`, so that codes have a spread of about 1."""

    kinds: Tensor  # [kinds, width]
    colours: Tensor  # [colours, width]
    patches: Tensor  # [tokens, width], for the place of a patch with a centre
    empty: Tensor  # [tokens, width], for any other patch
    scale: float

    @classmethod
    def of_version_1(cls, folder: Path) -> Codes:
        """Return the codes that the language model of version 1 reads."""
        features, shapes, empty = _features(folder)
        marks = torch.cat([F.one_hot(shapes[:, part], size) for part, size in enumerate(_SIZES)], 1).float()
        vectors = torch.linalg.lstsq(F.pad(marks, (0, 1), value=1.0), features, driver="gelsd").solution
        scale = features.std()
        kinds, colours, places, base = (vectors / scale).split((*_SIZES, 1))
        patches = [divmod(patch, GRID) for patch in range(IMAGE_TOKENS)]
        place_of_patch = [3 * (row * 3 // GRID) + column * 3 // GRID for row, column in patches]
        return cls(kinds, colours, (places + base)[place_of_patch], (empty / scale)[place_of_patch], float(scale))

    def of(self, marks: Tensor) -> Tensor:
        """Return the codes [pictures, tokens, width] of `marks` [pictures, tokens, kinds + colours] (0 to 1)."""
        kinds, colours = marks.split((len(KINDS), len(COLOURS)), -1)
        there = kinds.sum(-1, keepdim=True)
        return (1 - there) * self.empty + kinds @ self.kinds + colours @ self.colours + there * self.patches


@torch.no_grad()
def _features(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return what version 1 sees in its nine patches.

    Features of patches with a shape, the kind, colour and place of these shapes, and mean features of empty places.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    images = AutoProcessor.from_pretrained(folder).image_processor
    features: list[Tensor] = []
    shapes: list[tuple[int, int, int]] = []
    empty: list[list[Tensor]] = [[] for _ in PLACES]
    for start in range(0, _SCENES, _BATCH):
        scenes = [make_scene(seed) for seed in range(start, start + _BATCH)]
        pixels = images(images=[scene.draw(144) for scene in scenes], return_tensors="pt")["pixel_values"]
        seen = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        for scene, patches in zip(scenes, seen, strict=True):
            there = {PLACES.index(shape.place): shape for shape in scene.objects}
            for place, feature in enumerate(patches):
                if shape := there.get(place):
                    features.append(feature)
                    shapes.append((KINDS.index(shape.kind), COLOURS.index(shape.colour), place))
                else:
                    empty[place].append(feature)
    return torch.stack(features), torch.tensor(shapes), torch.stack([torch.stack(seen).mean(0) for seen in empty])
