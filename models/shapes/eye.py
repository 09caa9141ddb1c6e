"""Teach the vision tower and the projector to write the code of each patch.

The projector learns to return codes (`codes.py`). Linear heads, which are dropped later, learn kind, colour and extent
of the shapes from the tower's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from models.shapes.build import GRID, IMAGE_TOKENS
from models.shapes.codes import Codes
from models.shapes.pictures import Pictures
from models.shapes.scenes import COLOURS, KINDS

_WEIGHT_OF_CENTRES = torch.tensor(3.0)  # most patches have none
NO_KIND, NO_COLOUR = len(KINDS), len(COLOURS)


@dataclass(frozen=True)
class Truth:
    """What the heads and the projector are to find in a batch, one row a patch."""

    marks: Tensor  # [pictures, tokens, kinds + colours]
    centre_kind: Tensor  # [pictures, tokens] of the shape that the patch names, or NO_KIND
    centre_colour: Tensor
    kind: Tensor  # of the shape in front at the middle of the patch
    colour: Tensor
    offset: Tensor  # [pictures, tokens, 2] to that shape's centre, in shares of the picture
    inside: Tensor

    @classmethod
    def of(cls, batch: Pictures) -> Truth:
        shapes, cover = batch.shapes, batch.cover
        count = len(shapes)
        known = shapes[..., 0] >= 0
        cell = _owners(shapes, known)
        centre_kind = np.full((count, IMAGE_TOKENS), NO_KIND)
        centre_colour = np.full((count, IMAGE_TOKENS), NO_COLOUR)
        picture, row = np.nonzero(known)
        centre_kind[picture, cell[picture, row]] = shapes[picture, row, 0]
        centre_colour[picture, cell[picture, row]] = shapes[picture, row, 1]
        flat = cover.reshape(count, IMAGE_TOKENS).astype(int)
        front = np.take_along_axis(shapes, np.maximum(flat - 1, 0)[..., None].repeat(4, -1), 1)
        inside = flat > 0
        steps = (np.arange(GRID, dtype=np.float32) + 0.5) / GRID
        middles = np.stack(np.meshgrid(steps, steps), -1).reshape(IMAGE_TOKENS, 2)
        kinds, colours = torch.from_numpy(centre_kind), torch.from_numpy(centre_colour)
        marks = torch.cat([F.one_hot(kinds, NO_KIND + 1)[..., :-1], F.one_hot(colours, NO_COLOUR + 1)[..., :-1]], -1)
        return cls(
            marks.float(),
            kinds,
            colours,
            torch.from_numpy(np.where(inside, front[..., 0], NO_KIND).astype(int)),
            torch.from_numpy(np.where(inside, front[..., 1], NO_COLOUR).astype(int)),
            torch.from_numpy((front[..., 2:] - middles).astype(np.float32)),
            torch.from_numpy(inside),
        )


def _owners(shapes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the patch that names each shape, [pictures, shapes].

    That is the middle patch of the shape's place, or the patch with its centre if the place has several shapes. So a
    centre on the border of two patches is rarely ambiguous.
    """
    column, row = (np.clip((shapes[..., axis] * GRID).astype(int), 0, GRID - 1) for axis in (2, 3))
    place = np.where(known, 3 * (row * 3 // GRID) + column * 3 // GRID, -1)
    alone = (place[:, :, None] == place[:, None, :]).sum(-1) == 1
    middle = (3 * (place // 3) + 1) * GRID + 3 * (place % 3) + 1
    return np.where(alone & known, middle, row * GRID + column)


class Eye(nn.Module):
    """Tower (all layers but the last, as the model uses it), projector and the heads of this stage."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        tower = model.model.vision_tower
        self.tower = getattr(tower, "vision_model", tower)
        self.projector = model.model.multi_modal_projector
        self.width = model.config.text_config.hidden_size
        self.unused = (self.tower.encoder.layers[-1], self.tower.post_layernorm)
        sizes = (NO_KIND + 1, NO_COLOUR + 1, NO_KIND + 1, NO_COLOUR + 1, 2)
        self.sizes = sizes
        self.heads = nn.Linear(model.config.vision_config.hidden_size, sum(sizes))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected features and the heads' guesses, [pictures, tokens, ...]."""
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        for layer in self.tower.encoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        tokens = hidden[:, 1:]
        return self.projector(tokens), self.heads(tokens)

    def loss(self, seen: tuple[Tensor, Tensor], truth: Truth, codes: Codes) -> tuple[Tensor, float]:
        """Return the loss of what `forward` gave, and the share of centres found with the right kind and colour."""
        features, guesses = seen
        centre_kind, centre_colour, kind, colour, offset = guesses.float().split(self.sizes, -1)
        hit = truth.centre_kind != NO_KIND
        centre = _cross_entropy(centre_kind, truth.centre_kind) + _cross_entropy(centre_colour, truth.centre_colour)
        centre = centre * torch.where(hit, _WEIGHT_OF_CENTRES, 1.0)
        body = _cross_entropy(kind, truth.kind) + _cross_entropy(colour, truth.colour)
        reach = (offset - truth.offset)[truth.inside].abs().sum() / truth.inside.sum().clamp(min=1) / 2
        code = F.mse_loss(features.float(), codes.of(truth.marks))
        right = (centre_kind.argmax(-1) == truth.centre_kind) & (centre_colour.argmax(-1) == truth.centre_colour)
        return 4 * centre.mean() + body.mean() + reach + 2 * code, right[hit].float().mean().item()

    def scale_features(self, factor: float) -> None:
        """Make the projector return codes times `factor`."""
        with torch.no_grad():
            self.projector.linear_2.weight.mul_(factor)
            self.projector.linear_2.bias.mul_(factor)


def _cross_entropy(guess: Tensor, truth: Tensor) -> Tensor:
    return F.cross_entropy(guess.transpose(1, 2), truth, reduction="none")


def first_weights(eye: Eye) -> None:
    """Set random weights that suit Muon, and wave-like positions: neighbouring patches are alike from the start."""
    embeddings = eye.tower.embeddings
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(_wave_positions(embeddings.position_embedding.weight.shape[1]))
    nn.init.normal_(embeddings.patch_embedding.weight, std=embeddings.patch_embedding.weight[0].numel() ** -0.5)
    for name, parameter in eye.named_parameters():
        if parameter.ndim == 2 and ("layers." in name or "projector" in name):
            gain = 0.7 if "layers." in name else 1.0
            nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)


def _wave_positions(width: int) -> Tensor:
    """Return sines and cosines of row and column, [1 + tokens, width]."""
    quarter = width // 4
    rates = 1.0 / 20 ** (torch.arange(quarter) / quarter)
    steps = torch.arange(GRID)[:, None] * rates * 1.5
    waves = torch.cat([steps.sin(), steps.cos()], -1)
    table = torch.cat([waves[:, None].expand(GRID, GRID, -1), waves[None].expand(GRID, GRID, -1)], -1)
    return torch.cat([torch.zeros(1, width), table.reshape(IMAGE_TOKENS, width)]) * 0.3
