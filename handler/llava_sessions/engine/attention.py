"""Owns attention as a CPU computes it faster than by the usual call, which stands beside it.

Must not know sessions, scheduling or transformers' classes. On other devices, and in other precisions than bfloat16, it
does what torch's own functions do.

The order of the products in `attention` is plain algebra: oneDNN's bfloat16 `K @ q` reads K as it lies in memory, while
flash attention copies it into another layout for every call. What it gains (bench model, 2 cores of an AMD EPYC with
avx512_bf16, best of a run; packed linears, and with products): decode of 1 chat 30, 21 ms; of 16 chats 247, 117 ms; a
follow-up of 45 tokens 70, 58 ms; vision tower and projector 625, 514 ms. Further gains: `linears.py`, `fused.py`.
"""

from __future__ import annotations

import os

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

# Torch's allocator asks the kernel for huge pages: a grown KV takes half as long to be touched for the first time.
# Torch looks once, when it first allocates much, so this stands where the module is loaded.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Of new tokens a call; above that the scores leave the cache.
_MOST_ROWS = 512
# From so many rows on, softmax runs across rows, over scores as they come out of the first product; it is fast where
# their number is a multiple of the vector's length.
_MANY_ROWS = 64
_VECTOR = 32
# Rows of a picture whose scores are made at once.
_PICTURE_ROWS = 192


def products_win() -> bool:
    """Whether this CPU is of the kind on which `attention` by products is faster: AVX-512 with bfloat16, but no AMX."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16")) and not found.get("amx_tile")


_PRODUCTS_WIN = products_win()


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention of one session's new tokens, by two products where that is faster and by torch's own function else.

    `query`: `[1, heads, new, head_dim]`; `keys` and `values`: `[1, kv_heads, stored + new, head_dim]`; `mask`: `[new,
    stored + new]`, true where a token is seen: all but, among the last `new` columns, what comes after it. `is_causal`:
    the same with nothing stored. Returns `[1, heads, new, head_dim]`.
    """
    fits = query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[2] <= _MOST_ROWS
    if _PRODUCTS_WIN and fits:
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
    """Scores as `K @ q` for each KV head, its group of query heads side by side; every new token sees what is stored,
    itself and the new ones before it. Scores are rounded to bfloat16, as in transformers' eager attention.
    """
    _, heads, new, head_dim = query.shape
    kv_heads, tokens, _ = keys.shape
    rows = query[0].reshape(kv_heads, -1, head_dim) * scaling
    count = rows.shape[1]
    across = count >= _MANY_ROWS
    if across and count % _VECTOR:
        rows = pad(rows, (0, 0, 0, -count % _VECTOR))
    scores = torch.bmm(keys, rows.transpose(1, 2))  # [kv_heads, tokens, rows]
    if not across:
        scores = scores.transpose(1, 2).contiguous().transpose(1, 2)
    if new > 1:
        after = torch.ones((new, new), dtype=torch.bool).tril(-1)  # [token, row]: the token comes after the row's own
        for start in range(0, count, new):
            scores[:, tokens - new :, start : start + new].masked_fill_(after, float("-inf"))
    weights = scores.softmax(1).transpose(1, 2) if across else scores.transpose(1, 2).softmax(-1)
    return torch.bmm(weights, values)[:, :count].reshape(1, heads, new, head_dim)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary embedding in place: `[rows, heads, head_dim]` by the rows' `cos` and `sin`, `[rows, head_dim]`."""
    low, high = heads.chunk(2, -1)
    turned = torch.cat((-high, low), -1)
    heads.mul_(cos[:, None]).addcmul_(turned, sin[:, None])


def full_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention where everything sees everything, as in a vision tower: `[pictures, heads, rows, head_dim]` each.

    By products where those are faster, block by block of rows so that the scores stay in cache.
    """
    fits = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if not (_PRODUCTS_WIN and fits):
        return scaled_dot_product_attention(query, keys, values, scale=scaling)
    rows, keys, values = (part.flatten(0, 1).contiguous() for part in (query * scaling, keys, values))
    out = torch.empty_like(rows)
    for start in range(0, rows.shape[1], _PICTURE_ROWS):
        block = rows[:, start : start + _PICTURE_ROWS]
        count = block.shape[1]
        scores = torch.bmm(keys, pad(block, (0, 0, 0, -count % _VECTOR)).transpose(1, 2))
        out[:, start : start + count] = torch.bmm(scores.softmax(1).transpose(1, 2), values)[:, :count]
    return out.view(query.shape)
