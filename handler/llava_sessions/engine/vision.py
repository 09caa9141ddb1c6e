"""Features of pictures and clips, by transformers' `get_image_features` and `get_video_features`.

There is no code of a family here. Where tiles come without `image_sizes`, the model takes all tiles of its pictures as
`pixel_values` `[tiles, 3, height, width]` and returns the features of each tile. Without `get_video_features` it takes
all frames of a clip in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..ipc.messages import PreparedPicture
from .frames import encode_in_pieces

# Most frames of a clip, or tiles of a model that takes them flat, in one call of the vision tower: the temporary memory
# of a clip is then at most that of 8 pictures, for which the budget has room (tests/engine/test_budget.py).
MOST_FRAMES = 8
_TILES = "pixel_values"
_FRAMES = "pixel_values_videos"


@torch.inference_mode()
def encode(
    model: Any, pictures: Sequence[PreparedPicture], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Run vision tower and projector on one clip, or on pictures whose arrays have the same shapes.

    `model`: of transformers, with `get_image_features`; its weights are on `device` in `dtype`, or on the meta device.
    A clip is encoded in pieces of `MOST_FRAMES` frames. Returns the features of each picture, `[image tokens, hidden]`
    in memory of its own. On CUDA the work is only launched.
    """
    arrays = pictures[0].inputs
    if len(pictures) > 1:
        arrays = {name: np.concatenate([picture.inputs[name] for picture in pictures]) for name in arrays}
    # Transformers reads all arrays but the pixels on the host.
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def encode_clip(frames: torch.Tensor) -> torch.Tensor:
        pixels = frames.to(device).to(dtype)[None]
        clip: torch.Tensor = model.get_video_features(pixel_values_videos=pixels, return_dict=True).pooler_output[0]
        return clip

    def encode_tiles(tiles: torch.Tensor) -> torch.Tensor:
        of_each = model.get_image_features(pixel_values=tiles.to(device).to(dtype), return_dict=True).pooler_output
        features: torch.Tensor = of_each.flatten(0, 1)  # of [tiles, tokens, hidden]
        return features

    if _FRAMES in inputs:
        encode_frames = encode_clip if hasattr(model, "get_video_features") else encode_tiles
        return [encode_in_pieces(encode_frames, inputs[_FRAMES].flatten(0, 1), MOST_FRAMES)]
    if inputs[_TILES].ndim == 5 and "image_sizes" not in inputs:
        features = encode_in_pieces(encode_tiles, inputs[_TILES].flatten(0, 1), MOST_FRAMES)
        return [rows.clone() for rows in features.view(len(pictures), -1, features.shape[-1])]
    inputs[_TILES] = inputs[_TILES].to(device).to(dtype)
    # A list of [tokens, hidden]; for tiled pictures it includes the newline features of the rows.
    return [rows.clone() for rows in model.get_image_features(**inputs, return_dict=True).pooler_output]
