"""Attention of one query head to stored bfloat16 keys and values with 512-bit vectors, for token_attention.py.

It takes the time of reading the keys and values.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from . import compiled, vectors

# Below any score: where the search for the largest one starts.
_LOWEST = np.float32(-3e38)
# Bytes between keys or values that are used and those that are fetched.
_AHEAD = 2048
_LANES = vectors.LANES


def make_attend(head_dim: int) -> Any:
    """Return the compiled attention of one query head. `head_dim`: a multiple of 16.

    `attend(query, keys, values, tokens, scores, out)`: `query` `[head_dim]` float32, scaled, and overwritten; `keys`
    and `values` `[tokens, head_dim]` bfloat16; `scores` float32, `tokens + 16` numbers; `out` `[head_dim]` bfloat16.
    """
    score = _make_score(head_dim)
    mix = _make_mix(head_dim)

    @numba.njit(error_model="numpy")
    def attend(query, keys, values, tokens, scores, out):
        query_at = query.ctypes.data
        top = score(query_at, keys.ctypes.data, tokens, scores)
        total = _weigh(scores, tokens, top)
        mixed = query_at  # the query is not used any more
        mix(mixed, values.ctypes.data, tokens, scores)
        inverse = vectors.splat(np.float32(1) / total)
        out_at = out.ctypes.data
        for d in range(0, head_dim, _LANES):
            vectors.store_bfloat16(out_at + 2 * d, vectors.load(mixed + 4 * d) * inverse)

    return attend


def _make_score(head_dim: int) -> Any:
    """Return the compiled scores of all keys; the call returns the largest one."""
    row = 2 * head_dim
    four_rows = 4 * row

    @numba.njit
    def score(query, keys, tokens, scores):
        top = _LOWEST
        for start in range(0, tokens, 4):
            # The last keys may be scored twice: no memory after them is read.
            t = min(start, max(tokens - 4, 0))
            first = keys + t * row
            second = first + (row if tokens > 1 else 0)
            third = first + (2 * row if tokens > 2 else 0)
            fourth = first + (3 * row if tokens > 3 else 0)
            compiled.prefetch(first + _AHEAD, four_rows)
            a, b, c, e = vectors.zeros(), vectors.zeros(), vectors.zeros(), vectors.zeros()
            for d in range(0, head_dim, _LANES):
                q = vectors.load(query + 4 * d)
                a = vectors.fused(q, vectors.load_bfloat16(first + 2 * d), a)
                b = vectors.fused(q, vectors.load_bfloat16(second + 2 * d), b)
                c = vectors.fused(q, vectors.load_bfloat16(third + 2 * d), c)
                e = vectors.fused(q, vectors.load_bfloat16(fourth + 2 * d), e)
            one, two, three, four = vectors.total(a), vectors.total(b), vectors.total(c), vectors.total(e)
            scores[t], scores[t + 1], scores[t + 2], scores[t + 3] = one, two, three, four
            top = max(top, max(max(one, two), max(three, four)))
        return top

    return score


@numba.njit
def _weigh(scores, tokens, top):
    """Replace the scores by their exponentials; return the sum of these."""
    for t in range(tokens, tokens + _LANES):
        scores[t] = _LOWEST
    sums = vectors.zeros()
    for t in range(0, tokens, _LANES):
        at = scores.ctypes.data + 4 * t
        weights = vectors.exp(vectors.load(at) - vectors.splat(top))
        vectors.store(at, weights)
        sums = sums + weights
    return vectors.total(sums)


def _make_mix(head_dim: int) -> Any:
    """Return the compiled sum of the weighted values, written to `mixed`."""
    row = 2 * head_dim
    four_rows = 4 * row

    @numba.njit
    def mix(mixed, values, tokens, weights):
        for d in range(0, head_dim, _LANES):
            vectors.store(mixed + 4 * d, vectors.zeros())
        fours = tokens - tokens % 4
        for t in range(0, fours, 4):
            at = values + t * row
            compiled.prefetch(at + _AHEAD, four_rows)
            a, b = vectors.splat(weights[t]), vectors.splat(weights[t + 1])
            c, e = vectors.splat(weights[t + 2]), vectors.splat(weights[t + 3])
            for d in range(0, head_dim, _LANES):
                more = vectors.fused(a, vectors.load_bfloat16(at + 2 * d), vectors.load(mixed + 4 * d))
                more = vectors.fused(b, vectors.load_bfloat16(at + row + 2 * d), more)
                more = vectors.fused(c, vectors.load_bfloat16(at + 2 * row + 2 * d), more)
                more = vectors.fused(e, vectors.load_bfloat16(at + 3 * row + 2 * d), more)
                vectors.store(mixed + 4 * d, more)
        for t in range(fours, tokens):
            a = vectors.splat(weights[t])
            for d in range(0, head_dim, _LANES):
                more = vectors.fused(a, vectors.load_bfloat16(values + t * row + 2 * d), vectors.load(mixed + 4 * d))
                vectors.store(mixed + 4 * d, more)

    return mix
