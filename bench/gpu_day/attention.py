"""Attention of one new token of each of many sessions: the compiled kernel, its inputs, and its numbers in float64."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from llava_sessions.engine.fused.head_norms import HeadNorms

# Tokens for which each cache has room behind the stored ones, at least.
_SPARE = 40


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and head size of a layer. `normed`: with norms of queries and keys, as in Qwen3."""

    heads: int
    kv_heads: int
    head_dim: int
    normed: bool = False

    def __str__(self) -> str:
        return f"{self.heads}, {self.kv_heads}, {self.head_dim}{', normed' if self.normed else ''}"


def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs kernels on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernel(heads: Heads, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the device's compiled attention of single tokens. Raises ImportError if the engine has none for it."""
    if device.type == "cuda" or is_interpreted():
        from llava_sessions.engine.cuda.ragged import RaggedAttention  # it needs Triton

        return RaggedAttention(heads.heads, heads.kv_heads, heads.head_dim, dtype, device=device)
    from llava_sessions.engine.cpu.token_attention import TokenAttention  # it needs Numba

    return TokenAttention(heads.heads, heads.kv_heads, heads.head_dim, dtype)


class Batch:
    """Sessions with one new token each, with random keys and values. Memory after the stored tokens is NaN."""

    def __init__(
        self,
        heads: Heads,
        stored: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        layers: int = 1,
        spare: int = 1,
    ) -> None:
        """`stored`: tokens in each session's cache. `spare`: new tokens for which each cache has room."""
        self.heads = heads
        self.stored = list(stored)
        self.dtype = dtype
        self.device = device
        self.layers = layers
        sizes = [(layers, 2, heads.kv_heads, tokens + max(spare, _SPARE), heads.head_dim) for tokens in stored]
        # `[layers, 2, kv_heads, capacity, head_dim]`, as the engine's caches.
        self.caches = [_filled(size, tokens, dtype, device) for size, tokens in zip(sizes, stored, strict=True)]
        width = heads.heads + 2 * heads.kv_heads
        self.qkv = torch.randn(len(stored), width * heads.head_dim, device=device).to(dtype)
        angles = torch.rand(len(stored), heads.head_dim // 2, device=device).mul(6).repeat(1, 2)
        self.cos = angles.cos().to(dtype)
        self.sin = angles.sin().to(dtype)
        self.out = torch.zeros(len(stored), heads.heads * heads.head_dim, dtype=dtype, device=device)
        weights = torch.rand(2, heads.head_dim, device=device).add(0.5).to(dtype)
        self.norms = HeadNorms(weights, 1e-6) if heads.normed else None

    @property
    def kv_bytes(self) -> int:
        """Bytes of the stored keys and values of one layer."""
        return 2 * sum(self.stored) * self.heads.kv_heads * self.heads.head_dim * self.dtype.itemsize

    def places(self, rows: Sequence[int] | None = None) -> list[tuple[int, int, int, int]]:
        """Return the places of a task, those of `rows` or of all sessions."""
        chosen = range(len(self.stored)) if rows is None else rows
        return [(row, self.caches[row].data_ptr(), self.caches[row].shape[3], self.stored[row]) for row in chosen]

    def run(self, kernel: Any, task: Any, layer: int = 0) -> torch.Tensor:
        """Run the kernel on one layer; return `out`."""
        kernel(task, layer, self.qkv, self.cos, self.sin, self.out, self.norms)
        return self.out

    def loop(self, layer: int, at: int = 0) -> None:
        """Do the same with torch's attention, one session after the other, `at` tokens after the stored ones."""
        numbers = self.qkv.view(len(self.stored), -1, self.heads.head_dim)
        groups = (self.heads.heads, self.heads.kv_heads, self.heads.kv_heads)
        for row, cache in enumerate(self.caches):
            query, key, value = numbers[row].split(groups)
            tokens = self.stored[row] + at
            cache[layer, 0, :, tokens] = key
            cache[layer, 1, :, tokens] = value
            keys, values = cache[layer, :, None, :, : tokens + 1]
            grouped = self.heads.heads != self.heads.kv_heads
            attended = scaled_dot_product_attention(query[None, :, None], keys, values, enable_gqa=grouped)
            self.out[row] = attended.flatten()

    def expected(self, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the attention of a row of the first layer, its rotated key and its value, computed in float64.

        The key and the value of the new token are those that the kernel has stored, as any later token sees them.
        """
        heads = self.heads
        tokens = self.stored[row]
        numbers = self.qkv[row].view(-1, heads.head_dim).double()
        if self.norms is not None:
            queries, keys, _ = numbers.split((heads.heads, heads.kv_heads, heads.kv_heads))
            for part, weight in zip((queries, keys), self.norms.weights.double(), strict=True):
                part *= weight * (part.square().mean(-1, keepdim=True) + self.norms.epsilon).rsqrt()
        low, high = numbers.chunk(2, -1)
        rotated = numbers * self.cos[row].double() + torch.cat((-high, low), -1) * self.sin[row].double()
        keys, values = self.caches[row][0, :, :, : tokens + 1].double()
        group = heads.heads // heads.kv_heads
        query = rotated[: heads.heads].view(heads.kv_heads, group, heads.head_dim) * heads.head_dim**-0.5
        weights = (query @ keys.transpose(1, 2)).softmax(-1)
        attended = (weights @ values).flatten()
        end = heads.heads + heads.kv_heads
        return attended, rotated[heads.heads : end], numbers[end:]

    def stored_new(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new token's key and value in the cache of a row, `[kv_heads, head_dim]` each, in float64."""
        keys, values = self.caches[row][0, :, :, self.stored[row]].double()
        return keys, values

    def is_untouched(self, row: int) -> bool:
        """Return whether all memory of a cache after the new token is still NaN."""
        rest = self.caches[row][:, :, :, self.stored[row] + 1 :]
        return bool(rest.isnan().all())


def _filled(size: tuple[int, ...], tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a cache with random numbers of `tokens` tokens and NaN behind them."""
    cache = torch.empty(size, dtype=dtype, device=device)
    cache[:, :, :, :tokens].normal_()
    cache[:, :, :, tokens:] = torch.nan
    return cache


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected number. NaN counts as infinite."""
    difference = (found.double() - expected).abs().max() / expected.abs().max()
    return float(difference.nan_to_num(torch.inf))
