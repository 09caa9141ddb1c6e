"""Attention on CPUs where something is faster than torch's `scaled_dot_product_attention`.

With AMX and in bfloat16, compiled loops compute it: `picture_attention`, `session_attention`. The two matrix products
are used for bfloat16 on CPUs with AVX-512 bfloat16 instructions and without AMX. On other devices and in other
precisions the functions call torch's own. The scores are computed as `K @ q`, because oneDNN's bfloat16 product reads K
in its stored layout, whereas flash attention copies K into another layout in each call. Measurements: bench/README.md,
"The CPU's fast paths one by one".
"""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from ...text.tiles import tile_patches
from .example_cache import ExampleCache

if TYPE_CHECKING:
    from .amx_pictures import PictureAttention  # importing them needs Numba
    from .amx_sessions import SessionAttention

log = logging.getLogger(__name__)

# Make torch's allocator ask the kernel for huge pages: the first touch of a grown KV cache takes half as long.
# Torch reads the variable when it first allocates a large block, so it is set when this module is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Most new tokens of one call that are computed by products. Above it the scores no longer fit the CPU's caches.
_MAX_PRODUCT_ROWS = 512
# From this number of rows on, softmax runs across rows on the layout in which the first product writes the scores.
_MIN_ROWS_FOR_COLUMN_SOFTMAX = 64
# That softmax is fast if the number of rows is a multiple of the vector length in bfloat16 numbers.
_VECTOR = 32
# Fewest rows of a picture for which attention with AMX is compiled.
_MIN_AMX_PICTURE_ROWS = 256
# Query rows of a picture per block of scores.
_PICTURE_BLOCK_ROWS = 192


def products_are_faster() -> bool:
    """Return True on a CPU with AVX-512 bfloat16 instructions and without AMX."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16")) and not found.get("amx_tile")


# Checked once per process. Tests replace it to run the products on any CPU.
USE_PRODUCTS = products_are_faster()


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Return causal attention of one session's new tokens to its stored tokens and to the new ones before them.

    `query`: `[1, heads, new, head_dim]`. `keys`, `values`: `[1, kv_heads, stored + new, head_dim]`. `mask`: bool
    `[new, stored + new]`, True where a token is visible, or None. `is_causal`: nothing is stored and the mask is the
    causal one. Result: `[1, heads, new, head_dim]`.
    """
    on_cpu_in_bfloat16 = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if USE_PRODUCTS and on_cpu_in_bfloat16 and query.shape[2] <= _MAX_PRODUCT_ROWS:
        return _attention_by_products(query, keys[0], values[0], scaling)
    return scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )


def _attention_by_products(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return causal attention from one `K @ q` product and one product with the values per KV head.

    The query heads of a KV head are one block of rows. Scores are rounded to bfloat16, as in transformers' eager
    attention. `keys`, `values`: `[kv_heads, stored + new, head_dim]`.
    """
    _, heads, new, head_dim = query.shape
    kv_heads, tokens, _ = keys.shape
    rows = query[0].reshape(kv_heads, -1, head_dim) * scaling
    count = rows.shape[1]
    by_column = count >= _MIN_ROWS_FOR_COLUMN_SOFTMAX
    if by_column and count % _VECTOR:
        rows = pad(rows, (0, 0, 0, -count % _VECTOR))
    scores = torch.bmm(keys, rows.transpose(1, 2))  # [kv_heads, tokens, rows]
    if not by_column:
        scores = scores.transpose(1, 2).contiguous().transpose(1, 2)
    if new > 1:
        later = torch.ones((new, new), dtype=torch.bool).tril(-1)  # [token, row]: the token follows the row's own token
        for start in range(0, count, new):
            scores[:, tokens - new :, start : start + new].masked_fill_(later, float("-inf"))
    weights = scores.softmax(1).transpose(1, 2) if by_column else scores.transpose(1, 2).softmax(-1)
    return torch.bmm(weights, values)[:, :count].reshape(1, heads, new, head_dim)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Apply the rotary embedding in place.

    `heads`: `[rows, heads, head_dim]`. `cos`, `sin`: `[rows, head_dim]`.
    """
    low, high = heads.chunk(2, -1)
    rotated = torch.cat((-high, low), -1)
    heads.mul_(cos[:, None]).addcmul_(rotated, sin[:, None])


def full_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return attention without a mask, as in a vision tower. All shapes: `[pictures, heads, rows, head_dim]`.

    The products run in blocks of query rows, so that the scores of a block stay in the CPU's caches.
    """
    on_cpu_in_bfloat16 = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if on_cpu_in_bfloat16 and query.shape[2] >= _MIN_AMX_PICTURE_ROWS:
        compiled = picture_attention(query.shape[3])
        if compiled is not None and query.stride() == keys.stride() == values.stride() and query.stride(3) == 1:
            return compiled(query, keys, values, scaling)
    if not (USE_PRODUCTS and on_cpu_in_bfloat16):
        return scaled_dot_product_attention(query, keys, values, scale=scaling)
    rows, keys, values = (part.flatten(0, 1).contiguous() for part in (query * scaling, keys, values))
    out = torch.empty_like(rows)
    for start in range(0, rows.shape[1], _PICTURE_BLOCK_ROWS):
        block = rows[:, start : start + _PICTURE_BLOCK_ROWS]
        count = block.shape[1]
        scores = torch.bmm(keys, pad(block, (0, 0, 0, -count % _VECTOR)).transpose(1, 2))
        out[:, start : start + count] = torch.bmm(scores.softmax(1).transpose(1, 2), values)[:, :count]
    return out.view(query.shape)


def prepare_picture_attention(vision: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Compile the attention of a vision tower, given its configuration, if `full_attention` will use it."""
    rows = tile_patches(vision) or 0
    if dtype == torch.bfloat16 and device.type == "cpu" and rows >= _MIN_AMX_PICTURE_ROWS:
        picture_attention(vision.hidden_size // vision.num_attention_heads)


@functools.cache
@torch.inference_mode()
def picture_attention(head_dim: int) -> PictureAttention | None:
    """Return attention without a mask that is compiled for AMX. The first call takes about two seconds.

    Returns None without AMX, and, with a warning in the log, if compilation fails or if the result of a small example
    differs from torch's numbers.
    """
    try:
        from . import amx, amx_checks, amx_pictures

        if not amx.is_available():
            return None
        compiled = amx_pictures.PictureAttention(head_dim)
        if amx_checks.pictures_match(compiled, head_dim):
            return compiled
        log.warning("picture_attention_wrong head_dim=%d", head_dim)
    except Exception:  # any error of the compiler: torch's own attention is used instead
        log.warning("picture_attention_missing", exc_info=True)
    return None


@torch.inference_mode()
def session_attention(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    layers: int = 1,
    with_norms: bool = False,
) -> SessionAttention | None:
    """Return attention of several new tokens of each session that is compiled for AMX.

    `kv_dtype`: of the caches, as in `KVShape`. `layers`: of a cache. `with_norms`: of query and key heads.

    Returns None without AMX, in float32, if `head_dim` is no multiple of 32, and, with a warning in the log, if
    compilation fails or if the result of a small example differs from torch's numbers.
    """
    if dtype != torch.bfloat16 or head_dim % 32:
        return None
    try:
        from . import amx, amx_checks, amx_sessions

        if not amx.is_available():
            return None
        compiled = amx_sessions.SessionAttention(heads, kv_heads, head_dim, layers if kv_dtype == torch.int8 else 0)
        cache = ExampleCache(layers, kv_heads, 56, head_dim, dtype, kv_dtype)
        if amx_checks.sessions_match(compiled, heads, cache, with_norms):
            return compiled
        log.warning("session_attention_wrong heads=%d kv_heads=%d head_dim=%d", heads, kv_heads, head_dim)
    except Exception:  # any error of the compiler: torch's own attention is used instead
        log.warning("session_attention_missing", exc_info=True)
    return None
