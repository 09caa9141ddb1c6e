"""Norms of query and key heads, as in Qwen3: which attention has them, and who computes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from llava_sessions.engine.attention import TEXT_ATTENTION, PackedKV, Segment
from llava_sessions.engine.cpu import amx, amx_layers, linears
from llava_sessions.engine.cpu.amx_sessions import SessionAttention
from llava_sessions.engine.cpu.attention import session_attention
from llava_sessions.engine.cpu.layer_stack import LayerStack, stack_layers
from llava_sessions.engine.cpu.layers import compile_token_attention, fuse_layers
from llava_sessions.engine.cpu.token_attention import TokenAttention
from llava_sessions.engine.fused.head_norms import HeadNorms
from llava_sessions.engine.fused.layer import FusedLayer, fits
from llava_sessions.engine.kv import KVShape, SessionKV
from tests.engine import test_families
from tests.support.family import make_family

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
HIDDEN = 64  # half of the numbers of all query heads
needs_packing = pytest.mark.skipif(not linears.can_pack(torch.float32), reason="this torch has no packed linears")


def make_config() -> Qwen3Config:
    config = Qwen3Config(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    config._attn_implementation = TEXT_ATTENTION
    return config


def make_layer(index: int = 0) -> Any:
    """Return a layer of Qwen3 whose norms have different weights, as those of a trained model."""
    torch.manual_seed(index)
    made: Any = Qwen3DecoderLayer(make_config(), index).eval().requires_grad_(False)
    for norm in (made.self_attn.q_norm, made.self_attn.k_norm, made.input_layernorm):
        norm.weight.uniform_(0.5, 1.5)
    return made


@pytest.fixture
def layer() -> Any:
    return make_layer()


@needs_packing
@torch.inference_mode()
def test_a_fused_layer_gives_qwen3s_numbers(layer: Any) -> None:
    assert fits(layer, linears.packable)
    hidden = torch.randn(1, 9, HIDDEN)
    positions = torch.tensor([[*range(5), *range(3), 0]])
    angles = Qwen3RotaryEmbedding(make_config())(hidden, positions)
    found = []
    for each in (layer, FusedLayer(layer, linears.pack)):
        caches = [SessionKV(KVShape(1, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))) for _ in range(3)]
        segments = [Segment(kv, [0] * rows, None, [], True) for kv, rows in zip(caches, (5, 3, 1), strict=True)]
        packed = PackedKV(segments, HEADS, None)
        out = each(hidden.clone(), position_embeddings=angles, past_key_values=packed, packed=packed)
        found.append([out, *(part for kv, rows in zip(caches, (5, 3, 1), strict=True) for part in kv.read(0, rows))])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def shared_norm(layer: Any) -> None:
    """Norm all heads together, as OLMo 2."""
    layer.self_attn.q_norm = Qwen3RMSNorm(HEADS * HEAD_DIM)


def another_epsilon(layer: Any) -> None:
    layer.self_attn.k_norm.variance_epsilon = 1e-3


def another_kind(layer: Any) -> None:
    """Multiply by 1 plus the weight."""
    layer.self_attn.q_norm = Gemma3RMSNorm(HEAD_DIM)
    layer.self_attn.q_norm.variance_epsilon = 1e-6


@needs_packing
@pytest.mark.parametrize(
    "change",
    [
        shared_norm,
        another_epsilon,
        another_kind,
        lambda layer: delattr(layer.self_attn, "k_norm"),
        lambda layer: setattr(layer.self_attn, "q_norm", torch.nn.LayerNorm(HEAD_DIM)),
        lambda layer: layer.self_attn.add_module("v_norm", Qwen3RMSNorm(HEAD_DIM)),
    ],
    ids=["all heads", "another epsilon", "another kind", "no norm of keys", "a layer norm", "a norm of values"],
)
def test_other_norms_of_heads_are_not_fused(change: Callable[[Any], None], layer: Any) -> None:
    change(layer.requires_grad_(False))
    assert not fits(layer, linears.packable)


@needs_packing
def test_layers_with_and_without_norms_are_not_fused_together(layer: Any) -> None:
    other = make_layer(1)
    del other.self_attn.q_norm, other.self_attn.k_norm
    layers = torch.nn.ModuleList([layer, other])
    assert all(fits(each, linears.packable) for each in layers)
    assert not fuse_layers(layers)
    assert list(layers) == [layer, other]


@needs_packing
def test_answers_with_compiled_attention_equal_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_sessions.engine.model.COMPILE_FROM_BYTES", 0)
    family = make_family("internvl3.5", tmp_path)
    assert family.model.token_attention is not None
    test_families.test_answers_equal_generate_in_a_shared_batch_with_several_and_with_later_pictures(family)
    for host_bytes in (2**30, 0):
        test_families.test_answers_equal_generate_after_their_cache_left_the_device(family, host_bytes)


def tokens() -> Any:
    return compile_token_attention(HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16, torch.int8, 2, with_norms=True)


def sessions() -> Any:
    if not amx.is_available():
        pytest.skip("this CPU has no AMX")
    return session_attention(HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16, torch.int8, 2, with_norms=True)


@pytest.mark.parametrize("make", [tokens, sessions])
def test_compiled_attention_on_caches_in_int8_has_torchs_numbers(make: Callable[[], Any]) -> None:
    """The trial compares them. Those on caches in bfloat16: test_layers.py, test_amx_attention.py."""
    assert make() is not None


def other_weights(norms: HeadNorms) -> HeadNorms:
    return HeadNorms(torch.ones_like(norms.weights), norms.epsilon)


def swapped(norms: HeadNorms) -> HeadNorms:
    """Use the weights of queries for keys."""
    return HeadNorms(norms.weights.flip(0), norms.epsilon)


def no_epsilon(norms: HeadNorms) -> HeadNorms:
    return HeadNorms(norms.weights, 0.0)


@pytest.mark.parametrize("wrong", [other_weights, swapped, no_epsilon])
@pytest.mark.parametrize(("make", "kind"), [(tokens, TokenAttention), (sessions, SessionAttention)])
def test_compiled_attention_with_wrong_norms_is_not_used(
    make: Callable[[], Any],
    kind: type,
    wrong: Callable[[HeadNorms], HeadNorms],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right: Any = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *given: right(*given[:-1], wrong(given[-1])))
    assert make() is None
    assert "attention_wrong" in caplog.text


@pytest.mark.skipif(not amx.is_available(), reason="this CPU has no AMX")
def test_each_layer_of_one_call_has_its_own_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial compares one call with one call per layer, for single tokens and for several tokens of a session."""
    made = torch.nn.ModuleList(make_layer(index).bfloat16() for index in range(2))
    assert fuse_layers(made)
    shape = KVShape(2, KV_HEADS, HEAD_DIM, torch.bfloat16, torch.device("cpu"), torch.int8)
    (stack,) = stack_layers(made, tokens(), sessions(), shape)
    assert isinstance(stack, LayerStack)
    right = amx_layers._PLACES
    for wrong in range(2):
        places = list(right)
        places[wrong] = lambda *given, place=right[wrong]: place(
            *given[:-1], 0
        )  # the first layer's norms for all layers
        monkeypatch.setattr(amx_layers, "_PLACES", tuple(places))
        assert stack_layers(made, tokens(), sessions(), shape) is made
