"""Whether compiled attention of single tokens computes torch's numbers, tried on a small example."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from . import attention
from .example_cache import ExampleCache, example_norms

if TYPE_CHECKING:
    from .token_attention import TokenAttention  # importing it needs Numba


def matches_torch(compiled: TokenAttention, cache: ExampleCache, heads: int, with_norms: bool) -> bool:
    """Return whether the compiled attention stores and computes torch's numbers with an example's cache.

    `with_norms`: of query and key heads.
    """
    kv_heads, head_dim, dtype = cache.kv_heads, cache.head_dim, cache.dtype
    stored = cache.capacity - 2
    width = heads + 2 * kv_heads
    allowed = 0.03 if dtype == torch.bfloat16 else 1e-4
    qkv = torch.linspace(-5, 5, 2 * width * head_dim).cos().to(dtype).view(2, -1)
    angles = torch.linspace(0, 3, head_dim // 2).repeat(2, 2)
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)
    out = torch.empty(2, heads * head_dim, dtype=dtype)
    layer = cache.layers - 1
    norms = example_norms(head_dim, dtype) if with_norms else None
    compiled(compiled.task([(1, cache.address, cache.capacity, stored)]), layer, qkv, cos, sin, out, norms)
    numbers = qkv.view(2, width, head_dim)
    rotated = numbers[:, : heads + kv_heads]
    if norms is not None:
        norms(rotated, heads)
    attention.rotate(rotated, cos, sin)
    query, key, value = numbers[1].float().split((heads, kv_heads, kv_heads))
    keys, values = cache.read(layer)[:, :, : stored + 1]
    for got, expected in ((keys[:, stored], key), (values[:, stored], value)):
        if not torch.allclose(got, expected, atol=allowed + cache.step, rtol=allowed):
            return False
    expected = scaled_dot_product_attention(query[None, :, None], keys[None], values[None], enable_gqa=True)
    return torch.allclose(out[1].float(), expected.flatten(), atol=allowed, rtol=allowed)
