"""Configurations and processors of published checkpoints, as transformers builds them from the sizes of the table."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessorPil,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaProcessor,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from deploy.sagemaker.shapes import Shape
from llava_sessions.text.processors.internvl import PillowInternVLProcessor
from llava_sessions.text.processors.next_video import PillowNextVideoProcessor
from llava_sessions.text.processors.onevision import PillowOnevisionProcessor
from tests.support import tiny_families

ONEVISION_GRID = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
# What the configurations of the towers have besides their sizes.
_TOWERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"projection_dim": 768},
    "siglip_vision_model": {"vision_use_head": False},
    "internvl_vision": {"attention_bias": True},
}


def config_of(shape: Shape, layers: int | None = None, tokenizer: Any = None) -> Any:
    """Return the configuration of a checkpoint. `layers`: of its language model; None: all.

    `tokenizer`: that of `tokenizer_of`, whose media tokens the configuration then names.
    """
    sizes, tower = shape.checkpoint, shape.tower
    text = CONFIG_MAPPING[sizes.text](
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=layers or sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=32768,
        eos_token_id=None,
    )
    kind = shape.family.towers[0]
    vision = CONFIG_MAPPING[kind](
        hidden_size=tower.hidden,
        intermediate_size=tower.intermediate,
        num_hidden_layers=tower.layers,
        num_attention_heads=16,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        **_TOWERS[kind],
    )
    more: dict[str, Any] = {"tie_word_embeddings": sizes.tied}
    if shape.family.type == "llava_onevision":
        more["image_grid_pinpoints"] = ONEVISION_GRID
    if tokenizer is not None:
        ids = tokenizer.convert_tokens_to_ids
        is_internvl = shape.family.type == "internvl"
        more |= {"image_token_id": ids("<IMG_CONTEXT>")} if is_internvl else {"image_token_index": ids("<image>")}
        if shape.family.frame_tokens and not is_internvl:
            more["video_token_index"] = ids("<video>")
    return CONFIG_MAPPING[shape.family.type](vision_config=vision, text_config=text, **more)


def tokenizer_of(shape: Shape) -> Any:
    """Return a small tokenizer of the checkpoint's kind."""
    if shape.family.type == "internvl":
        return tiny_families.internvl_tokenizer()
    video = {"video_token": "<video>"} if shape.family.frame_tokens else {}
    if shape.checkpoint.text.startswith("qwen"):
        return tiny_families._qwen_tokenizer(image_token="<image>", **video)
    return tiny_families._llama_tokenizer(**video)


def processor_of(shape: Shape, tokenizer: Any) -> Any:
    """Return the processor of a checkpoint with a small tokenizer."""
    side = shape.tower.image_size
    square = {"height": side, "width": side}
    if shape.family.type == "internvl":
        images = GotOcr2ImageProcessorPil(size=square)
        return PillowInternVLProcessor(images, tokenizer, 256, chat_template=tiny_families.INTERNVL)
    if shape.family.type == "llava_onevision":
        return PillowOnevisionProcessor(
            LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=ONEVISION_GRID),
            tokenizer,
            num_image_tokens=shape.tower.side**2,
            vision_feature_select_strategy="full",
            chat_template=tiny_families.QWEN,
        )
    options: dict[str, Any] = {
        "patch_size": shape.tower.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    size: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": square}
    if shape.family.type == "llava":
        options["chat_template"] = tiny_families.VICUNA
        return LlavaProcessor(CLIPImageProcessor(**size), tokenizer, **options)
    images = LlavaNextImageProcessor(**size, image_grid_pinpoints=LlavaNextConfig().image_grid_pinpoints)
    if shape.family.type == "llava_next_video":
        return PillowNextVideoProcessor(images, tokenizer, **options, chat_template=tiny_families.VICUNA_VIDEO)
    return LlavaNextProcessor(images, tokenizer, **options, chat_template=tiny_families.VICUNA)
