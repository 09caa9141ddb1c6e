"""What the processors without torchvision share: clips as arrays, and the saved settings of frames."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature

from ..checkpoint import read_json

# Settings that transformers' video processors and image processors share.
_SETTINGS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "default_to_square",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def frame_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint's video processor.

    They are in the same files, in the same order of precedence, as in transformers' `video_processing_utils.py`:
    `video_processor` of processor_config.json, video_preprocessor_config.json, preprocessor_config.json. If there is
    none of them, the settings of the image processor in processor_config.json apply.
    """
    nested = read_json(folder / "processor_config.json")
    files = (read_json(folder / f"{name}.json") for name in ("video_preprocessor_config", "preprocessor_config"))
    candidates: Iterable[Any] = (nested.get("video_processor"), *files, nested.get("image_processor"))
    found: dict[str, Any] = next((one for one in candidates if one), {})
    return {name: found[name] for name in _SETTINGS if found.get(name) is not None}


class PillowClips:
    """The clips of a processor: a base class before the processor's own class."""

    # `ProcessorMixin` prepares clips only if the attribute exists.
    video_processor: Any = None
    # (inputs, video_idx) -> text; a method of the processor's own class.
    replace_video_token: Any

    def frame(self, frame: Any, input_data_format: str | None) -> np.ndarray:
        """Return one frame as the vision tower's input, float32 `[3, height, width]`."""
        raise NotImplementedError

    def _process_videos(
        self, videos: Any, input_data_format: str | None = None, return_tensors: str | None = None, **_: Any
    ) -> tuple[BatchFeature, list[str]]:
        """Return `pixel_values_videos` `[clips, frames, 3, height, width]`, and the text that replaces each token."""
        clips = np.stack([np.stack([self.frame(frame, input_data_format) for frame in clip]) for clip in videos])
        inputs = BatchFeature({"pixel_values_videos": clips}, tensor_type=return_tensors)
        return inputs, [self.replace_video_token(inputs.data, video_idx=index) for index in range(len(clips))]
