"""The features of a clip are the same in pieces of few frames and from one call with all frames.

Other sessions decode between the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava_sessions.engine import vision
from llava_sessions.engine.frames import encode_in_pieces
from llava_sessions.engine.vision import MOST_FRAMES
from llava_sessions.ipc.messages import CloseSession, OpenFailed, PreparedPicture
from tests.engine.test_families import Chats
from tests.support.family import Family, make_family
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


def encode(model: Any, patch: pytest.MonkeyPatch, **arrays: torch.Tensor) -> torch.Tensor:
    """Return the features that the engine computes of one picture or clip, in pieces as on a GPU."""
    patch.setattr(vision, "MOST_FRAMES_ON_CPU", MOST_FRAMES)
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
def test_a_clip_has_the_features_of_one_call(
    model: Any, tower_calls: list[int], count: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = noise(count)
    expected = whole(model, frames)
    tower_calls.clear()
    found = encode(model, monkeypatch, pixel_values_videos=frames[None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert tower_calls == calls


@pytest.mark.parametrize("model", ["internvl"], indirect=True)
def test_a_picture_of_many_flat_tiles_has_the_features_of_one_call(
    model: Any, tower_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = noise(13)
    expected = whole(model, tiles)
    tower_calls.clear()
    torch.testing.assert_close(encode(model, monkeypatch, pixel_values=tiles[None]), expected, atol=1e-5, rtol=1e-5)
    assert tower_calls == [MOST_FRAMES, 5]


def test_frames_with_other_numbers_of_tokens_are_an_error() -> None:
    frames = torch.zeros(5, 1)
    with pytest.raises(ValueError, match="must have the same number of tokens, got 9 tokens for 3 frames and 4 for 2"):
        list(encode_in_pieces(lambda part: torch.zeros(len(part) ** 2, 8), frames, 3))
    with pytest.raises(ValueError, match="got 4 tokens for 3 frames and 4 for 2"):
        list(encode_in_pieces(lambda _: torch.zeros(4, 8), frames, 3))


# --- between the pieces ---


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family("next-video", tmp_path_factory.mktemp("family"))


@pytest.fixture
def chats(family: Family) -> Chats:
    """An engine on a CPU with a session that answers."""
    made = Chats(family)
    made.open("a", 1)
    made.run()
    return made


def test_other_sessions_decode_between_the_pieces_of_a_clip(chats: Chats) -> None:
    expected = {"a": chats.ask("a", "what is the red circle?", tokens=12)}
    chats.run(steps=2)
    chats.open("clip", clip=0, count=7)
    session = chats.engine.sessions["clip"]
    turn = chats.engine.sessions["a"].turn
    assert turn is not None
    answered = [len(turn.answer_ids)]
    for _ in range(3):
        chats.run(steps=1)
        assert not session.encoded
        answered.append(len(turn.answer_ids))
    assert answered == list(range(answered[0], answered[0] + 4)), "a token in each step"
    chats.run(steps=1)
    assert session.encoded
    assert len(session.encodings) == 4, "the time of an encoding is that of all pieces"
    expected["clip"] = chats.ask("clip", "what is the red circle?")
    assert chats.run() == expected


def test_a_clip_that_fails_half_way_fails_its_own_session_and_can_be_sent_again(chats: Chats) -> None:
    expected = {"a": chats.ask("a", "and the blue square?")}
    chats.open("clip", clip=1, count=7)
    chats.run(steps=2)

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    hook = chats.family.model.vision.vision_tower.register_forward_pre_hook(fail)
    answers = chats.run(steps=1)
    hook.remove()
    assert [event.session_id for event in chats.events if isinstance(event, OpenFailed)] == ["clip"]
    chats.open("clip", clip=1, count=7)
    assert answers | chats.run() == expected
    expected = {"clip": chats.ask("clip", "and the blue square?")}
    assert chats.run() == expected


def test_a_session_closed_half_way_leaves_nothing_to_another_one_with_its_clip(chats: Chats) -> None:
    chats.open("clip", clip=2, count=7)
    chats.open("same", clip=2, count=7)
    chats.run(steps=2)
    chats.engine.apply(CloseSession("clip"))
    chats.run()
    expected = {"same": chats.ask("same", "two green stars?")}
    assert chats.run() == expected
    assert len(chats.engine.sessions["same"].encodings) == 4
