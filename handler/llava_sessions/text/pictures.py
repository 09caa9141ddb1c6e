"""Pictures to the vision tower's input, one after another, by the checkpoint's own processor.

A request with several pictures is prepared picture by picture, so that one decoded picture is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..ipc.messages import PreparedPicture

# RGB: a picture of Pillow, or its pixels, uint8 `[height, width, 3]`, which take a quarter less memory.
Picture = Image.Image | np.ndarray

# Arrays that the families' processors make for the vision tower; their first dimension counts pictures.
_PICTURE_ARRAYS = ("pixel_values", "image_sizes", "pixel_values_videos")
_FRAMES = "pixel_values_videos"  # [clips, frames, 3, height, width]
# LLaVA-OneVision's count of the pictures of one request. A single picture is cut into tiles, several are not.
_REQUEST_COUNTS = "batch_num_images"
_COMPANION = np.zeros((8, 8, 3), np.uint8)


@dataclass(frozen=True)
class Prepared:
    """The pictures and clips of one request, prepared for the vision tower and for the prompt.

    `tokens`: per picture or clip, the text with which the processor replaces its single place in the template.
    `kinds`: per picture or clip, "image" or "video".
    """

    pictures: tuple[PreparedPicture, ...] = ()
    tokens: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


NOTHING = Prepared()


def joined(parts: Iterable[Prepared]) -> Prepared:
    """Return the pictures and clips of all parts, in order."""
    every = list(parts)
    return Prepared(
        tuple(picture for part in every for picture in part.pictures),
        tuple(tokens for part in every for tokens in part.tokens),
        tuple(kind for part in every for kind in part.kinds),
    )


class PicturePreparer:
    """Prepares pictures and clips. Thread-safe; takes no lock, because many tiles take long."""

    def __init__(self, processor: Any) -> None:
        """`processor`: of any family that the engine serves."""
        self._processor = processor
        self._counts_pictures = _REQUEST_COUNTS in processor.image_processor.model_input_names

    def picture(self, key: str, picture: Picture, of: int = 1) -> Prepared:
        """Prepare one of the `of` pictures of a request. `key` identifies its content.

        In some families the tokens of a picture depend on the other pictures of its request: LLaVA-OneVision cuts one
        picture into tiles, and gives each of several pictures a single tile. Pictures are therefore grouped by request:
        a picture of a later turn is tiled, and earlier pictures keep their tokens. This equals `generate` on the whole
        conversation with `batch_num_images` counting the pictures per request, for example `[1, 1]`.
        `apply_chat_template` on the whole conversation would count one group, `[2]`: the first picture's tokens would
        change in the second turn, and no KV cache of the session would be valid any more.
        """
        # Only whether it is alone matters for a picture, so a small one stands for all others.
        companions = [_COMPANION] if self._counts_pictures and of > 1 else []
        arrays = self._processor(
            images=[[_pixels(picture), *companions]], return_tensors="np", input_data_format="channels_last"
        )
        inputs = {name: np.asarray(arrays[name])[:1] for name in _PICTURE_ARRAYS if name in arrays}
        if self._counts_pictures:
            inputs[_REQUEST_COUNTS] = np.array([of])
            # An untiled picture has other features than the same picture tiled, so it needs another key.
            key = key if of == 1 else f"{key}:untiled"
        return Prepared((PreparedPicture(key, inputs),), (self._processor.replace_image_token(arrays, 0),), ("image",))

    def frame(self, picture: Picture) -> np.ndarray:
        """Return one frame of a clip as the vision tower's input, `[1, 1, 3, height, width]`."""
        arrays = self._processor(videos=[[_pixels(picture)]], return_tensors="np", input_data_format="channels_last")
        return np.asarray(arrays[_FRAMES])

    def clip(self, key: str, frames: Sequence[np.ndarray]) -> Prepared:
        """Return a clip of prepared frames. `key` identifies its content."""
        inputs = {_FRAMES: np.concatenate(frames, axis=1)}
        return Prepared((PreparedPicture(key, inputs),), (self._processor.replace_video_token(inputs, 0),), ("video",))


class _Pixels(np.ndarray):
    """Pixels, uint8. A conversion to uint8 returns them as they are.

    The processors convert each picture to uint8 for Pillow, which would copy 120 MB of the largest picture.
    """

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        return self if np.dtype(dtype) == self.dtype else super().astype(dtype, *args, **kwargs)


def _pixels(picture: Picture) -> np.ndarray:
    return np.asarray(picture).view(_Pixels)
