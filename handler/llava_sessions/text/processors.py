"""Load a checkpoint's transformers processor without torchvision, and complete what older versions did not save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoProcessor, BatchFeature, LlavaOnevisionProcessor
from transformers.utils.import_utils import is_torchvision_available

from .checkpoint import UnsupportedCheckpoint, read_json, refuse_unsupported


def load_processor(checkpoint: str | Path) -> Any:
    """Return the processor of a checkpoint folder.

    Raises `UnsupportedCheckpoint`, and OSError if a file can't be found.
    """
    folder = Path(checkpoint)
    refuse_unsupported(folder)
    config = AutoConfig.from_pretrained(checkpoint)
    if config.model_type == "llava_onevision" and not is_torchvision_available():
        processor = PillowOnevisionProcessor.from_pretrained(checkpoint)
    else:
        processor = AutoProcessor.from_pretrained(checkpoint)
    _complete(processor, config, read_json(folder / "processor_config.json"))
    if not processor.chat_template:
        processor.chat_template = getattr(processor.tokenizer, "chat_template", None)
    _check_token_ids(processor, config, read_json(folder / "config.json"))
    return processor


def _complete(processor: Any, config: Any, saved: Mapping[str, Any]) -> None:
    """Set what counts a picture's tokens and is not among the `saved` values, from the model's config.

    transformers before 4.46 did not save it. Raises `UnsupportedCheckpoint` for a value that the config lacks too.
    """
    vision = config.vision_config
    side = getattr(vision, "image_size", None)
    patch = getattr(vision, "patch_size", None)
    known = {
        "patch_size": patch,
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        # CLIP's tower puts a class token before the patches, SigLIP's does not.
        "num_additional_image_tokens": int(vision.model_type == "clip_vision_model"),
        "num_image_tokens": (side // patch) ** 2 if side and patch else None,
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
    }
    for name, value in known.items():
        if hasattr(processor, name) and saved.get(name) is None:
            if value is None:
                raise UnsupportedCheckpoint(f"processor_config.json has no `{name}`, and config.json does not give it")
            setattr(processor, name, value)


def _check_token_ids(processor: Any, config: Any, saved: Mapping[str, Any]) -> None:
    """Raise `UnsupportedCheckpoint` if the config has another ID for the image or video token, or too few embeddings.

    `saved`: config.json as it is, for the spelling of its keys.
    """
    tokens = len(processor.tokenizer)
    rows = config.get_text_config().vocab_size
    if tokens > rows:
        raise UnsupportedCheckpoint(f"config.json: `text_config.vocab_size` must be {tokens} or more, got {rows}")
    for kind in ("image", "video"):
        expected = getattr(config, f"{kind}_token_id", None)
        token = getattr(processor, f"{kind}_token", None)
        if expected is None or token is None:
            continue
        found = processor.tokenizer.convert_tokens_to_ids(token)
        if found != expected:
            key = next((key for key in (f"{kind}_token_id", f"{kind}_token_index") if key in saved), f"{kind}_token_id")
            raise UnsupportedCheckpoint(
                f"config.json: `{key}` must be the tokenizer's ID of {token!r}, {found}, got {expected}"
            )


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
