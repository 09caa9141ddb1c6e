"""Fused layers and compiled attention of single tokens for the CPU. The attention is tried before it is used."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from ..fused import layer as fused_layer
from ..fused.linear import Pack
from . import linears
from .example_cache import ExampleCache
from .token_checks import matches_torch

if TYPE_CHECKING:
    from .token_attention import TokenAttention  # importing it needs Numba

log = logging.getLogger(__name__)


def fuse_layers(layers: torch.nn.ModuleList, pack: Pack = linears.pack) -> bool:
    """Replace all decoder layers on the CPU by fused ones, see `fused.layer.fuse_layers`."""
    return fused_layer.fuse_layers(layers, pack, linears.packable)


@torch.inference_mode()
def compile_token_attention(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    layers: int = 1,
    with_norms: bool = False,
) -> TokenAttention | None:
    """Return compiled attention of single tokens, see `TokenAttention`.

    `with_norms`: of query and key heads.

    Returns None, with a warning in the log, if compilation fails or if the result differs from torch's numbers.
    """
    try:
        from .token_attention import TokenAttention

        compiled = TokenAttention(heads, kv_heads, head_dim, dtype, kv_dtype, layers)
        cache = ExampleCache(layers, kv_heads, 8, head_dim, dtype, kv_dtype)
        if matches_torch(compiled, cache, heads, with_norms):
            return compiled
        log.warning("token_attention_wrong heads=%d kv_heads=%d head_dim=%d", heads, kv_heads, head_dim)
    except Exception:  # any error of the compiler: torch's own attention is used instead
        log.warning("token_attention_missing", exc_info=True)
    return None
