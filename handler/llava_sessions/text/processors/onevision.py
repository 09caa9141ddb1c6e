"""LLaVA-OneVision's processor without torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import LlavaOnevisionProcessor

from .clips import PillowClips


class PillowOnevisionProcessor(PillowClips, LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor without torchvision, which transformers' video processors require.

    Transformers loads no video processor because the signature has no `video_processor`. The image processor prepares
    a clip's frames: its size, mean and deviation equal those of the family's video processor.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
        **kwargs: Any,
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]  # transformers does not annotate it
            image_processor,
            tokenizer,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
            **kwargs,
        )

    def frame(self, frame: Any, input_data_format: str | None) -> np.ndarray:
        """Return one frame, `[3, height, width]`: the first tile of a picture is the whole picture, resized."""
        size = self.image_processor.size
        one_tile = [[size["height"], size["width"]]]
        tiles = self.image_processor(
            [frame], image_grid_pinpoints=one_tile, return_tensors="np", input_data_format=input_data_format
        )
        pixels: np.ndarray = tiles["pixel_values"][0, 0]
        return pixels


PROCESSOR = PillowOnevisionProcessor
