"""Compiled attention of single tokens and compiled decoder layers for the CPU. Both are tried before they are used."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..fused import layer as fused_layer
from ..fused.layer import FusedLayer
from ..fused.linear import Pack
from . import attention, linears

if TYPE_CHECKING:
    from .amx_sessions import SessionAttention  # importing it needs Numba
    from .token_attention import TokenAttention

log = logging.getLogger(__name__)


class Heads(Protocol):
    """Dimensions and precision of KV caches."""

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer."""

    @property
    def head_dim(self) -> int:
        """Numbers of a key."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of keys and values."""


def fuse_layers(layers: torch.nn.ModuleList, pack: Pack = linears.pack) -> bool:
    """Replace all decoder layers on the CPU by fused ones, see `fused.layer.fuse_layers`."""
    return fused_layer.fuse_layers(layers, pack, linears.packable)


@torch.inference_mode()
def compile_token_attention(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> TokenAttention | None:
    """Return compiled attention of single tokens.

    Returns None, with a warning in the log, if compilation fails or if the result differs from torch's numbers.
    """
    try:
        from .token_attention import TokenAttention

        compiled = TokenAttention(heads, kv_heads, head_dim, dtype)
        if _matches_torch(compiled, heads, kv_heads, head_dim, dtype):
            return compiled
        log.warning("token_attention_wrong heads=%d kv_heads=%d head_dim=%d", heads, kv_heads, head_dim)
    except Exception:  # any error of the compiler: torch's own attention is used instead
        log.warning("token_attention_missing", exc_info=True)
    return None


def _matches_torch(compiled: TokenAttention, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Return whether the compiled attention computes torch's numbers on a small example."""
    stored = 6
    capacity = 8
    width = heads + 2 * kv_heads
    allowed = 0.03 if dtype == torch.bfloat16 else 1e-4
    kv = torch.linspace(-9, 9, 2 * kv_heads * capacity * head_dim).sin().to(dtype)
    kv = kv.view(1, 2, kv_heads, capacity, head_dim)
    qkv = torch.linspace(-5, 5, 2 * width * head_dim).cos().to(dtype).view(2, -1)
    angles = torch.linspace(0, 3, head_dim // 2).repeat(2, 2)
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)
    out = torch.empty(2, heads * head_dim, dtype=dtype)
    compiled(compiled.task([(1, kv.data_ptr(), capacity, stored)]), 0, qkv, cos, sin, out)
    numbers = qkv.view(2, width, head_dim)
    attention.rotate(numbers[:, : heads + kv_heads], cos, sin)
    query, key, value = numbers[1].split((heads, kv_heads, kv_heads))
    if not torch.allclose(kv[0, 0, :, stored], key, atol=allowed, rtol=allowed):
        return False
    if not torch.allclose(kv[0, 1, :, stored], value, atol=allowed, rtol=allowed):
        return False
    keys, values = kv[0, :, :, : stored + 1].float()
    expected = scaled_dot_product_attention(query[None, :, None].float(), keys[None], values[None], enable_gqa=True)
    return torch.allclose(out[1].float(), expected.flatten(), atol=allowed, rtol=allowed)


@torch.inference_mode()
def compile_layers(
    layers: torch.nn.ModuleList, tokens: TokenAttention, sessions: SessionAttention | None, heads: Heads
) -> None:
    """Compile each fused layer as a whole where that is possible; leave all as they are if it fails.

    `tokens`, `sessions`: see `CompiledLayer`. `heads`: dimensions of the KV caches. The first layer is tried on an
    example; a failure is a warning in the log.
    """
    fused: list[Any] = list(layers)
    try:
        for layer in fused:
            _compile_whole(layer, tokens, sessions)
        if all(_whole_matches_parts(layer, tokens, heads) for layer in fused[:1]):
            return
        log.warning("compiled_layer_wrong")
    except Exception:  # any error of the compiler
        log.warning("compiled_layer_missing", exc_info=True)
    for layer in fused:
        layer.whole = None


def _compile_whole(layer: FusedLayer, tokens: TokenAttention, sessions: SessionAttention | None) -> None:
    """Compile a layer as a whole, if all its linears are of tiles of one kind."""
    packed = (layer.qkv, layer.output, layer.gate_up, layer.down)
    parts = [part for part in packed if isinstance(part, linears.TileLinear)]
    if len(parts) == len(packed) and len({type(part) for part in parts}) == 1:
        from .amx_layer import CompiledLayer  # it needs Numba

        layer.whole = CompiledLayer(layer.layer, parts, (layer.input_norm, layer.mlp_norm), tokens, sessions)


class _Example:
    """Two sessions with one new token each, as a `Batch`, on KV caches of their own."""

    def __init__(self, layer: int, tokens: TokenAttention, heads: Heads) -> None:
        stored = 5
        size = (2, layer + 1, 2, heads.kv_heads, stored + 1, heads.head_dim)
        numbers = torch.linspace(-9, 9, torch.Size(size).numel()).sin()
        self._caches = numbers.view(size).to(heads.dtype)
        task = tokens.task([(row, cache.data_ptr(), stored + 1, stored) for row, cache in enumerate(self._caches)])
        self._tokens = tokens
        self.tasks = (task, None)

    def attend(self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """As `Batch.attend`."""
        kv_heads, _, head_dim = self._caches.shape[3:]
        out = qkv.new_empty(len(qkv), qkv.shape[1] - 2 * kv_heads * head_dim)
        self._tokens(self.tasks[0], layer, qkv, cos, sin, out)
        return out


def _whole_matches_parts(layer: FusedLayer, tokens: TokenAttention, heads: Heads) -> bool:
    """Return whether a layer gives the same numbers as one call and part by part. It is then as it was before."""
    if layer.whole is None:
        return True
    rows = torch.linspace(-9, 9, 2 * layer.qkv.in_features).cos().view(1, 2, -1).to(heads.dtype)
    angles = torch.linspace(0, 3, heads.head_dim // 2).repeat(1, 2, 2)
    position = (angles.cos().to(heads.dtype), angles.sin().to(heads.dtype))
    whole = layer(rows, position, _Example(layer.layer, tokens, heads))
    compiled, layer.whole = layer.whole, None
    parts = layer(rows, position, _Example(layer.layer, tokens, heads))
    layer.whole = compiled
    return torch.equal(whole, parts)
