"""families.toml against transformers' configuration classes, and against the tiny checkpoints of the tests."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from deploy.doctor.sizes import Sizes
from deploy.pack import families as table
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.text.processors import load_processor
from llava_sessions.text.tiles import largest_picture
from tests.support.tiny_families import FAMILIES


def one_side(size: int | list[int] | tuple[int, int]) -> int:
    return size if isinstance(size, int) else size[0]


@pytest.mark.parametrize("kind", table.texts())
def test_sizes_of_a_text_model_that_config_json_omits(kind: str) -> None:
    text = CONFIG_MAPPING[kind]()
    sizes = table.texts()[kind].with_values_of({})
    assert (sizes.hidden, sizes.layers, sizes.heads) == (
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
    )
    assert (sizes.kv_heads, sizes.context) == (text.num_key_value_heads, text.max_position_embeddings)
    assert sizes.head_dim == (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])  # Mistral's class takes no null
def test_a_text_model_without_a_number_of_kv_heads_has_as_many_as_heads(kind: str) -> None:
    sizes = {"num_attention_heads": 16, "num_key_value_heads": None}
    assert table.texts()[kind].with_values_of(sizes).kv_heads == 16
    assert CONFIG_MAPPING[kind](**sizes).num_key_value_heads == 16


@pytest.mark.parametrize("kind", table.families())
def test_parts_of_a_family_that_config_json_omits(kind: str) -> None:
    family = table.families()[kind]
    config: Any = CONFIG_MAPPING[kind]()
    assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__ == family.class_name
    assert config.text_config.model_type == family.text
    vision = config.vision_config
    assert vision.model_type == family.towers[0]
    tower = table.towers()[vision.model_type]
    assert (one_side(vision.image_size), one_side(vision.patch_size)) == (tower.image_size, tower.patch_size)
    assert getattr(config, "downsample_ratio", 1.0) == family.downsample_ratio
    if family.tiling == "grid":
        most = max(height * width for height, width in config.image_grid_pinpoints) // tower.image_size**2
        kept = getattr(config, "vision_aspect_ratio", f"anyres_max_{most}").removeprefix("anyres_max_")
        assert family.tiles == min(most, int(kept))
        assert math.isqrt(family.tiles) ** 2 == family.tiles


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in FAMILIES.items()}


def test_every_family_and_text_model_has_a_tiny_checkpoint(tiny: dict[str, Path]) -> None:
    """With those of tests/support/tiny_families.py, answers are compared with `generate`."""
    configs = [json.loads((folder / "config.json").read_text()) for folder in tiny.values()]
    assert {config["model_type"] for config in configs} == set(table.families())
    assert {config["text_config"]["model_type"] for config in configs} == set(table.texts())


def test_the_doctor_counts_the_tokens_of_the_largest_picture(tiny: dict[str, Path]) -> None:
    for name, folder in tiny.items():
        processor = load_processor(folder)
        largest = ("key", Image.new("RGB", largest_picture(processor)))
        found = ChatTemplate(processor).opening([largest]).image_tokens
        counted = Sizes.read(folder).picture_tokens
        if "onevision" in name:
            assert found < counted, "its tiny grid has 4 tiles, and the published one 9"
        else:
            assert found == counted, name
