"""Attention by products equals torch's own, and torch's own is called where products do not apply."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llava_sessions.engine.cpu import attention as attention_module
from llava_sessions.engine.cpu.attention import attention, full_attention


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("stored", "new"), [(37, 1), (37, 9), (0, 1), (0, 70), (300, 64), (300, 200)])
def test_attention_by_products_equals_torchs(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, stored: int, new: int
) -> None:
    monkeypatch.setattr(attention_module, "USE_PRODUCTS", True)
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


def test_attention_in_float32_calls_torchs() -> None:
    query, keys, values = torch.randn(3, 1, 4, 6, 16)
    expected = scaled_dot_product_attention(query, keys, values, is_causal=True, scale=0.25)
    assert torch.equal(attention(query, keys, values, 0.25, is_causal=True), expected)


@pytest.mark.parametrize("pictures", [1, 3])
def test_picture_attention_by_products_equals_torchs(monkeypatch: pytest.MonkeyPatch, pictures: int) -> None:
    monkeypatch.setattr(attention_module, "USE_PRODUCTS", True)
    torch.manual_seed(0)
    query, keys, values = torch.randn(3, pictures, 250, 4, 16).bfloat16().transpose(2, 3)
    exact = scaled_dot_product_attention(query.float(), keys.float(), values.float(), scale=0.3)
    torch.testing.assert_close(full_attention(query, keys, values, 0.3).float(), exact, atol=0.03, rtol=0.03)
    plain = full_attention(query.float(), keys.float(), values.float(), 0.3)
    assert torch.equal(plain, exact)
