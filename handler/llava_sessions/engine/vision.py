"""Features of pictures and clips, by transformers' `get_image_features` and `get_video_features`.

There is no code of a family here. If a picture's tiles have no `image_sizes`, the model takes all tiles of its pictures
as `pixel_values` `[tiles, 3, height, width]` and returns the features of each tile. Without `get_video_features` it
takes all frames of a clip in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..ipc.messages import PreparedPicture
from .frames import encode_in_pieces

# Most frames of a clip, or tiles of a model that takes them flat, in one call of the vision tower: the temporary memory
# of a clip is then at most that of 8 pictures, for which the budget has room (tests/engine/test_budget.py).
MOST_FRAMES = 8
# The same on a CPU, where a batch is no faster, and other sessions wait for each call.
MOST_FRAMES_ON_CPU = 2
_TILES = "pixel_values"
_FRAMES = "pixel_values_videos"


def is_clip(picture: PreparedPicture) -> bool:
    """Return whether the arrays are those of a clip."""
    return _FRAMES in picture.inputs


@torch.inference_mode()
def encode(
    model: Any, pictures: Sequence[PreparedPicture], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Run vision tower and projector on one clip, or on pictures whose arrays have the same shapes.

    `model`: of transformers, with `get_image_features`; its weights are on `device` in `dtype`, or on the meta device.
    Returns the features of each picture, `[image tokens, hidden]` in memory of its own. On CUDA the work is only
    launched.
    """
    if is_clip(pictures[0]):
        return [_last(clip_pieces(model, pictures[0], dtype, device))]
    arrays = pictures[0].inputs
    if len(pictures) > 1:
        arrays = {name: np.concatenate([picture.inputs[name] for picture in pictures]) for name in arrays}
    # Transformers reads all arrays but the pixels on the host.
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if inputs[_TILES].ndim == 5 and "image_sizes" not in inputs:
        features = _last(_flat_pieces(model, inputs[_TILES].flatten(0, 1), dtype, device))
        return [rows.clone() for rows in features.view(len(pictures), -1, features.shape[-1])]
    inputs[_TILES] = inputs[_TILES].to(device).to(dtype)
    # A list of [tokens, hidden]; for tiled pictures it includes the newline features of the rows.
    return [rows.clone() for rows in model.get_image_features(**inputs, return_dict=True).pooler_output]


@torch.inference_mode()
def clip_pieces(
    model: Any, clip: PreparedPicture, dtype: torch.dtype, device: torch.device
) -> Iterator[torch.Tensor | None]:
    """Encode a clip as `encode` does, some frames at a time.

    Yields None after each piece but the last one, and then the features `[image tokens, hidden]`.
    """
    frames = torch.from_numpy(clip.inputs[_FRAMES]).flatten(0, 1)
    if not hasattr(model, "get_video_features"):
        yield from _flat_pieces(model, frames, dtype, device)
        return

    def encode_frames(part: torch.Tensor) -> torch.Tensor:
        pixels = part.to(device).to(dtype)[None]
        features: torch.Tensor = model.get_video_features(pixel_values_videos=pixels, return_dict=True).pooler_output
        return features[0]

    yield from encode_in_pieces(encode_frames, frames, _most_frames(device))


def _flat_pieces(
    model: Any, tiles: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> Iterator[torch.Tensor | None]:
    """As `clip_pieces`, for tiles or frames `[tiles, 3, height, width]` of a model that takes them flat."""

    def encode_tiles(part: torch.Tensor) -> torch.Tensor:
        features = model.get_image_features(pixel_values=part.to(device).to(dtype), return_dict=True).pooler_output
        flat: torch.Tensor = features.flatten(0, 1)  # of [tiles, tokens, hidden]
        return flat

    return encode_in_pieces(encode_tiles, tiles, _most_frames(device))


def _most_frames(device: torch.device) -> int:
    return MOST_FRAMES_ON_CPU if device.type == "cpu" else MOST_FRAMES


def _last(pieces: Iterator[torch.Tensor | None]) -> torch.Tensor:
    """Run all pieces; return the features."""
    *_, features = pieces
    assert features is not None
    return features
