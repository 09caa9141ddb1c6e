"""The features of a clip are the same in pieces of few frames and from one call with all frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava_sessions.engine.frames import encode_in_pieces
from tests.support.tiny_families import FAMILIES

SIDE = 28
MOST = 3


@pytest.fixture(scope="module", params=["onevision", "next-video", "internvl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return transformers' model of a family that takes clips."""
    folder = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model


def features(model: Any, frames: torch.Tensor) -> torch.Tensor:
    """Return the features `[tokens, hidden]` of frames from one call of transformers."""
    if hasattr(model, "get_video_features"):
        return model.get_video_features(frames[None], return_dict=True).pooler_output[0]
    return model.get_image_features(frames, return_dict=True).pooler_output.flatten(0, 1)


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, MOST - 1, MOST, MOST + 1, 2 * MOST, 3 * MOST + 1])
def test_pieces_give_the_features_of_the_whole_clip(model: Any, count: int) -> None:
    frames = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(count))
    sizes: list[int] = []

    def encode(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return features(model, part)

    found = encode_in_pieces(encode, frames, MOST)
    torch.testing.assert_close(found, features(model, frames), atol=1e-5, rtol=1e-5)
    assert max(sizes) <= MOST
    assert sum(sizes) == count


def test_features_of_unequal_frames_are_an_error() -> None:
    frames = torch.zeros(5, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="must have the same number of tokens, got 9 tokens for 3 frames and 4 for 2"):
        encode_in_pieces(lambda part: torch.zeros(len(part) ** 2, 8), frames[:, :1], 3)
    with pytest.raises(ValueError, match="got 4 tokens for 3 frames and 4 for 2"):
        encode_in_pieces(lambda _: torch.zeros(4, 8), frames, 3)
