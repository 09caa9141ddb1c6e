"""Attention of one query head to stored keys and values with 512-bit vectors, for token_attention.py.

In bfloat16 it takes the time of reading the keys and values.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from . import compiled, int8_tokens, vectors

# Below any score: where the search for the largest one starts.
_LOWEST = np.float32(-3e38)
# Bytes between keys or values that are used and those that are fetched.
_AHEAD = 2048
_LANES = vectors.LANES


def make_attend(head_dim: int, is_int8: bool = False) -> Any:
    """Return the compiled attention of one query head. `head_dim`: a multiple of 16.

    `attend(query, keys, values, key_scales, value_scales, tokens, scores, out)`: `query` `[head_dim]` float32, scaled,
    and overwritten; `keys` and `values` `[tokens, head_dim]` bfloat16, or int8 with the addresses of their float32
    scales `[tokens]`; `scores` float32, `tokens + 16` numbers; `out` `[head_dim]` bfloat16.
    """
    load, item = (vectors.load_int8, 1) if is_int8 else (vectors.load_bfloat16, 2)
    times_scale = int8_tokens.times_scale if is_int8 else int8_tokens.unchanged
    score = _make_score(head_dim, load, item, times_scale)
    mix = _make_mix(head_dim, load, item, times_scale)

    @numba.njit(error_model="numpy")
    def attend(query, keys, values, key_scales, value_scales, tokens, scores, out):
        query_at = query.ctypes.data
        top = score(query_at, keys.ctypes.data, key_scales, tokens, scores)
        total = _weigh(scores, tokens, top)
        mixed = query_at  # the query is not used any more
        mix(mixed, values.ctypes.data, value_scales, tokens, scores)
        inverse = vectors.splat(np.float32(1) / total)
        out_at = out.ctypes.data
        for d in range(0, head_dim, _LANES):
            vectors.store_bfloat16(out_at + 2 * d, vectors.load(mixed + 4 * d) * inverse)

    return attend


def _make_score(head_dim: int, load: Any, item: int, times_scale: Any) -> Any:
    """Return the compiled scores of all keys; the call returns the largest one."""
    row = item * head_dim
    four_rows = 4 * row

    @numba.njit
    def score(query, keys, scales, tokens, scores):
        top = _LOWEST
        after = (1 if tokens > 1 else 0, 2 if tokens > 2 else 0, 3 if tokens > 3 else 0)
        for start in range(0, tokens, 4):
            # The last keys may be scored twice: no memory after them is read.
            t = min(start, max(tokens - 4, 0))
            first = keys + t * row
            second = first + after[0] * row
            third = first + after[1] * row
            fourth = first + after[2] * row
            compiled.prefetch(first + _AHEAD, four_rows)
            a, b, c, e = vectors.zeros(), vectors.zeros(), vectors.zeros(), vectors.zeros()
            for d in range(0, head_dim, _LANES):
                q = vectors.load(query + 4 * d)
                a = vectors.fused(q, load(first + item * d), a)
                b = vectors.fused(q, load(second + item * d), b)
                c = vectors.fused(q, load(third + item * d), c)
                e = vectors.fused(q, load(fourth + item * d), e)
            one = times_scale(vectors.total(a), scales, t)
            two = times_scale(vectors.total(b), scales, t + after[0])
            three = times_scale(vectors.total(c), scales, t + after[1])
            four = times_scale(vectors.total(e), scales, t + after[2])
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


def _make_mix(head_dim: int, load: Any, item: int, times_scale: Any) -> Any:
    """Return the compiled sum of the weighted values, written to `mixed`."""
    row = item * head_dim
    four_rows = 4 * row

    @numba.njit
    def mix(mixed, values, scales, tokens, weights):
        for d in range(0, head_dim, _LANES):
            vectors.store(mixed + 4 * d, vectors.zeros())
        fours = tokens - tokens % 4
        for t in range(0, fours, 4):
            at = values + t * row
            compiled.prefetch(at + _AHEAD, four_rows)
            a = vectors.splat(times_scale(weights[t], scales, t))
            b = vectors.splat(times_scale(weights[t + 1], scales, t + 1))
            c = vectors.splat(times_scale(weights[t + 2], scales, t + 2))
            e = vectors.splat(times_scale(weights[t + 3], scales, t + 3))
            for d in range(0, head_dim, _LANES):
                more = vectors.fused(a, load(at + item * d), vectors.load(mixed + 4 * d))
                more = vectors.fused(b, load(at + row + item * d), more)
                more = vectors.fused(c, load(at + 2 * row + item * d), more)
                more = vectors.fused(e, load(at + 3 * row + item * d), more)
                vectors.store(mixed + 4 * d, more)
        for t in range(fours, tokens):
            a = vectors.splat(times_scale(weights[t], scales, t))
            for d in range(0, head_dim, _LANES):
                more = vectors.fused(a, load(values + t * row + item * d), vectors.load(mixed + 4 * d))
                vectors.store(mixed + 4 * d, more)

    return mix
