"""Stage 1: teach the vision tower and the projector to write down what each patch shows.

The language model is taught at the same time, in another process, on the *codes* of this file in place of features.
The code of a patch is a fixed random vector for its position, plus one for the kind and one for the colour of the shape
whose centre is in the patch. The projector learns to return these codes; linear heads, which are dropped later, learn
kind, colour and extent of the shapes from the tower's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from models.shapes.build import GRID, IMAGE_TOKENS
from models.shapes.scenes import COLOURS, KINDS

_CODE_SEED = 20
NO_KIND, NO_COLOUR = len(KINDS), len(COLOURS)


class Codes:
    """The fixed vectors: `kinds` and `colours` of a shape with its centre in a patch, `patches` of every patch."""

    def __init__(self, width: int) -> None:
        source = torch.Generator().manual_seed(_CODE_SEED)
        self.kinds = torch.randn(len(KINDS), width, generator=source)
        self.colours = torch.randn(len(COLOURS), width, generator=source)
        rows, columns = torch.randn(2, GRID, width, generator=source)
        thirds = torch.randn(9, width, generator=source)
        places = [3 * (row * 3 // GRID) + column * 3 // GRID for row in range(GRID) for column in range(GRID)]
        grid = (rows[:, None] + columns[None, :]).reshape(IMAGE_TOKENS, width)
        self.patches = 0.3 * grid + 0.42 * thirds[places]

    def of(self, marks: Tensor) -> Tensor:
        """Return the codes [pictures, tokens, width] of `marks` [pictures, tokens, kinds + colours] (0 to 1)."""
        kinds, colours = marks.split((len(KINDS), len(COLOURS)), -1)
        return self.patches + kinds @ self.kinds + colours @ self.colours


def flipped(pixels: np.ndarray, shapes: np.ndarray, cover: np.ndarray, turn: int) -> tuple[np.ndarray, ...]:
    """Return a batch mirrored or turned in one of eight ways: no kind and no colour changes by that."""
    shapes = shapes.copy()
    x, y = shapes[..., 2], shapes[..., 3]
    if turn & 1:
        pixels, cover, x = pixels[:, :, ::-1], cover[:, :, ::-1], 1 - x
    if turn & 2:
        pixels, cover, y = pixels[:, ::-1], cover[:, ::-1], 1 - y
    if turn & 4:
        pixels, cover, x, y = pixels.swapaxes(1, 2), cover.swapaxes(1, 2), y, x
    shapes[..., 2], shapes[..., 3] = x, y
    return pixels, shapes, cover


@dataclass(frozen=True)
class Truth:
    """What the heads and the projector are to find in a batch, one row a patch."""

    marks: Tensor  # [pictures, tokens, kinds + colours]
    centre_kind: Tensor  # [pictures, tokens], NO_KIND where no centre is
    centre_colour: Tensor
    kind: Tensor  # of the shape in front at the middle of the patch
    colour: Tensor
    offset: Tensor  # [pictures, tokens, 2] to that shape's centre, in shares of the picture
    inside: Tensor

    @classmethod
    def of(cls, shapes: np.ndarray, cover: np.ndarray) -> Truth:
        count = len(shapes)
        known = shapes[..., 0] >= 0
        cell = (np.clip(shapes[..., 3] * GRID, 0, GRID - 1).astype(int) * GRID
                + np.clip(shapes[..., 2] * GRID, 0, GRID - 1).astype(int))  # fmt: skip
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


class Eye(nn.Module):
    """Tower (all layers but the last, as the model uses it), projector and the heads of this stage."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        tower = model.model.vision_tower
        self.tower = getattr(tower, "vision_model", tower)
        self.projector = model.model.multi_modal_projector
        width = model.config.vision_config.hidden_size
        sizes = (NO_KIND + 1, NO_COLOUR + 1, NO_KIND + 1, NO_COLOUR + 1, 2)
        self.sizes = sizes
        self.heads = nn.Linear(width, sum(sizes))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected features and the heads' guesses, [pictures, tokens, ...]."""
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        for layer in self.tower.encoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        tokens = hidden[:, 1:]
        return self.projector(tokens), self.heads(tokens)

    def loss(self, pixels: Tensor, truth: Truth, codes: Codes) -> tuple[Tensor, dict[str, float]]:
        features, guesses = self(pixels)
        centre_kind, centre_colour, kind, colour, offset = guesses.float().split(self.sizes, -1)
        weights = torch.ones(IMAGE_TOKENS * len(pixels))
        hit = truth.centre_kind.flatten() != NO_KIND
        centre = _cross_entropy(centre_kind, truth.centre_kind) + _cross_entropy(centre_colour, truth.centre_colour)
        centre = (centre * torch.where(hit, 3.0, weights)).mean()
        body = (_cross_entropy(kind, truth.kind) + _cross_entropy(colour, truth.colour)).mean()
        reach = (offset - truth.offset)[truth.inside].abs().mean() if truth.inside.any() else torch.zeros(())
        code = F.mse_loss(features.float(), codes.of(truth.marks))
        loss = 4 * centre + body + reach + 2 * code
        with torch.no_grad():
            found = centre_kind.flatten(0, 1).argmax(-1)
            exact = ((found == truth.centre_kind.flatten()) &
                     (centre_colour.flatten(0, 1).argmax(-1) == truth.centre_colour.flatten()))  # fmt: skip
            figures = {
                "centre": centre.item(), "body": body.item(), "reach": reach.item(), "code": code.item(),
                "hit": exact[hit].float().mean().item(),
                "exact": exact.view(len(pixels), -1).all(-1).float().mean().item(),
            }  # fmt: skip
        return loss, figures


def _cross_entropy(guess: Tensor, truth: Tensor) -> Tensor:
    return F.cross_entropy(guess.flatten(0, 1), truth.flatten(), reduction="none")


def wave_positions(width: int) -> Tensor:
    """Return first values for the tower's position table: sines of row and column, so that neighbours are alike."""
    quarter = width // 4
    rates = 1.0 / 20 ** (torch.arange(quarter) / quarter)
    steps = torch.arange(GRID)[:, None] * rates * 1.5
    waves = torch.cat([steps.sin(), steps.cos()], -1)
    table = torch.cat([waves[:, None].expand(GRID, GRID, -1), waves[None].expand(GRID, GRID, -1)], -1)
    return torch.cat([torch.zeros(1, width), table.reshape(IMAGE_TOKENS, width)]) * 0.3
