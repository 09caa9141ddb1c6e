"""How the configuration of a checkpoint is changed for the engine, with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from llava_sessions.chat.transcript import Conversation
from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.loading import load_weights
from llava_sessions.engine.model import Model
from llava_sessions.engine.vision import encode
from llava_sessions.ipc.messages import (
    AskSession,
    Event,
    Finished,
    OpenFailed,
    OpenSession,
    OutOfCapacity,
    Prefilled,
    Sampling,
    TurnFailed,
)
from llava_sessions.text.chat_template import ChatTemplate, Opening
from llava_sessions.text.checkpoint import UnsupportedCheckpoint
from llava_sessions.text.processors import load_processor
from tests.support.family import flat, frames, noise
from tests.support.tiny_families import make_internvl
from tests.support.variants import set_keys

CPU = torch.device("cpu")
AMPLE = DeviceBudget(2**30, 2**30)
CONTEXT = 192


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with dynamic RoPE and a short context."""
    return make_internvl(tmp_path_factory.mktemp("internvl"), max_position_embeddings=CONTEXT)


def run(engine: Engine, *commands: Any) -> list[Event]:
    events = []
    for command in commands:
        events += engine.apply(command) or []
    while engine.has_work:
        events += engine.step()
    return events


# --- dynamic RoPE ---


def test_dynamic_rope_gives_the_tokens_of_generate_up_to_the_last_position(internvl: Path) -> None:
    reference = AutoModelForImageTextToText.from_pretrained(internvl, dtype=torch.float32)
    assert reference.config.text_config.rope_parameters["rope_type"] == "dynamic"
    model = Model.load(internvl, "float32", "cpu")
    assert model.text.config.rope_parameters["rope_type"] == "default"
    assert model.context_tokens == CONTEXT

    template = ChatTemplate(load_processor(internvl))
    engine = Engine(model, template.answer_text, AMPLE, 48)
    opening = template.opening([noise(1)])
    prompt = template.prompt(opening.opened_on, "what is the red circle doing?")
    rest = CONTEXT - len(opening.token_ids) - len(prompt)
    events = run(
        engine,
        OpenSession("a", opening.token_ids, opening.pictures),
        AskSession("a", "a", prompt, Sampling(rest + 1, min_tokens=rest)),
    )
    (answer,) = [event.answer_ids for event in events if isinstance(event, Finished)]
    assert len(answer) >= rest - 1 > 80

    ids = torch.tensor([Conversation(opening).token_ids + prompt])
    whole = reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.from_numpy(flat([opening.pictures])["pixel_values"]),
        do_sample=False,
        max_new_tokens=len(answer),
        min_new_tokens=len(answer),
    )
    assert whole[0, ids.shape[1] :].tolist() == answer


def test_dynamic_rope_keeps_the_other_parameters(internvl: Path, tmp_path: Path) -> None:
    model = load_weights(internvl, torch.float32, "meta")
    assert model.config.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert AutoConfig.from_pretrained(internvl).text_config.rope_parameters["factor"] == 2.0


def test_rope_that_depends_on_the_length_within_the_context_is_refused(tmp_path: Path) -> None:
    folder = make_internvl(tmp_path)
    factors = [1.0] * 4
    longrope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 2.0}
    set_keys("config.json", "text_config", rope_scaling=longrope)(folder)
    with pytest.raises(UnsupportedCheckpoint, match="qwen2 text with rope_type 'longrope'"):
        load_weights(folder, torch.float32, "meta")


# --- layers of the vision tower ---


@pytest.mark.parametrize(("layer", "kept"), [(-1, 2), (-2, 1), (1, 1), (2, 2)])
def test_only_vision_layers_that_are_used_are_loaded(layer: int, kept: int, tmp_path: Path) -> None:
    folder = make_internvl(tmp_path)
    set_keys("config.json", vision_feature_layer=layer)(folder)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = load_weights(folder, torch.float32, "cpu")
    assert len(model.model.vision_tower.encoder.layer) == kept
    assert len(reference.model.vision_tower.encoder.layer) == 2
    (picture,) = ChatTemplate(load_processor(folder)).opening([noise(1)]).pictures
    (got,), (expected,) = (encode(each.model, [picture], torch.float32, CPU) for each in (model, reference))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "tower", [{"use_qk_norm": True, "norm_type": "rms_norm"}, {"use_mean_pooling": False}, {"hidden_act": "relu"}]
)
def test_other_internvl_towers_give_the_features_of_transformers(tower: dict[str, Any], tmp_path: Path) -> None:
    """The first one is that of the checkpoints with 38 and 78 billion parameters."""
    folder = make_internvl(tmp_path, tower=tower)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    opening = ChatTemplate(load_processor(folder)).opening([noise(1)])
    (expected,) = encode(reference.model, opening.pictures, torch.float32, CPU)
    got = Model.load(folder, "float32", "cpu").encode(opening.pictures[0])
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


# --- memory before encoding ---


class Encoded(Exception):
    """The vision tower has run."""


def openings(template: ChatTemplate) -> dict[str, Opening]:
    return {
        "largest picture": template.opening([noise(0)]),
        "several pictures": template.opening([noise(1), noise(2)]),
        "clip": template.clip_opening(*frames(0, 9)),
    }


@pytest.mark.parametrize("name", ["largest picture", "several pictures", "clip"])
def test_what_does_not_fit_is_rejected_before_it_is_encoded(
    name: str, internvl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features of all tiles and frames count, though text tokens are between those of a clip."""
    template = ChatTemplate(load_processor(internvl))
    model = Model.load(internvl, "float32", "cpu")
    opening = openings(template)[name]
    tokens = sum(array.shape[1] * 4 for picture in opening.pictures for array in picture.inputs.values())
    assert opening.image_tokens == tokens < len(opening.token_ids)
    needed = model.kv_shape.device_bytes(len(opening.token_ids)) + tokens * model.feature_bytes

    def get_image_features(**_: object) -> None:
        raise Encoded

    command = OpenSession("a", opening.token_ids, opening.pictures)
    with monkeypatch.context() as patch:
        patch.setattr(model._model.model, "get_image_features", get_image_features)
        (rejected,) = run(Engine(model, template.answer_text, DeviceBudget(needed - 1, 0)), command)
        assert isinstance(rejected, OutOfCapacity)
        assert rejected.needed_bytes == needed
    events = run(Engine(model, template.answer_text, DeviceBudget(needed, 0)), command)
    assert [event for event in events if isinstance(event, Prefilled)]


@pytest.mark.parametrize("name", ["largest picture", "clip"])
def test_memory_may_run_out_in_any_piece_of_an_encoding(
    name: str, internvl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 tiles and 9 frames are several calls of the tower each. After the error they are encoded again."""
    template = ChatTemplate(load_processor(internvl))
    model = Model.load(internvl, "float32", "cpu")
    opening = openings(template)[name]
    prompt = template.prompt(opening.opened_on, "what is it?")
    commands = [
        OpenSession("a", opening.token_ids, opening.pictures),
        AskSession("a", "a", prompt, Sampling(6)),
    ]
    plain = model._model.model.get_image_features
    calls = 0
    failing = 0

    def get_image_features(**inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(**inputs)

    def answer() -> list[int]:
        nonlocal calls
        calls = 0
        events = run(Engine(model, template.answer_text, AMPLE), *commands)
        assert not [event for event in events if isinstance(event, (OpenFailed, TurnFailed, OutOfCapacity))]
        (finished,) = [event for event in events if isinstance(event, Finished)]
        return finished.answer_ids

    monkeypatch.setattr(model._model.model, "get_image_features", get_image_features)
    expected = answer()
    pieces = calls
    assert pieces >= 2
    for failing in (1, 2, pieces):
        assert answer() == expected
        assert calls == failing + pieces
