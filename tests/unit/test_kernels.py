"""Shows that the faster ways compute what the usual ones compute, and stand back where they can't."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llava_sessions.engine import kernels
from llava_sessions.engine.kernels import PackedLinear, attention, can_prepack, full_attention, prepack_linears

needs_packing = pytest.mark.skipif(not can_prepack(torch.float32), reason="this torch has no packed linears")


def layers(dtype: torch.dtype) -> torch.nn.Module:
    """Two linears, one of them inside another module."""
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(48, 80, bias=False), torch.nn.SiLU())
    return torch.nn.Sequential(inner, torch.nn.Linear(80, 24)).to(dtype).eval()


@needs_packing
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.01), (torch.float32, 1e-5)])
def test_packed_linears_give_the_plain_ones_numbers(dtype: torch.dtype, allowed: float, rows: int) -> None:
    if not can_prepack(dtype):
        pytest.skip(f"this CPU has no packed linears in {dtype}")
    model, inputs = layers(dtype), torch.randn(1, rows, 48).to(dtype)
    with torch.inference_mode():
        wanted = model(inputs)
        assert prepack_linears(model) == 2
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2
        torch.testing.assert_close(model(inputs), wanted, atol=allowed, rtol=allowed)


def test_other_precisions_are_left_alone() -> None:
    model = layers(torch.float16)
    assert prepack_linears(model) == 0
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_without_the_private_ops_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "can_prepack", can_prepack.__wrapped__)  # what it found before does not count
    model = layers(torch.float32)
    assert prepack_linears(model) == 0
    assert type(model[1]) is torch.nn.Linear


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("stored", "new"), [(37, 1), (37, 9), (0, 1), (0, 70), (300, 64), (300, 200)])
def test_attention_by_products_is_attention(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, stored: int, new: int
) -> None:
    monkeypatch.setattr(kernels, "_PRODUCTS_WIN", True)
    torch.manual_seed(0)
    query = torch.randn(1, new, 4, 16).bfloat16().transpose(1, 2)  # rows first, as in a packed forward
    keys, values = torch.randn(2, 1, kv_heads, 512, 16).bfloat16()[..., : stored + new, :]
    mask = torch.ones(new, stored + new, dtype=torch.bool).tril(stored) if new > 1 else None
    exact = scaled_dot_product_attention(
        query.float(), keys.float(), values.float(), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    got = attention(query, keys, values, 0.3, mask)
    assert got.shape == query.shape
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, atol=0.03, rtol=0.03)


def test_attention_in_float32_is_torchs_own() -> None:
    query, keys, values = torch.randn(3, 1, 4, 6, 16)
    wanted = scaled_dot_product_attention(query, keys, values, is_causal=True, scale=0.25)
    assert torch.equal(attention(query, keys, values, 0.25, is_causal=True), wanted)


@pytest.mark.parametrize("pictures", [1, 3])
def test_attention_of_a_picture_by_products_is_attention(monkeypatch: pytest.MonkeyPatch, pictures: int) -> None:
    monkeypatch.setattr(kernels, "_PRODUCTS_WIN", True)
    torch.manual_seed(0)
    query, keys, values = torch.randn(3, pictures, 250, 4, 16).bfloat16().transpose(2, 3)
    exact = scaled_dot_product_attention(query.float(), keys.float(), values.float(), scale=0.3)
    torch.testing.assert_close(full_attention(query, keys, values, 0.3).float(), exact, atol=0.03, rtol=0.03)
    plain = full_attention(query.float(), keys.float(), values.float(), 0.3)
    assert torch.equal(plain, exact)
