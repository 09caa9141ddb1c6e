"""A small KV cache and head norms with which compiled attention is tried before it is used."""

from __future__ import annotations

import math

import torch

from ..formats.int8 import dequantize, quantize
from ..fused.head_norms import HeadNorms


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


def example_norms(head_dim: int, dtype: torch.dtype) -> HeadNorms:
    """Return head norms whose weights all differ, with a large epsilon.

    The weights are small, unlike those of a checkpoint: with small scores the softmax does not depend on the last bits
    of queries and keys.
    """
    return HeadNorms(torch.linspace(0.2, 0.8, 2 * head_dim).view(2, head_dim).to(dtype), 0.1)
