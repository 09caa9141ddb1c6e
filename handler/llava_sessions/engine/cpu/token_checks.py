"""Whether compiled attention of single tokens computes torch's numbers, tried on a small example."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..formats.int8 import dequantize, quantize
from . import attention

if TYPE_CHECKING:
    from .token_attention import TokenAttention  # importing it needs Numba


class ExampleCache:
    """A KV cache with numbers for all `capacity` tokens, in the layout of `KVShape`."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None,
    ) -> None:
        self.layers = layers
        self.kv_heads = kv_heads
        self.capacity = capacity
        self.head_dim = head_dim
        self.dtype = dtype
        heads = (layers, 2, kv_heads, capacity)
        numbers = torch.linspace(-9, 9, math.prod(heads) * head_dim).sin().view(*heads, head_dim)
        parts = (numbers.to(dtype),) if kv_dtype is None else quantize(numbers)
        # One block, of which the parts are views.
        self._memory = torch.cat([part.flatten().view(torch.uint8) for part in parts])
        views = self._memory.split([part.nbytes for part in parts])
        self._parts = [view.view(part.dtype).view(part.shape) for view, part in zip(views, parts, strict=True)]

    @property
    def address(self) -> int:
        """Address of the block."""
        return self._memory.data_ptr()

    def read(self, layer: int) -> torch.Tensor:
        """Return keys and values of a layer, float32 `[2, kv_heads, capacity, head_dim]`."""
        parts = [part[layer] for part in self._parts]
        return parts[0].float() if len(parts) == 1 else dequantize(parts[0], parts[1], torch.float32)

    @property
    def step(self) -> float:
        """Most that a number between -1.5 and 1.5 changes when it is stored, apart from rounding to `dtype`."""
        return 0.0 if len(self._parts) == 1 else 1.5 / 127


def matches_torch(compiled: TokenAttention, cache: ExampleCache, heads: int) -> bool:
    """Return whether the compiled attention stores and computes torch's numbers with an example's cache."""
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
    compiled(compiled.task([(1, cache.address, cache.capacity, stored)]), layer, qkv, cos, sin, out)
    numbers = qkv.view(2, width, head_dim)
    attention.rotate(numbers[:, : heads + kv_heads], cos, sin)
    query, key, value = numbers[1].float().split((heads, kv_heads, kv_heads))
    keys, values = cache.read(layer)[:, :, : stored + 1]
    for got, expected in ((keys[:, stored], key), (values[:, stored], value)):
        if not torch.allclose(got, expected, atol=allowed + cache.step, rtol=allowed):
            return False
    expected = scaled_dot_product_attention(query[None, :, None], keys[None], values[None], enable_gqa=True)
    return torch.allclose(out[1].float(), expected.flatten(), atol=allowed, rtol=allowed)
