"""Processors without torchvision: which settings frames and tiles have, and which checkpoints are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, CLIPImageProcessor, GotOcr2ImageProcessorPil
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler
from transformers.utils.import_utils import is_torchvision_available

from llava_sessions.engine.checkpoint import try_loading
from llava_sessions.engine.process import load
from llava_sessions.ipc.messages import EngineSettings
from llava_sessions.text.checkpoint import UnsupportedCheckpoint
from llava_sessions.text.processors import load_processor
from llava_sessions.text.processors.clips import frame_settings
from llava_sessions.text.tiles import largest_picture, tile_patches
from tests.support.tiny_families import make_internvl, make_llava, make_next_video
from tests.support.variants import set_keys

FILES = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")


@pytest.fixture
def next_video(tmp_path: Path) -> Path:
    return make_next_video(tmp_path / "next-video")


@pytest.fixture
def internvl(tmp_path: Path) -> Path:
    return make_internvl(tmp_path / "internvl")


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def frame_of(folder: Path, pixels: np.ndarray) -> np.ndarray:
    """Return a frame as the processor of a folder prepares it, `[3, height, width]`."""
    arrays = load_processor(folder)(videos=[[pixels]], return_tensors="np", input_data_format="channels_last")
    frame: np.ndarray = arrays["pixel_values_videos"][0, 0]
    return frame


def test_torchvision_is_not_installed() -> None:
    """With it, transformers would use other classes, and these tests would say nothing about ours."""
    assert not is_torchvision_available()


# --- frames ---


def write(folder: Path, name: str, **settings: Any) -> None:
    (folder / name).write_text(json.dumps(settings))


def test_settings_of_frames_are_found_where_transformers_finds_them(tmp_path: Path) -> None:
    assert frame_settings(tmp_path) == {}
    nested = {"image_processor": {"size": 1}, "processor_class": "InternVLProcessor"}
    write(tmp_path, "processor_config.json", **nested)
    assert frame_settings(tmp_path) == {"size": 1}
    write(tmp_path, "preprocessor_config.json", size=2, image_processor_type="GotOcr2ImageProcessorFast")
    assert frame_settings(tmp_path) == {"size": 2}
    write(tmp_path, "video_preprocessor_config.json", size=3, video_processor_type="InternVLVideoProcessor")
    assert frame_settings(tmp_path) == {"size": 3}
    write(tmp_path, "processor_config.json", **nested, video_processor={"size": 4, "image_mean": None, "fps": 2})
    assert frame_settings(tmp_path) == {"size": 4}


@pytest.mark.parametrize("size", [(60, 80), (90, 40), (28, 28), (1, 9)])
def test_frames_of_next_video_are_resized_and_cropped_as_its_video_processor_says(
    next_video: Path, size: tuple[int, int]
) -> None:
    settings = {
        "size": {"shortest_edge": 35},
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    write(next_video, "video_preprocessor_config.json", **settings)
    pixels = picture(*size)
    expected = CLIPImageProcessor(**settings)(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(frame_of(next_video, pixels), expected)


@pytest.mark.parametrize("size", [(60, 80), (90, 40), (28, 28), (1, 9)])
def test_frames_of_internvl_are_one_tile_each(internvl: Path, size: tuple[int, int]) -> None:
    settings = {"size": {"height": 28, "width": 28}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    write(internvl, "video_preprocessor_config.json", **settings, crop_to_patches=True)
    pixels = picture(*size)
    expected = GotOcr2ImageProcessorPil(**settings)(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(frame_of(internvl, pixels), expected[0])


def test_without_settings_of_their_own_frames_have_those_of_pictures(next_video: Path, internvl: Path) -> None:
    pixels = picture(60, 80)
    for folder in (next_video, internvl):
        before = frame_of(folder, pixels)
        (folder / "video_preprocessor_config.json").unlink()
        np.testing.assert_array_equal(frame_of(folder, pixels), before)


def test_processor_configurations_of_newer_versions_are_read(next_video: Path, internvl: Path) -> None:
    """Since version 5, transformers saves the settings of all processors in processor_config.json."""
    pixels = picture(60, 80)
    for folder in (next_video, internvl):
        before = frame_of(folder, pixels)
        saved = {name: json.loads((folder / name).read_text()) for name in FILES}
        for name in FILES[:2]:
            (folder / name).unlink()
        nested = {"video_processor": saved[FILES[0]], "image_processor": saved[FILES[1]]}
        write(folder, FILES[2], **saved[FILES[2]], **nested)
        np.testing.assert_array_equal(frame_of(folder, pixels), before)


# --- tiles ---


@pytest.mark.parametrize("crops", [True, False, None])
def test_internvl_cuts_pictures_whatever_its_image_processor_says(internvl: Path, crops: bool | None) -> None:
    """The published checkpoints have `crop_to_patches: false`, and transformers' processor cuts them."""
    set_keys("preprocessor_config.json", crop_to_patches=crops)(internvl)
    processor = load_processor(internvl)
    pixels = picture(60, 80)
    arrays = processor(images=[pixels], return_tensors="np", input_data_format="channels_last")
    assert arrays["pixel_values"].shape == (1, 13, 3, 28, 28)
    same = processor(images=[Image.fromarray(pixels)], text="<IMG_CONTEXT>", return_tensors="np")
    np.testing.assert_array_equal(arrays["pixel_values"][0], same["pixel_values"])
    assert processor.replace_image_token(arrays, 0) == f"<img>{'<IMG_CONTEXT>' * 13 * 4}</img>"


def test_internvl_prepares_one_picture_at_a_time_without_a_text(internvl: Path) -> None:
    with pytest.raises(ValueError, match="`images` must be one picture, got 2"):
        load_processor(internvl)(images=[picture(60, 80), picture(28, 28)], return_tensors="np")


@pytest.mark.parametrize(("most", "tiles"), [(1, 1), (2, 3), (6, 7), (12, 13)])
def test_the_largest_picture_of_internvl_has_the_most_tiles(internvl: Path, most: int, tiles: int) -> None:
    set_keys("preprocessor_config.json", max_patches=most)(internvl)
    processor = load_processor(internvl)
    width, height = largest_picture(processor)
    arrays = processor(images=[picture(height, width)], return_tensors="np", input_data_format="channels_last")
    assert arrays["pixel_values"].shape[1] == tiles


def test_patches_of_a_tile() -> None:
    assert tile_patches(SimpleNamespace(image_size=[28, 56], patch_size=(7, 14))) == 16
    assert tile_patches(SimpleNamespace(image_size=336, patch_size=14)) == 576
    assert tile_patches(SimpleNamespace(patch_size=14)) is None


# --- what the checkpoint's files leave out, and what contradicts them ---


def test_what_older_versions_did_not_save_comes_from_the_config(next_video: Path, internvl: Path) -> None:
    set_keys("processor_config.json", patch_size=None, num_additional_image_tokens=None)(next_video)
    set_keys("processor_config.json", image_seq_length=None)(internvl)
    for folder in (next_video, internvl):
        try_loading(folder)
    assert load_processor(internvl).image_seq_length == 4
    assert load_processor(next_video).patch_size == 7


@pytest.mark.parametrize(
    ("file", "keys", "words"),
    [
        (
            "processor_config.json",
            {"image_seq_length": 16},
            r"config\.json disagree: a picture has 208 image tokens and 52 features \(`image_seq_length`\)",
        ),
        ("config.json", {"image_token_id": 3}, r"`image_token_id` must be the tokenizer's ID of '<IMG_CONTEXT>'"),
        (
            "video_preprocessor_config.json",
            {"size": {"height": 56, "width": 56}},
            r"a clip of one frame has 4 image tokens and 16 features",
        ),
        (
            "config.json",
            {"downsample_ratio": 0.25},
            r"3 tensors of another shape than the model's: model\.multi_modal_projector\.layer_norm\.bias must be",
        ),
    ],
)
def test_an_internvl_whose_files_contradict_each_other_is_refused(
    internvl: Path, file: str, keys: dict[str, Any], words: str
) -> None:
    set_keys(file, **keys)(internvl)
    with pytest.raises(UnsupportedCheckpoint, match=words):
        try_loading(internvl)


def test_the_video_token_of_internvl_needs_no_embedding(internvl: Path) -> None:
    """As in the published checkpoints; every other token needs one."""
    text = AutoConfig.from_pretrained(internvl).text_config
    processor = load_processor(internvl)
    assert processor.tokenizer.convert_tokens_to_ids(["<video>", "</img>"]) == [text.vocab_size, text.vocab_size - 2]
    set_keys("config.json", "text_config", vocab_size=text.vocab_size - 1)(internvl)
    with pytest.raises(UnsupportedCheckpoint, match=rf"`text_config.vocab_size` must be {text.vocab_size} or more"):
        load_processor(internvl)


def test_a_next_video_whose_frames_have_another_size_is_refused(next_video: Path) -> None:
    sizes = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
    set_keys("video_preprocessor_config.json", **sizes)(next_video)
    with pytest.raises(UnsupportedCheckpoint):
        try_loading(next_video)


def test_a_server_does_not_start_on_frames_of_another_size(next_video: Path, internvl: Path) -> None:
    """A hub ID is not loaded when it is packed."""
    sizes = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}
    set_keys("video_preprocessor_config.json", **sizes)(next_video)
    set_keys("video_preprocessor_config.json", size={"height": 56, "width": 56})(internvl)
    with pytest.raises(ValueError, match=r"42\*42"):
        load(EngineSettings(str(next_video), "", "float32", "cpu", None))
    with pytest.raises(UnsupportedCheckpoint, match="a clip of one frame has 4 image tokens and 16 features"):
        load(EngineSettings(str(internvl), "", "float32", "cpu", None))


def test_an_odd_number_of_patches_is_pooled_as_the_model_pools_it(tmp_path: Path) -> None:
    """Of 5 by 5 patches the model keeps 2 by 2 features; transformers' processor writes 25 // 4 tokens."""
    folder = make_next_video(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_size"] = 35
    grid = [[35, 70], [70, 35], [70, 70]]
    config["image_grid_pinpoints"] = grid
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {"size": {"shortest_edge": 35}, "crop_size": {"height": 35, "width": 35}}
    set_keys("preprocessor_config.json", **sizes, image_grid_pinpoints=grid)(folder)
    set_keys("video_preprocessor_config.json", **sizes)(folder)
    processor = load_processor(folder)
    clip = processor(videos=[[picture(60, 80)] * 2], return_tensors="np", input_data_format="channels_last")
    pooled = LlavaNextVideoPooler(AutoConfig.from_pretrained(folder))(torch.zeros(2, 25, 32))
    assert processor.replace_video_token(clip, 0) == "<video>" * pooled.shape[:2].numel()
    assert pooled.shape[1] == 4


def test_a_family_without_clips_has_transformers_own_processor(tmp_path: Path) -> None:
    assert type(load_processor(make_llava(tmp_path))).__module__.startswith("transformers.")
