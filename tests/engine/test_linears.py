"""Shows that packed linears compute what plain ones compute, in as few bytes as hold them, and stand back where they
can't.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llava_sessions.engine.cpu import linears
from llava_sessions.engine.cpu.linears import PackedLinear, can_pack, pack, pack_all

needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no packed linears")


def layers(dtype: torch.dtype) -> torch.nn.Module:
    """Two linears, one of them inside another module."""
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(48, 80, bias=False), torch.nn.SiLU())
    return torch.nn.Sequential(inner, torch.nn.Linear(80, 24)).to(dtype).eval()


def plain(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.nn.Linear:
    """A linear of this weight `[out, in]`."""
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = torch.nn.Parameter(bias, requires_grad=False)
    return made


@needs_packing
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.01), (torch.float32, 1e-5)])
def test_packed_linears_give_the_plain_ones_numbers(dtype: torch.dtype, allowed: float, rows: int) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this CPU has no packed linears in {dtype}")
    model = layers(dtype)
    inputs = torch.randn(1, rows, 48).to(dtype)
    with torch.inference_mode():
        wanted = model(inputs)
        assert pack_all(model) == 2
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2
        torch.testing.assert_close(model(inputs), wanted, atol=allowed, rtol=allowed)


@needs_packing
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 16, 70])
@pytest.mark.parametrize("checkpoint", [torch.float16, torch.bfloat16, torch.float32])
def test_in_float32_a_weight_that_half_the_bytes_hold_takes_half_and_gives_the_same_numbers(
    checkpoint: torch.dtype, rows: int
) -> None:
    torch.manual_seed(0)
    # As wide a range as trained weights have, with some that float16 would have as zero.
    weight = torch.randn(130, 70) * torch.tensor([1e-9, 1e-6, 0.02, 0.02, 3.0]).repeat(14)
    one = plain(weight.to(checkpoint).float(), torch.randn(130))
    inputs = 40 * torch.randn(2, rows, 70)
    added = torch.randn(2, rows, 130)
    with torch.inference_mode():
        packed = pack(one)
        assert packed.weight_bytes == weight.numel() * (4 if checkpoint == torch.float32 else 2)
        exact = one.double()(inputs.double())
        # Off by no more than float32's own product: some of its steps at the size of the largest addend.
        allowed = 16 * 2**-24 * (inputs.abs().max() * weight.abs().max()).item()
        assert (packed(inputs) - exact).abs().max() < allowed
        assert (packed(inputs, added) - (exact + added)).abs().max() < allowed


def test_a_bfloat16_weight_is_held_to_the_last_bit_however_small_it_is() -> None:
    exponents = torch.arange(-31, 1).float()
    weight = (1 + 127 / 128) * 2 ** exponents[:, None] * torch.ones(1, 8)
    weight[:, 0] = 1.9921875
    with torch.inference_mode():
        packed = pack(plain(weight))
        assert packed.weight_bytes == weight.numel() * 2
        assert torch.equal(packed(torch.eye(8)), weight.T)


@pytest.mark.parametrize("what", ["one of another size", "not a number", "infinite", "too fine"])
def test_a_weight_that_half_the_bytes_can_not_hold_stays_whole(what: str) -> None:
    weight = torch.ones(16, 16)
    weight[3] = {"one of another size": 2.0**-45, "not a number": torch.nan, "infinite": torch.inf, "too fine": 1 / 3}[
        what
    ]
    with torch.inference_mode():
        packed = pack(plain(weight))
        assert packed.weight_bytes == weight.numel() * 4
        wanted = torch.nn.functional.linear(torch.eye(16), weight)
        torch.testing.assert_close(packed(torch.eye(16)), wanted, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("weight", [torch.zeros(16, 16), torch.full((16, 16), 2.0**-60)], ids=["nothing", "tiny"])
def test_weights_of_nothing_and_of_next_to_nothing_are_held_too(weight: torch.Tensor) -> None:
    with torch.inference_mode():
        packed = pack(plain(weight))
        assert packed.weight_bytes == weight.numel() * 2
        assert torch.equal(packed(torch.eye(16)), weight.T)


def test_other_precisions_are_left_alone() -> None:
    model = layers(torch.float16)
    assert pack_all(model) == 0
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.fixture
def forgets_trials() -> Iterator[None]:
    """Kinds of linears are tried again in this test, and again after it."""
    linears.works.cache_clear()
    yield
    linears.works.cache_clear()


def test_without_the_private_ops_nothing_is_packed(monkeypatch: pytest.MonkeyPatch, forgets_trials: None) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = layers(torch.float32)
    assert pack_all(model) == 0
    assert type(model[1]) is torch.nn.Linear


def test_where_torch_has_no_fbgemm_the_weight_stays_whole(forgets_trials: None) -> None:
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "qnnpack"  # as on Arm
    try:
        packed = pack(plain(torch.ones(8, 8)))
    finally:
        torch.backends.quantized.engine = engine
    assert packed.weight_bytes == 8 * 8 * 4
    with torch.inference_mode():
        assert torch.equal(packed(torch.eye(8)), torch.ones(8, 8))
