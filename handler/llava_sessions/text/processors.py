"""Owns how a checkpoint's processor is loaded: transformers' own one, on pillow alone.

Must not know chat templates, conversations or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoProcessor, BatchFeature, LlavaOnevisionProcessor
from transformers.utils import is_torchvision_available


def load_processor(checkpoint: str | Path) -> Any:
    """The processor of a checkpoint folder or hub id. Raises OSError when it can't be found."""
    onevision = AutoConfig.from_pretrained(checkpoint).model_type == "llava_onevision"
    if onevision and not is_torchvision_available():
        return PillowOnevisionProcessor.from_pretrained(checkpoint)
    return AutoProcessor.from_pretrained(checkpoint)


class PillowOnevisionProcessor(LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor where torchvision is missing: transformers' video processors need it.

    A signature without `video_processor` is how transformers learns not to load one. A clip's frames are prepared by
    the picture processor, whose size, mean and deviation are those of the family's video processor.
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
        super().__init__(
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
        self.video_processor = None  # `ProcessorMixin` calls `_process_videos` where the attribute exists

    def _process_videos(self, videos: Sequence[Sequence[Any]], **_: Any) -> tuple[BatchFeature, list[str]]:
        """Frames of each clip -> `pixel_values_videos` `[clips, frames, 3, height, width]`, and their tokens."""
        clips = np.stack([np.stack([self._frame(frame) for frame in clip]) for clip in videos])
        inputs = BatchFeature({"pixel_values_videos": clips})
        return inputs, [self.replace_video_token(inputs, video_idx=index) for index in range(len(clips))]

    def _frame(self, frame: Any) -> np.ndarray:
        """One frame `[3, height, width]`: the first tile of a picture is the whole of it, resized."""
        size = self.image_processor.size
        once = [[size["height"], size["width"]]]
        tiles = self.image_processor([frame], image_grid_pinpoints=once, return_tensors="np")
        return tiles["pixel_values"][0, 0]
