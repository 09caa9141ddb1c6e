"""Trials of the compiled attention on small examples, against torch's numbers in float32."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from .amx_pictures import PictureAttention
from .amx_sessions import SessionAttention
from .example_cache import ExampleCache, example_norms

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


def sessions_match(compiled: SessionAttention, heads: int, cache: ExampleCache, with_norms: bool) -> bool:
    """Return whether 35 rows of a session that stores 20 tokens, not rotated, have torch's numbers.

    `cache`: of 56 tokens. `with_norms`: of query and key heads.
    """
    stored, rows = 20, 35
    kv_heads, head_dim, layer = cache.kv_heads, cache.head_dim, cache.layers - 1
    qkv = _wave(rows + 1, heads + 2 * kv_heads, head_dim)
    out = torch.empty(rows + 1, heads * head_dim, dtype=torch.bfloat16)
    angle = torch.zeros(rows + 1, head_dim)
    task = compiled.task([(1, rows, cache.address, cache.capacity, stored)])
    norms = example_norms(head_dim, cache.dtype) if with_norms else None
    compiled(task, layer, qkv, angle.cos().bfloat16(), angle.sin().bfloat16(), out, norms)
    if norms is not None:
        norms(qkv[:, : heads + kv_heads], heads)
    query, new_keys, new_values = qkv[1:].float().transpose(0, 1).split((heads, kv_heads, kv_heads))
    keys, values = cache.read(layer)[:, :, : stored + rows]
    for got, expected in ((keys[:, stored:], new_keys), (values[:, stored:], new_values)):
        # After a norm the last bit may be another one.
        if not torch.allclose(got, expected, atol=cache.step, rtol=0 if norms is None else 2**-7):
            return False
    mask = torch.ones(rows, stored + rows, dtype=torch.bool).tril(stored)
    expected = scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=mask, enable_gqa=True)
    got = out[1:].view(rows, heads, head_dim).transpose(0, 1)
    return torch.allclose(got.float(), expected[0], atol=_ALLOWED, rtol=_ALLOWED)
