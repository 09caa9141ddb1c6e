"""Features of pictures and clips, by transformers' `get_image_features` and `get_video_features`.

There is no code of a family here. A model that does not need the sizes of pictures takes all tiles of its pictures as
`pixel_values` `[tiles, 3, height, width]`, and returns the features of each tile. Without `get_video_features` it takes
the frames of a clip in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..ipc.messages import PreparedPicture

_TILES = "pixel_values"
_FRAMES = "pixel_values_videos"
_SIZES = "image_sizes"


@torch.inference_mode()
def encode(
    model: Any, pictures: Sequence[PreparedPicture], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Run vision tower and projector on one clip, or on pictures whose arrays have the same shapes.

    `model`: of transformers, with `get_image_features`; its weights are on `device` in `dtype`, or on the meta device.
    Returns the features of each, `[image tokens, hidden]` in memory of its own. On CUDA the work is only launched.
    """
    arrays = pictures[0].inputs
    if len(pictures) > 1:
        arrays = {name: np.concatenate([picture.inputs[name] for picture in pictures]) for name in arrays}
    # Transformers reads all arrays but the pixels on the host.
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for name in (_TILES, _FRAMES):
        if name in inputs:
            inputs[name] = inputs[name].to(device).to(dtype)
    if _FRAMES in inputs and hasattr(model, "get_video_features"):
        clips: torch.Tensor = model.get_video_features(**inputs, return_dict=True).pooler_output
        return [clip.clone() for clip in clips]  # of [1, tokens, hidden]
    if _SIZES not in inputs:
        inputs = {_TILES: _flat(inputs.get(_TILES, inputs.get(_FRAMES)))}
    # A list of [tokens, hidden]; for tiled pictures it includes the newline features of the rows. Of flat tiles a
    # tensor [tiles, tokens, hidden].
    features = model.get_image_features(**inputs, return_dict=True).pooler_output
    if len(features) != len(pictures):
        features = features.view(len(pictures), -1, features.shape[-1])
    return [rows.clone() for rows in features]


def _flat(pixels: torch.Tensor | None) -> torch.Tensor:
    """Return `[tiles, 3, height, width]` of `[pictures, tiles, 3, height, width]`, or the tensor if it is so already."""
    if pixels is None:
        raise ValueError("the picture has no pixels")
    return pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
