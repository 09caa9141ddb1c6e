"""Configurations and processors of published checkpoints, as transformers builds them from the sizes of the table."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from deploy.sagemaker.shapes import Shape
from tests.support.tiny_families import GRIDS, PUBLISHED, TOWERS


def config_of(shape: Shape, layers: int | None = None, processor: Any = None) -> Any:
    """Return the configuration of a checkpoint. `layers`: of its language model; None: all.

    `processor`: that of `processor_of`, whose media tokens the configuration then names.
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
        **TOWERS[kind],
    )
    more: dict[str, Any] = {"tie_word_embeddings": sizes.tied}
    if shape.family.type in GRIDS:
        more["image_grid_pinpoints"] = GRIDS[shape.family.type]
    config = CONFIG_MAPPING[shape.family.type](vision_config=vision, text_config=text, **more)
    for name in ("image_token", "video_token"):
        token = getattr(processor, name, None)
        if token is not None and hasattr(config, f"{name}_id"):
            setattr(config, f"{name}_id", processor.tokenizer.convert_tokens_to_ids(token))
    return config


def processor_of(shape: Shape) -> Any:
    """Return the processor of a checkpoint with a small tokenizer."""
    return PUBLISHED[shape.family.type](shape)
