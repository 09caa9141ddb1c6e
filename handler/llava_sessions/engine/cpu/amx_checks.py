"""Trials of the compiled attention on small examples, against torch's numbers in float32."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from .amx_pictures import PictureAttention
from .amx_sessions import SessionAttention

_ALLOWED = 0.03


def _wave(*shape: int) -> torch.Tensor:
    """Return bfloat16 numbers between -1 and 1 that vary along the last dimension."""
    count = int(torch.tensor(shape).prod())
    return torch.linspace(-9, 9, count).mul(37).sin().bfloat16().view(shape)


def pictures_match(compiled: PictureAttention, head_dim: int) -> bool:
    """Return whether attention of two pictures of 70 rows has torch's numbers."""
    query, keys, values = _wave(3, 2, 70, 2, head_dim).transpose(2, 3)
    expected = scaled_dot_product_attention(query.float(), keys.float(), values.float(), scale=0.5)
    got = compiled(query, keys, values, 0.5)
    return torch.allclose(got.float(), expected, atol=_ALLOWED, rtol=_ALLOWED)


def sessions_match(compiled: SessionAttention, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Return whether 35 rows of a session that stores 20 tokens, not rotated, have torch's numbers."""
    stored, rows, capacity = 20, 35, 56
    kv = _wave(1, 2, kv_heads, capacity, head_dim)
    qkv = _wave(rows + 1, heads + 2 * kv_heads, head_dim)
    out = torch.empty(rows + 1, heads * head_dim, dtype=torch.bfloat16)
    angle = torch.zeros(rows + 1, head_dim)
    task = compiled.task([(1, rows, kv.data_ptr(), capacity, stored)])
    compiled(task, 0, qkv, angle.cos().bfloat16(), angle.sin().bfloat16(), out)
    query, new_keys, new_values = qkv[1:].transpose(0, 1).split((heads, kv_heads, kv_heads))
    keys, values = kv[0, :, :, : stored + rows]
    if not torch.equal(keys[:, stored:], new_keys) or not torch.equal(values[:, stored:], new_values):
        return False
    mask = torch.ones(rows, stored + rows, dtype=torch.bool).tril(stored)
    expected = scaled_dot_product_attention(
        query[None].float(), keys[None].float(), values[None].float(), attn_mask=mask, enable_gqa=True
    )
    got = out[1:].view(rows, heads, head_dim).transpose(0, 1)
    return torch.allclose(got.float(), expected[0], atol=_ALLOWED, rtol=_ALLOWED)
