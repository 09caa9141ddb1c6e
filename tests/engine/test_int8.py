"""Linears with int8 weights compute the numbers of the dequantized weights, in half the memory of bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_sessions.engine.cpu import int8_linears, linears
from llava_sessions.engine.cpu.int8_linears import Int8Linear, Int8TileLinear, quantize
from llava_sessions.engine.cpu.linears import PackedLinear, activate
from llava_sessions.engine.fused.layer import FusedLayer
from llava_sessions.engine.fused.operations import Activation, RowNorm
from llava_sessions.engine.model import Model
from tests.engine.test_layers import compiles, logits, plain_model  # noqa: F401 - a fixture
from tests.support.tiny_families import FAMILIES

has_bfloat16 = linears.works(Int8Linear, torch.bfloat16)
has_tiles = linears.works(int8_linears._pack_as_tiles, torch.bfloat16)
needs_bfloat16 = pytest.mark.skipif(not has_bfloat16, reason="this CPU has no bfloat16")
needs_tiles = pytest.mark.skipif(not has_tiles, reason="this CPU has no AMX")
KINDS = [
    pytest.param(Int8Linear, marks=needs_bfloat16),
    pytest.param(Int8TileLinear, marks=needs_tiles),
]


def linear(columns: int, inputs: int, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(columns)
    return torch.nn.Linear(inputs, columns, bias=bias).to(torch.bfloat16)


def dequantized(plain: torch.nn.Linear) -> torch.nn.Linear:
    """Return the linear in float32 with the weight that its int8 numbers stand for."""
    numbers, scales = quantize(plain.weight.detach())
    made = torch.nn.Linear(plain.in_features, plain.out_features, bias=plain.bias is not None)
    made.weight = torch.nn.Parameter(numbers.float() * scales[:, None], requires_grad=False)
    if plain.bias is not None:
        made.bias = torch.nn.Parameter(plain.bias.detach().float(), requires_grad=False)
    return made


def test_a_weight_is_rounded_to_the_nearest_of_255_steps_of_its_row() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96) * torch.logspace(-6, 3, 64)[:, None]
    weight[5] = 0
    numbers, scales = quantize(weight)
    assert numbers.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert numbers.abs().amax(1).tolist() == [0 if row == 5 else 127 for row in range(64)]
    assert ((numbers * scales[:, None] - weight).abs() <= 0.501 * scales[:, None]).all()


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 32, 33, 48, 100])
@pytest.mark.parametrize("activation", Activation)
def test_the_results_are_those_of_the_dequantized_weights(
    kind: type[PackedLinear], rows: int, activation: Activation
) -> None:
    plain = linear(192, 160, bias=rows % 2 == 1)
    packed = kind(plain, activation)
    norm = RowNorm(torch.nn.LayerNorm(160).to(torch.bfloat16))
    inputs = torch.randn(rows, 160).to(torch.bfloat16)
    exact = dequantized(plain)
    for before in (None, norm):
        normed = inputs if before is None else before(inputs.float().to(torch.bfloat16))
        expected = activate(exact(normed.float()), activation)
        added = torch.randn(expected.shape).to(torch.bfloat16)
        torch.testing.assert_close(packed(inputs, None, before).float(), expected, atol=0.02, rtol=0.02)
        torch.testing.assert_close(packed(inputs, added, before).float(), expected + added, atol=0.03, rtol=0.02)


@torch.inference_mode()
@needs_tiles
def test_every_int8_number_is_exact() -> None:
    numbers = torch.arange(-127, 129).clamp_max(127).repeat(32, 1)
    plain = torch.nn.Linear(256, 32, bias=False).to(torch.bfloat16)
    plain.weight.copy_(numbers)
    for rows in (16, 32):
        inputs = torch.eye(256).to(torch.bfloat16).view(-1, rows, 256)
        got = torch.cat([Int8TileLinear(plain)(part) for part in inputs])
        torch.testing.assert_close(got.float(), numbers.T.float(), atol=1e-6, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_takes_half_the_bytes_of_bfloat16(kind: type[PackedLinear]) -> None:
    plain = linear(256, 512)
    packed = kind(plain)
    assert packed.weight_bytes == 256 * 512 + 256 * 4
    stored = packed._tiles if isinstance(packed, Int8TileLinear) else packed._numbers
    assert stored.nbytes == 256 * 512
    kept = [value for value in vars(packed).values() if isinstance(value, torch.Tensor)]
    assert sum(value.nbytes for value in kept) < 1.05 * 256 * 512, "no copy in bfloat16 stays"


@torch.inference_mode()
@needs_bfloat16
def test_a_weight_that_is_not_finite_keeps_its_precision() -> None:
    plain = linear(32, 32)
    plain.weight[3, 4] = torch.inf
    assert not isinstance(int8_linears.pack(plain), (Int8Linear, Int8TileLinear))


@needs_bfloat16
def test_a_model_in_int8_computes_the_logits_of_the_dequantized_weights(tmp_path: Path, compiles: None) -> None:  # noqa: F811
    folder = next(iter(FAMILIES.values()))(tmp_path)
    model = Model.load(folder, "bfloat16", "cpu", weights="int8")
    fused = [part for part in model.text.modules() if isinstance(part, FusedLayer)]
    assert len(fused) == model.kv_shape.layers
    int8 = [part for part in model._model.modules() if isinstance(part, (Int8Linear, Int8TileLinear))]
    assert len(int8) == 4 * len(fused) + 1, "the vision tower keeps bfloat16"
    exact = plain_model(folder, "float32")
    for parent in [*exact.text.modules(), exact._model]:
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and (parent is not exact._model or name == "lm_head"):
                setattr(parent, name, dequantized(child.to(torch.bfloat16)))
    original, plain, expected, got = (
        torch.cat(logits(one))
        for one in (plain_model(folder, "float32"), plain_model(folder, "bfloat16"), exact, model)
    )
    # The error relative to the dequantized weights is about that of plain bfloat16 relative to the original ones.
    assert (got - expected).abs().mean() < 1.5 * (plain - original).abs().mean()
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()


@needs_bfloat16
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_without_bfloat16_on_a_cpu_is_an_error_that_names_the_key(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"^`llava.weights` .*got"):
        int8_linears.check(dtype)


def test_a_cpu_without_bfloat16_rejects_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    linears.works.cache_clear()
    try:
        with pytest.raises(ValueError, match="needs a CPU with bfloat16"):
            int8_linears.check(torch.bfloat16)
    finally:
        linears.works.cache_clear()
