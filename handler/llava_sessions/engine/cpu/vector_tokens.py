"""Attention of one query head of a single token to stored bfloat16 keys and values, for CPUs with AVX-512.

The loops read the keys and values at the memory's bandwidth. Two things are necessary: 512-bit vectors, and prefetches
that do not stop at the end of a page, as the CPU's own do.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .vectors import FLOAT, FLOATS, I32, I64, INTS, LANES, Vectors, function, operation, prefetch, row_sums

TOKENS = 16  # of one step
_AHEAD = 4096  # bytes from the step's tokens to those that it fetches
_LOWEST = np.float32(-3e38)


def _halves(v: Vectors, numbers: Any) -> tuple[Any, Any]:
    """Return the even and the odd ones of 32 bfloat16 numbers as float32."""
    even = v.builder.bitcast(v.builder.shl(numbers, v.ints(16)), FLOATS)
    return even, v.builder.bitcast(v.builder.and_(numbers, v.ints(-0x10000)), FLOATS)


def _make_score(head_dim: int, tokens: int) -> Any:
    """Return the operation that stores the scores of `tokens` keys. Arguments: keys, query, scores, fetched address.

    The query is float32, `[head_dim / 32, 2, 16]`: of 32 numbers the even ones, then the odd ones.
    """

    @function
    def score(v: Vectors, keys: Any, query: Any, scores: Any, ahead: Any) -> None:
        queries = [v.load(query, at * 64) for at in range(head_dim // 16)]
        rows = []
        for token in range(tokens):
            total = v.splat(0)
            for part in range(head_dim // 32):
                even, odd = _halves(v, v.load(keys, (token * head_dim + part * 32) * 2, INTS))
                total = v.fma(odd, queries[2 * part + 1], v.fma(even, queries[2 * part], total))
            rows.append(total)
        if tokens == TOKENS:
            prefetch(v, ahead, TOKENS * head_dim * 2, 3)
        rows += [v.splat(0)] * (TOKENS - tokens)
        total = row_sums(v, rows)
        if tokens == TOKENS:
            v.store(total, scores, 0)
        else:
            first = v.builder.extract_element(total, I32(0))
            v.builder.store(first, v.builder.inttoptr(scores, FLOAT.as_pointer()), align=1)

    return score()


def _make_mix(head_dim: int, tokens: int) -> Any:
    """Return the operation that adds `tokens` weighted values. Arguments: values, weights, sums, fetched address."""

    @function
    def mix(v: Vectors, values: Any, weights: Any, sums: Any, ahead: Any) -> None:
        totals = [v.load(sums, at * 64) for at in range(head_dim // 16)]
        for token in range(tokens):
            at = v.builder.inttoptr(v.builder.add(weights, I64(token * 4)), FLOAT.as_pointer())
            weight = v.everywhere(v.builder.load(at, align=1))
            for part in range(head_dim // 32):
                even, odd = _halves(v, v.load(values, (token * head_dim + part * 32) * 2, INTS))
                totals[2 * part] = v.fma(even, weight, totals[2 * part])
                totals[2 * part + 1] = v.fma(odd, weight, totals[2 * part + 1])
        if tokens == TOKENS:
            prefetch(v, ahead, TOKENS * head_dim * 2, 3)
        for at, total in enumerate(totals):
            v.store(total, sums, at * 64)

    return mix()


@operation
def _largest(v: Vectors, scores: Any, state: Any, *_: Any) -> None:
    v.store(v.larger(v.load(scores, 0), v.load(state, 0)), state, 0)


@operation
def _weigh(v: Vectors, scores: Any, top: Any, total: Any, _: Any) -> None:
    """Replace 16 scores by 2 to the power of (score - top), and add them to the totals."""
    weights = v.power_of_two(v.builder.fsub(v.load(scores, 0), v.load(top, 0)))
    v.store(weights, scores, 0)
    v.store(v.builder.fadd(v.load(total, 0), weights), total, 0)


@numba.njit
def _weigh_all(scores_at, tokens, state, state_at):
    """Replace the scores by their exponentials, and return the sum. `state`: 16 largest scores, 16 sums."""
    for t in range(0, tokens, TOKENS):
        _largest(scores_at + t * 4, state_at, 0, 0)
    top = _LOWEST
    for lane in range(LANES):
        top = max(top, state[lane])
    for lane in range(LANES):
        state[lane] = top
    for t in range(0, tokens, TOKENS):
        _weigh(scores_at + t * 4, state_at, state_at + 64, 0)
    total = np.float32(0)
    for lane in range(LANES):
        total += state[LANES + lane]
    return total


def make_attend(head_dim: int, narrow: Any) -> Any:
    """Return the compiled attention of one query head, a drop-in for the loops of `token_attention`.

    `attend(query, keys, values, tokens, scores, out)`: `query` `[head_dim]` float32, scaled; `keys` and `values`
    `[tokens, head_dim]` bfloat16; `scores` float32 of at least `tokens + 15` numbers; `out` `[head_dim]` bfloat16.
    `head_dim` is a multiple of 32.
    """
    score = _make_score(head_dim, TOKENS)
    score_one = _make_score(head_dim, 1)
    mix = _make_mix(head_dim, TOKENS)
    mix_one = _make_mix(head_dim, 1)
    row_bytes = head_dim * 2
    log2_e = np.float32(1.4426950408889634)

    @numba.njit
    def attend(query, keys, values, tokens, scores, out):
        work = np.zeros(2 * head_dim + 2 * LANES, np.float32)
        sums, state = work[head_dim : 2 * head_dim], work[2 * head_dim :]
        for d in range(head_dim):
            work[d // 32 * 32 + d % 2 * 16 + d % 32 // 2] = query[d] * log2_e
        query_at, keys_at, values_at, scores_at = (
            work.ctypes.data,
            keys.ctypes.data,
            values.ctypes.data,
            scores.ctypes.data,
        )
        sums_at, state_at = query_at + head_dim * 4, query_at + head_dim * 8
        whole = tokens - tokens % TOKENS
        end = keys_at + tokens * row_bytes
        for t in range(0, whole, TOKENS):
            at = keys_at + t * row_bytes
            ahead = at + _AHEAD if at + _AHEAD < end else values_at + (at + _AHEAD - end)
            score(at, query_at, scores_at + t * 4, ahead)
        for t in range(whole, tokens):
            score_one(keys_at + t * row_bytes, query_at, scores_at + t * 4, 0)
        for t in range(tokens, whole + TOKENS):
            scores[t] = _LOWEST
        for lane in range(LANES):
            state[lane] = _LOWEST
        total = _weigh_all(scores_at, whole + TOKENS, state, state_at)
        for t in range(0, whole, TOKENS):
            at = values_at + t * row_bytes
            mix(at, scores_at + t * 4, sums_at, at + _AHEAD)
        for t in range(whole, tokens):
            mix_one(values_at + t * row_bytes, scores_at + t * 4, sums_at, 0)
        for d in range(head_dim):
            out[d] = narrow(sums[d // 32 * 32 + d % 2 * 16 + d % 32 // 2] / total)

    return attend
