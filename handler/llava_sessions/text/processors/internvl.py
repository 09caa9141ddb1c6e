"""InternVL's processor without torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
from transformers import BatchFeature, GotOcr2ImageProcessorPil, InternVLProcessor

from .clips import PillowClips, frame_settings


class PillowInternVLProcessor(PillowClips, InternVLProcessor):
    """InternVL's processor on Pillow: pictures are cut into tiles by its own rules, each frame of a clip is one tile.

    Without a text, for which transformers' class raises ValueError, it prepares one picture or any clips in the arrays
    of the other families: `pixel_values` `[1, tiles, 3, height, width]`, `pixel_values_videos` `[clips, frames, 3,
    height, width]`.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, image_seq_length=image_seq_length, chat_template=chat_template)
        self.frame_processor = image_processor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Return the processor of a folder, with the settings of its video processor."""
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor.frame_processor = GotOcr2ImageProcessorPil(**frame_settings(Path(pretrained_model_name_or_path)))
        return processor

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare pictures and clips, see the class. With a text, as transformers' class."""
        arrays: BatchFeature
        if text is not None:
            arrays = super().__call__(images=images, text=text, videos=videos, **kwargs)
            return arrays
        arrays = super(InternVLProcessor, self).__call__(images=images, videos=videos, **kwargs)
        if "pixel_values" in arrays:
            if len(arrays["num_patches"]) != 1:
                raise ValueError(f"`images` must be one picture, got {len(arrays['num_patches'])}")
            arrays["pixel_values"] = arrays["pixel_values"][None]
        return arrays

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """As transformers' class, which requires a text. There is no audio."""
        if text is not None:
            super().validate_inputs(images=images, text=text, videos=videos, **kwargs)

    def frame(self, frame: Any, input_data_format: str | None) -> np.ndarray:
        """Return one frame, `[3, height, width]`, resized to one tile."""
        arrays = self.frame_processor(
            [frame], crop_to_patches=False, return_tensors="np", input_data_format=input_data_format
        )
        pixels: np.ndarray = arrays["pixel_values"][0]
        return pixels


PROCESSOR = PillowInternVLProcessor
