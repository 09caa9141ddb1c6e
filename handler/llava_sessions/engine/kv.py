"""Owns one session's KV cache: append, crop, measure, free.

Must not know the model, other sessions or what the tokens mean.
"""

from __future__ import annotations

import torch

GROWTH_TOKENS = 256


class SessionKV:
    """Keys and values of one session in one tensor `[layers, 2, kv_heads, capacity, head_dim]`.

    The capacity grows in steps of `GROWTH_TOKENS` tokens, so a step of the engine allocates nothing unless it crosses
    one; attention reads a session's own contiguous memory, whoever shares the batch.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._data = torch.empty((layers, 2, kv_heads, 0, head_dim), dtype=dtype, device=device)
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes held on the device, the unused part of the capacity included."""
        return self._data.nbytes

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in all. Raises torch's out-of-memory error with everything stored intact."""
        layers, two, heads, capacity, head_dim = self._data.shape
        if length <= capacity:
            return
        capacity = -(-length // GROWTH_TOKENS) * GROWTH_TOKENS
        grown = self._data.new_empty((layers, two, heads, capacity, head_dim))
        grown[:, :, :, : self.length].copy_(self._data[:, :, :, : self.length])
        self._data = grown

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store new keys and values, `[kv_heads, tokens, head_dim]` each, from token `start` on, in reserved room."""
        end = start + keys.shape[1]
        self._data[layer, 0, :, start:end] = keys
        self._data[layer, 1, :, start:end] = values

    def read(self, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first `length` keys and values of a layer, `[1, kv_heads, length, head_dim]` each."""
        keys, values = self._data[layer, :, :, :length]
        return keys[None], values[None]

    def crop(self, length: int) -> None:
        """Forget every token behind the first `length`."""
        self.length = min(self.length, length)
