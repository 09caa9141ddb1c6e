"""Load a checkpoint's transformers processor without torchvision, and complete what older versions did not save.

A module of this package has the processor of a family whose own processor in transformers needs torchvision: its
`PROCESSOR` is the class. text/families.toml names the module.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor

from ..checkpoint import UnsupportedCheckpoint, read_json, refuse_unsupported
from ..families import families
from ..tiles import largest_picture as largest_picture
from ..tiles import tile_patches


def load_processor(checkpoint: str | Path) -> Any:
    """Return the processor of a checkpoint folder.

    Raises `UnsupportedCheckpoint`, and OSError if a file can't be found.
    """
    folder = Path(checkpoint)
    refuse_unsupported(folder)
    config = AutoConfig.from_pretrained(checkpoint)
    family = families().get(config.model_type)
    own = family and family.processor
    loader = importlib.import_module(f".{own}", __name__).PROCESSOR if own else AutoProcessor
    processor = loader.from_pretrained(checkpoint)
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
    patches = tile_patches(vision)
    ratio = getattr(config, "downsample_ratio", None)
    known = {
        "patch_size": getattr(vision, "patch_size", None),
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        # CLIP's tower puts a class token before the patches, SigLIP's does not.
        "num_additional_image_tokens": int(vision.model_type == "clip_vision_model"),
        "num_image_tokens": patches,
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
        "spatial_pool_stride": getattr(config, "spatial_pool_stride", None),
        "image_seq_length": round(patches * ratio**2) if patches and ratio else None,
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
    rows = config.get_text_config().vocab_size
    tokens = _prompt_tokens(processor, config)
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


def _prompt_tokens(processor: Any, config: Any) -> int:
    """Return the embeddings that prompts need: one more than the largest ID of a token in them.

    No prompt has the video token of a model whose config has none: the processor replaces it by image tokens. In the
    InternVL3 checkpoints its ID is the only one without an embedding.
    """
    ids = dict(processor.tokenizer.get_added_vocab())
    if getattr(config, "video_token_id", None) is None:
        ids.pop(getattr(processor, "video_token", None), None)
    tokens: int = max(processor.tokenizer.vocab_size, *(number + 1 for number in ids.values()))
    return tokens
