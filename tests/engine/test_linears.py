"""Packed linears give the plain linears' outputs with the fewest bytes, and are not used where they do not work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llava_sessions.engine.cpu import amx, linears
from llava_sessions.engine.cpu.linears import PackedLinear, TileLinear, can_pack, pack, pack_all
from llava_sessions.engine.fused.operations import Activation, RowNorm, activate

needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no packed linears")
needs_amx = pytest.mark.skipif(not amx.is_available(), reason="this CPU has no AMX")


def layers(dtype: torch.dtype) -> torch.nn.Module:
    """Return two linears, one of them in a nested module."""
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(48, 80, bias=False), torch.nn.SiLU())
    return torch.nn.Sequential(inner, torch.nn.Linear(80, 24)).to(dtype).eval()


def plain(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.nn.Linear:
    """Return a linear with this weight, `[out, in]`."""
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = torch.nn.Parameter(bias, requires_grad=False)
    return made


@needs_packing
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.01), (torch.float32, 1e-5)])
def test_packed_linears_give_the_plain_linears_outputs(dtype: torch.dtype, allowed: float, rows: int) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this CPU has no packed linears in {dtype}")
    model = layers(dtype)
    inputs = torch.randn(1, rows, 48).to(dtype)
    with torch.inference_mode():
        expected = model(inputs)
        assert pack_all(model) == 2
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2
        torch.testing.assert_close(model(inputs), expected, atol=allowed, rtol=allowed)


@needs_packing
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 16, 70])
@pytest.mark.parametrize("checkpoint", [torch.float16, torch.bfloat16, torch.float32])
def test_a_float32_weight_that_fits_float16_takes_half_the_bytes_and_gives_the_same_outputs(
    checkpoint: torch.dtype, rows: int
) -> None:
    torch.manual_seed(0)
    # A range as wide as that of trained weights, including some that float16 would round to zero.
    weight = torch.randn(130, 70) * torch.tensor([1e-9, 1e-6, 0.02, 0.02, 3.0]).repeat(14)
    one = plain(weight.to(checkpoint).float(), torch.randn(130))
    inputs = 40 * torch.randn(2, rows, 70)
    added = torch.randn(2, rows, 130)
    with torch.inference_mode():
        packed = pack(one)
        assert packed.weight_bytes == weight.numel() * (4 if checkpoint == torch.float32 else 2)
        exact = one.double()(inputs.double())
        # The allowed error is float32's own: some rounding steps at the size of the largest addend.
        allowed = 16 * 2**-24 * (inputs.abs().max() * weight.abs().max()).item()
        assert (packed(inputs) - exact).abs().max() < allowed
        assert (packed(inputs, added) - (exact + added)).abs().max() < allowed


def test_a_bfloat16_weight_of_any_size_is_exact_in_float16() -> None:
    exponents = torch.arange(-31, 1).float()
    weight = (1 + 127 / 128) * 2 ** exponents[:, None] * torch.ones(1, 8)
    weight[:, 0] = 1.9921875
    with torch.inference_mode():
        packed = pack(plain(weight))
        assert packed.weight_bytes == weight.numel() * 2
        assert torch.equal(packed(torch.eye(8)), weight.T)


@pytest.mark.parametrize("what", ["one of another size", "not a number", "infinite", "too fine"])
def test_a_weight_that_does_not_fit_float16_keeps_float32(what: str) -> None:
    weight = torch.ones(16, 16)
    weight[3] = {"one of another size": 2.0**-45, "not a number": torch.nan, "infinite": torch.inf, "too fine": 1 / 3}[
        what
    ]
    with torch.inference_mode():
        packed = pack(plain(weight))
        assert packed.weight_bytes == weight.numel() * 4
        expected = torch.nn.functional.linear(torch.eye(16), weight)
        torch.testing.assert_close(packed(torch.eye(16)), expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("weight", [torch.zeros(16, 16), torch.full((16, 16), 2.0**-60)], ids=["nothing", "tiny"])
def test_zero_and_tiny_weights_fit_float16(weight: torch.Tensor) -> None:
    with torch.inference_mode():
        packed = pack(plain(weight))
        assert packed.weight_bytes == weight.numel() * 2
        assert torch.equal(packed(torch.eye(16)), weight.T)


def test_other_precisions_are_not_packed() -> None:
    model = layers(torch.float16)
    assert pack_all(model) == 0
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@needs_amx
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 49, 130])
@pytest.mark.parametrize("norm", [None, torch.nn.LayerNorm, torch.nn.RMSNorm])
@pytest.mark.parametrize("activation", list(Activation))
def test_linears_of_tiles_give_the_exact_outputs(rows: int, norm: type | None, activation: Activation) -> None:
    torch.manual_seed(0)
    # 11 blocks of columns, of inputs that are not a power of two.
    one = plain((torch.randn(352, 160) / 12).bfloat16(), torch.randn(352).bfloat16())
    before = None
    if norm is not None:
        made = norm(160, dtype=torch.bfloat16)
        made.weight.data = torch.rand(160).bfloat16() + 0.5
        made.variance_epsilon = 1e-6
        before = RowNorm(made)
    inputs = 3 * torch.randn(2 * rows, 160).bfloat16()[::2] + 1  # not contiguous
    with torch.inference_mode():
        packed = pack(one, activation)
        assert isinstance(packed, TileLinear)
        normed = inputs if before is None else before(inputs)
        exact = activate(torch.nn.functional.linear(normed.float(), one.weight.float(), one.bias.float()), activation)
        added = torch.randn(exact.shape).bfloat16()
        for more in (None, added):
            got = packed(inputs, more, before).float()
            expected = exact if more is None else exact + more.float()
            torch.testing.assert_close(got, expected, atol=0.03, rtol=0.02)


@needs_amx
def test_a_row_of_a_linear_of_tiles_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    rows = torch.randn(70, 96).bfloat16()
    with torch.inference_mode():
        packed = pack(plain(torch.randn(64, 96).bfloat16()))
        together = packed(rows)
        for first, last in ((0, 1), (3, 19), (5, 22), (37, 70)):
            assert torch.equal(packed(rows[first:last]), together[first:last])


@needs_packing
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip(f"this CPU has no packed linears in {dtype}")
    with torch.inference_mode():  # as of the head in a prefill step that samples no token
        assert pack(plain(torch.randn(64, 96).to(dtype)))(torch.empty(0, 96, dtype=dtype)).shape == (0, 64)


@needs_amx
def test_linears_of_tiles_do_not_share_weights() -> None:
    with torch.inference_mode():
        packed = pack(plain(torch.randn(64, 96).bfloat16()))
        assert isinstance(packed, TileLinear)
        assert packed._tiles.data_ptr() % 64 == 0
        kept = [pack(plain(torch.ones(64, 96).bfloat16() * number)) for number in range(3)]
        del packed
        for number, each in enumerate(kept):
            assert torch.equal(each(torch.ones(1, 96).bfloat16()), torch.full((1, 64), 96.0 * number).bfloat16())


@pytest.mark.parametrize("what", ["no AMX", "wrong numbers", "a shape without whole tiles"])
def test_without_tiles_bfloat16_weights_are_packed_by_onednn(
    what: str, monkeypatch: pytest.MonkeyPatch, forgets_trials: None
) -> None:
    if not can_pack(torch.bfloat16):
        pytest.skip("this CPU has no packed bfloat16 linears")
    linears.works.cache_clear()
    if what == "no AMX":
        monkeypatch.setattr(amx, "is_available", lambda: False)
    elif what == "wrong numbers":
        right = TileLinear.forward
        monkeypatch.setattr(TileLinear, "forward", lambda *given: right(*given) + 1)
    columns = 48 if what == "a shape without whole tiles" else 64
    weight = torch.randn(columns, 96).bfloat16()
    with torch.inference_mode():
        packed = pack(plain(weight))
        assert not isinstance(packed, TileLinear)
        torch.testing.assert_close(packed(torch.eye(96).bfloat16()), weight.T)


@pytest.fixture
def forgets_trials() -> Iterator[None]:
    """Try the kinds of linears again in this test, and once more after it."""
    linears.works.cache_clear()
    yield
    linears.works.cache_clear()


def test_without_the_private_ops_nothing_is_packed(monkeypatch: pytest.MonkeyPatch, forgets_trials: None) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = layers(torch.float32)
    assert pack_all(model) == 0
    assert type(model[1]) is torch.nn.Linear


def test_without_fbgemm_the_weight_keeps_float32(forgets_trials: None) -> None:
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "qnnpack"  # as on Arm
    try:
        packed = pack(plain(torch.ones(8, 8)))
    finally:
        torch.backends.quantized.engine = engine
    assert packed.weight_bytes == 8 * 8 * 4
    with torch.inference_mode():
        assert torch.equal(packed(torch.eye(8)), torch.ones(8, 8))
