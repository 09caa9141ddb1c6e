"""LLaVA-NeXT-Video's processor without torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
from transformers import CLIPImageProcessorPil, LlavaNextProcessor

from .clips import PillowClips, frame_settings


class PillowNextVideoProcessor(PillowClips, LlavaNextProcessor):
    """LLaVA-NeXT's processor, which prepares this family's pictures as well, with clips.

    CLIP's image processor resizes and crops a frame with the settings of the checkpoint's video processor. It has the
    same steps and the same defaults as transformers' `LlavaNextVideoVideoProcessor`, which needs torchvision. Frames
    are not cut into tiles.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        num_additional_image_tokens: int = 0,
        **_: Any,
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]  # transformers does not annotate it
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
        )
        self.video_token: str = getattr(tokenizer, "video_token", None) or video_token
        self.video_token_id: int = tokenizer.convert_tokens_to_ids(self.video_token)
        # Patches of a frame that become one feature, in each direction: `load_processor` sets it from config.json.
        self.spatial_pool_stride: int | None = None
        self.frame_processor = CLIPImageProcessorPil(size=image_processor.size, crop_size=image_processor.crop_size)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Return the processor of a folder, with the settings of its video processor."""
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor.frame_processor = CLIPImageProcessorPil(**frame_settings(Path(pretrained_model_name_or_path)))
        return processor

    def frame(self, frame: Any, input_data_format: str | None) -> np.ndarray:
        """Return one frame, `[3, height, width]`, resized and cropped."""
        arrays = self.frame_processor([frame], return_tensors="np", input_data_format=input_data_format)
        pixels: np.ndarray = arrays["pixel_values"][0]
        return pixels

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **_: Any) -> str:
        """Return one video token per feature: the model pools a frame's patches, and drops what is left at an edge."""
        frames, _channels, height, width = video_inputs["pixel_values_videos"][video_idx].shape
        step = (self.patch_size or 1) * (self.spatial_pool_stride or 1)
        return self.video_token * int(frames * (height // step) * (width // step))


PROCESSOR = PillowNextVideoProcessor
