"""Fused layers of vision towers give the plain layers' numbers; layers of another kind are not replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.internvl.modeling_internvl import InternVLVisionLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from llava_sessions.engine.cpu.linears import can_pack
from llava_sessions.engine.cpu.picture_layers import FusedPictureLayer, fuse_layers
from llava_sessions.engine.fused.operations import Activation
from llava_sessions.engine.vision import encode
from tests.support.family import make_family, noise
from tests.support.tiny_families import FAMILIES

needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no packed linears")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
KINDS = ["clip", "siglip", "internvl"]
ACTIVATIONS = {"onevision": Activation.GELU_TANH, "internvl": Activation.GELU}


def make_tower(kind: str, **more: object) -> Any:
    """Return a random vision tower in float32, the same one in each call."""
    torch.manual_seed(0)
    tower: Any
    if kind == "clip":
        tower = CLIPVisionModel(CLIPVisionConfig(**SIZES, **more))
    elif kind == "internvl":
        tower = InternVLVisionModel(InternVLVisionConfig(**SIZES, attention_bias=True, **more))
    else:
        tower = SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False, **more))
    for parameter in tower.encoder.parameters():  # norms and biases of which every number matters
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return tower.eval()


def layers_of(tower: Any) -> torch.nn.ModuleList:
    """Return the layers of a tower."""
    layers: torch.nn.ModuleList = tower.encoder.layer if hasattr(tower.encoder, "layer") else tower.encoder.layers
    return layers


@torch.inference_mode()
def hidden_states(tower: Any) -> list[torch.Tensor]:
    """Return the hidden states of two random pictures, `[2, patches, hidden]` for each layer and the embeddings."""
    pixels = torch.linspace(-9, 9, 2 * 3 * 28 * 28).sin().view(2, 3, 28, 28).to(tower.dtype)
    return [states.float() for states in tower(pixels, output_hidden_states=True).hidden_states]


@needs_packing
@pytest.mark.parametrize("kind", KINDS)
def test_fused_layers_give_the_plain_layers_hidden_states(kind: str) -> None:
    tower = make_tower(kind)
    assert fuse_layers(tower) == 3
    got = hidden_states(tower)
    expected = hidden_states(make_tower(kind))
    assert len(got) == 4
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this CPU has no packed bfloat16 linears")
@pytest.mark.parametrize("kind", KINDS)
def test_fused_layers_in_bfloat16_are_as_exact_as_plain_ones(kind: str) -> None:
    tower = make_tower(kind).bfloat16()
    assert fuse_layers(tower) == 3
    got = hidden_states(tower)[-1]
    plain = hidden_states(make_tower(kind).bfloat16())[-1]
    exact = hidden_states(make_tower(kind).bfloat16().float())[-1]
    assert (got - exact).abs().mean() < 1.5 * (plain - exact).abs().mean()
    assert (got - exact).abs().max() < 0.1 * exact.abs().max()


@needs_packing
def test_a_layer_of_the_size_of_published_ones_is_fused() -> None:
    """The weights are stored as float16, whose product sums in another order than that of the plain layer."""
    sizes: dict[str, int] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 1}
    tower = CLIPVisionModel(CLIPVisionConfig(**SIZES | sizes)).bfloat16().float()
    assert fuse_layers(tower) == 1


@needs_packing
@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_tower_is_fused_and_gives_transformers_features(name: str, tmp_path: Any) -> None:
    family = make_family(name, tmp_path)
    layers = layers_of(family.model._model.model.vision_tower)
    assert all(isinstance(layer, FusedPictureLayer) for layer in layers)
    expected_activations = {one for part, one in ACTIVATIONS.items() if part in name} or {Activation.QUICK_GELU}
    assert {layer.up.activation for layer in layers} == expected_activations
    picture = family.tokens.opening([noise(1)]).pictures[0]
    (expected,) = encode(family.reference.model, [picture], torch.float32, torch.device("cpu"))
    torch.testing.assert_close(family.model.encode(picture), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.self_attn.add_module("q_norm", torch.nn.Identity()),
        lambda layer: layer.add_module("scale", torch.nn.Identity()),
        lambda layer: setattr(layer.mlp, "activation_fn", torch.nn.ReLU()),
        lambda layer: setattr(layer.mlp, "activation_fn", torch.nn.Tanh()),
        lambda layer: layer.register_parameter("lambda_1", torch.nn.Parameter(torch.ones(64))),
        lambda layer: setattr(layer.self_attn, "k_proj", torch.nn.Linear(64, 64, bias=False)),
        lambda layer: setattr(layer, "layer_norm1", torch.nn.RMSNorm(64)),
        lambda layer: setattr(layer, "layer_norm2", torch.nn.LayerNorm(64, bias=False)),
        lambda layer: setattr(layer.mlp, "fc1", layer.mlp.fc1.double()),
    ],
    ids=[
        "another part of the attention",
        "another part",
        "another activation",
        "an activation of both signs",
        "a scale",
        "no bias of one",
        "another norm",
        "a norm without bias",
        "another precision",
    ],
)
def test_a_layer_of_another_kind_is_not_fused(change: Any) -> None:
    layers = make_tower("clip").encoder.layers
    change(layers[1])
    before = list(layers)
    fuse_layers(layers)
    assert layers[1] is before[1]


@pytest.mark.parametrize("more", [{"use_qk_norm": True}, {"norm_type": "rms_norm"}])
def test_a_layer_of_the_largest_internvl_towers_stays_plain(more: dict[str, Any]) -> None:
    tower = make_tower("internvl", **more)
    assert fuse_layers(tower) == 0


class NormAfterAttention(CLIPEncoderLayer):
    """A layer with the parts of CLIP's that computes other numbers."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: None, **more: Any) -> torch.Tensor:
        hidden_states = hidden_states + self.layer_norm1(self.self_attn(hidden_states, attention_mask)[0])
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class AnotherArgument(CLIPEncoderLayer):
    """A layer with the parts of CLIP's that can't be called as CLIP's."""

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
        return super().forward(hidden_states, None) * scale


@pytest.mark.parametrize("kind", [NormAfterAttention, AnotherArgument])
def test_a_layer_with_the_same_parts_that_computes_something_else_is_not_fused(kind: type) -> None:
    layers = make_tower("clip").encoder.layers
    layers[1].__class__ = kind
    fuse_layers(layers)
    assert type(layers[1]) is kind


@needs_packing
@pytest.mark.parametrize(
    ("kind", "plain"),
    [("clip", CLIPEncoderLayer), ("siglip", SiglipEncoderLayer), ("internvl", InternVLVisionLayer)],
)
def test_layers_that_are_not_fused_work_next_to_fused_ones(kind: str, plain: type) -> None:
    tower = make_tower(kind)
    expected = make_tower(kind)
    for each in (tower, expected):
        layers_of(each)[1].mlp.activation_fn = torch.nn.ReLU()
    assert fuse_layers(tower) == 2
    assert type(layers_of(tower)[1]) is plain
    for one, other in zip(hidden_states(tower), hidden_states(expected), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)
