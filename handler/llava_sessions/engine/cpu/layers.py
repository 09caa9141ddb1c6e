"""Fused layers and compiled attention of single tokens for the CPU. The attention is tried before it is used."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..fused import layer as fused_layer
from ..fused.linear import Pack
from . import attention, linears

if TYPE_CHECKING:
    from .token_attention import TokenAttention  # importing it needs Numba

log = logging.getLogger(__name__)


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
