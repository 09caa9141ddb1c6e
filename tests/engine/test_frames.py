"""The features of a clip are the same in pieces of few frames and from one call with all frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava_sessions.engine import vision
from llava_sessions.engine.frames import encode_in_pieces
from llava_sessions.engine.vision import MOST_FRAMES
from llava_sessions.ipc.messages import PreparedPicture
from tests.support.tiny_families import FAMILIES

SIDE = 28


@pytest.fixture(scope="module", params=["onevision", "next-video", "internvl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return transformers' model of a family that takes clips."""
    folder = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model


@pytest.fixture
def tower_calls(model: Any) -> Iterator[list[int]]:
    """Return the number of frames in each call of the vision tower."""
    calls: list[int] = []

    def note(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]))

    hook = model.vision_tower.register_forward_pre_hook(note, with_kwargs=True)
    yield calls
    hook.remove()


def encode(model: Any, **arrays: torch.Tensor) -> torch.Tensor:
    """Return the features that the engine computes of one picture or clip."""
    picture = PreparedPicture("", {name: array.numpy() for name, array in arrays.items()})
    (features,) = vision.encode(model, [picture], torch.float32, torch.device("cpu"))
    return features


@torch.inference_mode()
def whole(model: Any, frames: torch.Tensor) -> torch.Tensor:
    """Return the features of frames `[frames, 3, height, width]` from one call of transformers."""
    if hasattr(model, "get_video_features"):
        return model.get_video_features(frames[None], return_dict=True).pooler_output[0]
    return model.get_image_features(frames, return_dict=True).pooler_output.flatten(0, 1)


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    ("count", "calls"), [(1, [1]), (8, [8]), (9, [8, 1]), (16, [8, 7, 1]), (19, [8, 8, 3]), (32, [8, 8, 8, 7, 1])]
)
def test_a_clip_has_the_features_of_one_call(model: Any, tower_calls: list[int], count: int, calls: list[int]) -> None:
    frames = noise(count)
    expected = whole(model, frames)
    tower_calls.clear()
    found = encode(model, pixel_values_videos=frames[None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert tower_calls == calls


@pytest.mark.parametrize("model", ["internvl"], indirect=True)
def test_a_picture_of_many_flat_tiles_has_the_features_of_one_call(model: Any, tower_calls: list[int]) -> None:
    tiles = noise(13)
    expected = whole(model, tiles)
    tower_calls.clear()
    torch.testing.assert_close(encode(model, pixel_values=tiles[None]), expected, atol=1e-5, rtol=1e-5)
    assert tower_calls == [MOST_FRAMES, 5]


def test_frames_with_other_numbers_of_tokens_are_an_error() -> None:
    frames = torch.zeros(5, 1)
    with pytest.raises(ValueError, match="must have the same number of tokens, got 9 tokens for 3 frames and 4 for 2"):
        encode_in_pieces(lambda part: torch.zeros(len(part) ** 2, 8), frames, 3)
    with pytest.raises(ValueError, match="got 4 tokens for 3 frames and 4 for 2"):
        encode_in_pieces(lambda _: torch.zeros(4, 8), frames, 3)
