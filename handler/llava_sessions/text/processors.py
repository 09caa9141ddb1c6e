"""Load a checkpoint's transformers processor without torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoProcessor, BatchFeature, LlavaOnevisionProcessor
from transformers.utils.import_utils import is_torchvision_available


def load_processor(checkpoint: str | Path) -> Any:
    """Return the processor of a checkpoint folder or hub ID. Raises OSError if it can't be found."""
    onevision = AutoConfig.from_pretrained(checkpoint).model_type == "llava_onevision"
    if onevision and not is_torchvision_available():
        return PillowOnevisionProcessor.from_pretrained(checkpoint)
    return AutoProcessor.from_pretrained(checkpoint)


class PillowOnevisionProcessor(LlavaOnevisionProcessor):
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
        self.video_processor = None  # `ProcessorMixin` calls `_process_videos` if the attribute exists

    def _process_videos(
        self, videos: Any, input_data_format: str | None = None, **_: Any
    ) -> tuple[BatchFeature, list[str]]:
        """Return `pixel_values_videos` `[clips, frames, 3, height, width]`, and the text that replaces each token."""
        clips = np.stack([np.stack([self._frame(frame, input_data_format) for frame in clip]) for clip in videos])
        inputs = BatchFeature({"pixel_values_videos": clips})
        return inputs, [self.replace_video_token(inputs.data, video_idx=index) for index in range(len(clips))]

    def _frame(self, frame: Any, input_data_format: str | None) -> np.ndarray:
        """Return one frame, `[3, height, width]`: the first tile of a picture is the whole picture, resized."""
        size = self.image_processor.size
        one_tile = [[size["height"], size["width"]]]
        tiles = self.image_processor(
            [frame], image_grid_pinpoints=one_tile, return_tensors="np", input_data_format=input_data_format
        )
        pixels: np.ndarray = tiles["pixel_values"][0, 0]
        return pixels
