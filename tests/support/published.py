"""Models with the sizes of the published checkpoints in families.toml, on torch's meta device, with their processors.

They have small tokenizers, and as many language layers as a test asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    GotOcr2ImageProcessorPil,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaProcessor,
)

from deploy.pack.families import Checkpoint, Family, families, towers
from llava_sessions.engine.model import Model
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.text.processors.internvl import PillowInternVLProcessor
from llava_sessions.text.processors.next_video import PillowNextVideoProcessor
from llava_sessions.text.processors.onevision import PillowOnevisionProcessor
from tests.support import tiny_families

ROWS = {row.name: (family, row) for family in families().values() for row in family.checkpoints}
_ONEVISION_GRID = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
_NEXT_GRID = LlavaNextConfig().image_grid_pinpoints


def make(name: str, layers: int) -> tuple[Model, ChatTemplate]:
    """Return the model of a row of the table, in float16 with plain layers, and its chat template."""
    family, row = ROWS[name]
    tokenizer = tokenizer_of(family, row)
    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(config_of(family, row, tokenizer, layers), dtype=torch.float16)
    return Model(made), ChatTemplate(processor_of(family, row, tokenizer))


def tokenizer_of(family: Family, row: Checkpoint) -> Any:
    """Return a small tokenizer of the kind of the checkpoint's."""
    if family.tiling == "dynamic":
        return tiny_families._qwen_tokenizer(**tiny_families.INTERNVL_TOKENS)
    media = {"image_token": "<image>", "video_token": "<video>"}
    return (tiny_families._qwen_tokenizer if row.text.startswith("qwen") else tiny_families._llama_tokenizer)(**media)


def config_of(family: Family, row: Checkpoint, tokenizer: Any, layers: int) -> Any:
    """Return the configuration of a checkpoint, with `layers` language layers."""
    text = CONFIG_MAPPING[row.text](
        hidden_size=row.hidden,
        intermediate_size=row.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=row.heads,
        num_key_value_heads=row.kv_heads,
        vocab_size=row.vocabulary,
        max_position_embeddings=32768,
        eos_token_id=None,
        **({"head_dim": row.head_dim} if row.head_dim else {}),
    )
    kind = family.towers[0]
    tower = towers()[kind]
    more = {"siglip_vision_model": {"vision_use_head": False}, "internvl_vision": {"attention_bias": True}}
    vision = CONFIG_MAPPING[kind](
        hidden_size=tower.hidden,
        intermediate_size=tower.intermediate,
        num_hidden_layers=tower.layers,
        num_attention_heads=16,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        **more.get(kind, {}),
    )
    token = "<IMG_CONTEXT>" if family.tiling == "dynamic" else "<image>"
    options: dict[str, Any] = {
        "image_token_id" if family.tiling == "dynamic" else "image_token_index": tokenizer.convert_tokens_to_ids(token)
    }
    if family.tiling == "grid" and family.frame_tokens:
        options["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
    if kind == "siglip_vision_model":
        options["image_grid_pinpoints"] = _ONEVISION_GRID
    return CONFIG_MAPPING[family.type](
        vision_config=vision, text_config=text, tie_word_embeddings=row.tied, **options
    )


def processor_of(family: Family, row: Checkpoint, tokenizer: Any) -> Any:
    """Return the processor of a checkpoint, with a small tokenizer."""
    side = towers()[family.towers[0]].image_size
    square = {"height": side, "width": side}
    if family.type == "internvl":
        images = GotOcr2ImageProcessorPil(size=square)
        return PillowInternVLProcessor(images, tokenizer, chat_template=tiny_families.INTERNVL)
    if family.type == "llava_onevision":
        return PillowOnevisionProcessor(
            LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=_ONEVISION_GRID),
            tokenizer,
            num_image_tokens=729,
            vision_feature_select_strategy="full",
            chat_template=tiny_families.QWEN,
        )
    options: dict[str, Any] = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": tiny_families.VICUNA,
    }
    size: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": square}
    if family.type == "llava":
        return LlavaProcessor(CLIPImageProcessor(**size), tokenizer, **options)
    images = LlavaNextImageProcessor(**size, image_grid_pinpoints=_NEXT_GRID)
    if family.type == "llava_next":
        return LlavaNextProcessor(images, tokenizer, **options)
    options["chat_template"] = tiny_families.VICUNA_VIDEO
    return PillowNextVideoProcessor(images, tokenizer, **options)
