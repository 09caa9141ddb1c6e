"""Fused layers and compiled attention of single tokens give the plain model's numbers for every family.

They are not used for layers of another kind or without Numba.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llava_sessions.engine.attention import Segment
from llava_sessions.engine.cpu import amx, attention, linears, picture_layers
from llava_sessions.engine.cpu import layers as cpu_layers
from llava_sessions.engine.cpu.example_cache import example_norms
from llava_sessions.engine.cpu.layer_stack import LayerStack
from llava_sessions.engine.cpu.layers import compile_token_attention, fuse_layers
from llava_sessions.engine.cpu.linears import PackedLinear, can_pack
from llava_sessions.engine.fused.head_norms import HeadNorms
from llava_sessions.engine.fused.layer import FusedLayer
from llava_sessions.engine.kv import SessionKV
from llava_sessions.engine.model import Model
from tests.support.nan_pool import NanPool
from tests.support.tiny_families import FAMILIES, make_next_mistral

needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no packed linears")
needs_amx = pytest.mark.skipif(not amx.is_available(), reason="this CPU has no AMX")
needs_bfloat16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this CPU has no packed bfloat16 linears")


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile attention of single tokens for small models too."""
    monkeypatch.setattr("llava_sessions.engine.model.COMPILE_FROM_BYTES", 0)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny checkpoint of each family."""
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


def plain_model(folder: Path, dtype: str) -> Model:
    """Load the checkpoint with transformers' own layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_layers, "fuse_layers", lambda layers, pack: False)
        patch.setattr(picture_layers, "fuse_layers", lambda tower: 0)
        patch.setattr(linears, "pack_all", lambda module, pack=None: 0)
        return Model.load(folder, dtype, "cpu")


def logits(model: Model) -> list[torch.Tensor]:
    """Return the logits of three chats: prompts, a mixed step of single tokens and a follow-up, single tokens."""
    pool = NanPool()
    first, second, third = (SessionKV(model.kv_shape, pool) for _ in range(3))

    def step(*given: tuple[SessionKV, list[int]]) -> torch.Tensor:
        return model.forward([Segment(kv, ids, None, [], True) for kv, ids in given]).logits.float()

    return [
        step((first, list(range(200, 240))), (second, [210, 220, 230])),
        step((first, [201]), (second, list(range(205, 225))), (third, [207])),
        step((third, [211]), (first, [212]), (second, [213])),
        step((first, [214]), (second, [215]), (third, list(range(216, 220)))),
    ]


@needs_packing
def test_fused_layers_give_the_plain_models_logits(folder: Path, compiles: None) -> None:
    model = Model.load(folder, "float32", "cpu")
    assert all(isinstance(layer, FusedLayer) for layer in model.text.layers)
    assert model.token_attention is not None
    packed = [part for part in model.text.modules() if isinstance(part, PackedLinear)]
    assert {part.weight_bytes // (part.in_features * part.out_features) for part in packed} == {2}
    for got, expected in zip(logits(model), logits(plain_model(folder, "float32")), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


@needs_bfloat16
def test_fused_layers_in_bfloat16_are_as_exact_as_plain_ones(folder: Path, compiles: None) -> None:
    model = Model.load(folder, "bfloat16", "cpu")
    assert model.token_attention is not None
    got, plain, exact = (
        torch.cat(logits(one)) for one in (model, plain_model(folder, "bfloat16"), plain_model(folder, "float32"))
    )
    # The error relative to float32 is about that of plain bfloat16.
    assert (got - exact).abs().mean() < 1.5 * (plain - exact).abs().mean()
    assert (got - exact).abs().max() < 0.1 * exact.abs().max()


@needs_amx
@pytest.mark.parametrize("what", ["an error", "wrong numbers"])
def test_a_layer_that_fails_its_example_runs_part_by_part(
    what: str, folder: Path, compiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_sessions.engine.cpu.amx_layers import CompiledLayers

    right = CompiledLayers.__call__

    def fails(self, *given):
        if what == "an error":
            raise RuntimeError("no such instruction")
        return right(self, *given) + 1

    monkeypatch.setattr(CompiledLayers, "__call__", fails)
    model = Model.load(folder, "bfloat16", "cpu")
    assert all(isinstance(layer, FusedLayer) for layer in model.text.layers)
    assert torch.cat(logits(model)).isfinite().all()


@needs_amx
def test_a_layer_in_one_call_gives_the_numbers_of_its_parts(folder: Path, compiles: None) -> None:
    whole = Model.load(folder, "bfloat16", "cpu")
    (stack,) = whole.text.layers
    assert isinstance(stack, LayerStack)
    parts = Model.load(folder, "bfloat16", "cpu")
    parts.text.layers = stack.layers
    for got, expected in zip(logits(whole), logits(parts), strict=True):
        assert torch.equal(got, expected)


@needs_packing
def test_fused_layers_without_compiled_attention_give_the_plain_models_logits(folder: Path) -> None:
    model = Model.load(folder, "float32", "cpu")
    assert isinstance(model.text.layers[0], FusedLayer)
    assert model.token_attention is None, "so small a model starts sooner without"
    for got, expected in zip(logits(model), logits(plain_model(folder, "float32")), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


@needs_packing
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.self_attn.add_module("q_norm", torch.nn.Identity()),
        lambda layer: setattr(layer.mlp, "act_fn", torch.nn.GELU()),
        lambda layer: setattr(layer.self_attn, "k_proj", torch.nn.Linear(32, 16)),
        lambda layer: setattr(layer, "input_layernorm", torch.nn.LayerNorm(32)),
        lambda layer: setattr(layer.mlp, "up_proj", layer.mlp.up_proj.double()),
    ],
    ids=["another part", "another activation", "a bias of one", "another norm", "another precision"],
)
def test_layers_of_another_kind_are_not_fused(change, tmp_path: Path) -> None:
    layers = plain_model(make_next_mistral(tmp_path), "float32").text.layers
    change(layers[1])
    before = list(layers)
    assert not fuse_layers(layers)
    assert list(layers) == before


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.01), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "with_norms"),
    [(4, 4, 16, False), (6, 2, 64, False), (4, 1, 128, False), (6, 2, 64, True), (4, 2, 24, True)],
)
def test_compiled_attention_equals_torchs(
    heads: int, kv_heads: int, head_dim: int, with_norms: bool, dtype: torch.dtype, allowed: float
) -> None:
    attend = compile_token_attention(heads, kv_heads, head_dim, dtype, with_norms=with_norms)
    assert attend is not None
    norms = example_norms(head_dim, dtype) if with_norms else None
    torch.manual_seed(0)
    stored = (0, 1, 250, 255, 1001)
    rows = (3, 0, 1, 5, 4)  # row 2 belongs to another segment
    width = heads + 2 * kv_heads
    caches = [torch.randn(3, 2, kv_heads, length + 1 + length % 7, head_dim).to(dtype) for length in stored]
    before = [cache.clone() for cache in caches]
    qkv = 2 * torch.randn(6, width * head_dim).to(dtype)
    angles = torch.rand(6, head_dim // 2).repeat(1, 2) * 6
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)
    out = torch.full((6, heads * head_dim), 7.0).to(dtype)
    places = [
        (row, cache.data_ptr(), cache.shape[3], length) for row, cache, length in zip(rows, caches, stored, strict=True)
    ]
    attend(attend.task(places), 1, qkv, cos, sin, out, norms)
    for row, cache, old, length in zip(rows, caches, before, stored, strict=True):
        numbers = qkv[row].float().view(1, width, head_dim)
        if norms is not None:
            HeadNorms(norms.weights.float(), norms.epsilon)(numbers[:, : heads + kv_heads], heads)
        attention.rotate(numbers[:, : heads + kv_heads], cos[row : row + 1].float(), sin[row : row + 1].float())
        query, key, value = numbers[0].split((heads, kv_heads, kv_heads))
        torch.testing.assert_close(cache[1, 0, :, length].float(), key, atol=allowed, rtol=allowed)
        assert torch.equal(cache[1, 1, :, length].float(), value)
        keys, values = cache[1, :, :, : length + 1].float()
        exact = scaled_dot_product_attention(query[None, :, None], keys[None], values[None], enable_gqa=True)
        torch.testing.assert_close(out[row].float(), exact.flatten(), atol=2 * allowed, rtol=2 * allowed)
        old[1, :, :, length] = cache[1, :, :, length]
        assert torch.equal(cache, old)  # no other token is written
    assert (out[2] == 7).all()


def test_without_numba_there_is_no_compiled_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llava_sessions.engine.cpu.token_attention", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compile_token_attention(4, 2, 8, torch.float32) is None
