"""Triton kernels of `ragged.RaggedAttention`: attention of pieces of sessions, and the merge of a session's pieces.

A table of int64 numbers lists the work. Its first part has five numbers for each token: row, address of the KV cache,
capacity, stored tokens, first piece. Its second part has two for each piece: place in the first part, first token. A
first piece below zero marks a spare place, a first token below zero a spare piece.

Importing this module needs Triton. Triton decides at import whether its kernels are compiled or interpreted
(TRITON_INTERPRET).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below any score: the largest score of no tokens.
LOWEST = tl.constexpr(-1e30)
# Amounts below it count as zero in the scale of a key or value, as in the other int8 formats of the engine.
SMALLEST = tl.constexpr(1e-30)
# 1.5 * 2**23: adding and subtracting it rounds a smaller float32 to an integer, halves to the even one.
ROUNDER = tl.constexpr(12582912.0)


def capability() -> int:
    """Return the compute capability for which kernels are compiled, such as 75 or 80. The interpreter counts as 80.

    Raises RuntimeError if there is no device.
    """
    if triton.knobs.runtime.interpret:
        return 80
    found: int = triton.runtime.driver.active.get_current_target().arch
    return found


@triton.jit
def _normed(numbers, factor, weights, d, inside, dtype: tl.constexpr):
    """Return the numbers of a head after its norm, in float32. Rounds to `dtype` before and after the weights."""
    weight = tl.load(weights + d, mask=inside, other=0.0).to(tl.float32)
    return ((numbers * factor).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit
def _rotated(numbers, weights, epsilon, cos, sin, d, mask, HEAD_DIM: tl.constexpr):
    """Return the rotary embedding of heads in float32, after their norm if there is one.

    `numbers`: pointers to the heads' first numbers, `[..., 1]` or a scalar. `weights`: of the norm, or None.
    """
    # This form of the partner's index keeps runs of consecutive addresses, so that its loads are vectors as well.
    partner = (d + HEAD_DIM // 2) % HEAD_DIM
    sign = tl.where(d < HEAD_DIM // 2, -1.0, 1.0)
    own = tl.load(numbers + d, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(numbers + partner, mask=mask, other=0.0).to(tl.float32)
    inside = d < HEAD_DIM
    if weights is not None:
        dtype: tl.constexpr = numbers.dtype.element_ty
        factor = tl.rsqrt(tl.sum(own * own, -1, keep_dims=True) / HEAD_DIM + epsilon)
        own = _normed(own, factor, weights, d, inside, dtype)
        other = _normed(other, factor, weights, partner, inside, dtype)
    cosines = tl.load(cos + d, mask=inside, other=0.0).to(tl.float32)
    sines = tl.load(sin + d, mask=inside, other=0.0).to(tl.float32)
    return own * cosines + sign * other * sines


@triton.jit
def _cache(
    place, layer, layers, head, dtype: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Return pointers to the first key and value of a session in a layer and head, and to their scales if int8."""
    address, capacity = tl.load(place + 1), tl.load(place + 2)
    before = (layer * 2 * KV_HEADS + head) * capacity  # tokens in front of this head's keys
    keys = address.to(tl.pointer_type(tl.int8 if QUANTIZED else dtype)) + before * HEAD_DIM
    scales = address + layers * 2 * KV_HEADS * capacity * HEAD_DIM
    key_scales = scales.to(tl.pointer_type(tl.float32)) + before
    return keys, keys + KV_HEADS * capacity * HEAD_DIM, key_scales, key_scales + KV_HEADS * capacity


@triton.jit
def _stored(numbers, target, scales, stored, d, HEAD_DIM: tl.constexpr, QUANTIZED: tl.constexpr):
    """Store the new token's key or value. Return the numbers that the cache now has, in float32.

    In int8 the scale of numbers that are not finite is NaN. The largest of some numbers is not: it ignores NaN.
    """
    wide = numbers.to(tl.float32)
    if QUANTIZED:
        not_finite = tl.sum(wide * 0.0, 0)  # 0, or NaN
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(wide), 0), SMALLEST), 127.0) + not_finite
        rounded = tl.div_rn(wide, scale) + ROUNDER - ROUNDER
        tl.store(scales + stored, scale)
        numbers = rounded.to(tl.int8)
        wide = rounded * scale
    tl.store(target + stored * HEAD_DIM + d, numbers, mask=d < HEAD_DIM)
    return wide


@triton.jit
def _tile(start, at, d, stored, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr):
    """Return `[tokens, WIDTH]` keys or values of stored tokens, 0 outside.

    An address that was an integer has no known alignment in Triton. Without `multiple_of` each number is a load.
    """
    pointers = tl.multiple_of(start + at[:, None] * HEAD_DIM + d[None, :], [1, ALIGN])
    return tl.load(pointers, mask=(at < stored)[:, None] & (d < HEAD_DIM)[None, :], other=0)


@triton.jit
def _scales(scales, at, stored):
    """Return the scales of the keys or values of stored tokens, `[tokens]`, 0 outside."""
    return tl.load(scales + at, mask=at < stored, other=0.0)


@triton.jit
def _attend_head(
    query, keys, values, key_scales, value_scales, start, end, stored, scale,
    HEAD_DIM: tl.constexpr, QUANTIZED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Attend with one query head, `[1, WIDTH]`, to stored tokens.

    Return the largest score `[1]`, the sum of weights `[1]` and the weighted sum of values `[1, WIDTH]`. Each of the
    `BLOCK` tokens of an iteration has a softmax of its own: the loop needs no synchronization of the program's threads.
    """
    d, t = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first in range(start, end, BLOCK):
        at = first + t
        k = _tile(keys, at, d, stored, HEAD_DIM, ALIGN)
        v = _tile(values, at, d, stored, HEAD_DIM, ALIGN)
        scores = tl.sum(query * k.to(tl.float32), 1) * scale
        if QUANTIZED:
            scores *= _scales(key_scales, at, stored)
        scores = tl.where(at < stored, scores, LOWEST)
        higher = tl.maximum(top, scores)
        faded = tl.exp2(top - higher)
        weights = tl.where(at < stored, tl.exp2(scores - higher), 0.0)
        total = total * faded + weights
        if QUANTIZED:
            weights *= _scales(value_scales, at, stored)
        mixed = mixed * faded[:, None] + weights[:, None] * v.to(tl.float32)
        top = higher
    highest = tl.max(top, 0)
    faded = tl.exp2(top - highest)
    one = tl.full([1], 1.0, tl.float32)
    return one * highest, one * tl.sum(total * faded, 0), tl.sum(mixed * faded[:, None], 0)[None, :]


@triton.jit
def _attend_group(
    query, keys, values, key_scales, value_scales, start, end, stored, scale, dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr, QUANTIZED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """As `_attend_head`, with the query heads of a group, `[ROWS, WIDTH]`, by matrix products in `dtype`."""
    d, t = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    narrow = query.to(dtype)
    for first in range(start, end, BLOCK):
        at = first + t
        k = _tile(keys, at, d, stored, HEAD_DIM, ALIGN)
        v = _tile(values, at, d, stored, HEAD_DIM, ALIGN)
        scores = tl.dot(narrow, tl.trans(k.to(dtype)), input_precision="ieee") * scale
        if QUANTIZED:
            scores *= _scales(key_scales, at, stored)[None, :]
        scores = tl.where((at < stored)[None, :], scores, LOWEST)
        higher = tl.maximum(top, tl.max(scores, 1))
        faded = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * faded + tl.sum(weights, 1)
        if QUANTIZED:
            weights *= _scales(value_scales, at, stored)[None, :]
        mixed = mixed * faded[:, None] + tl.dot(weights.to(dtype), v.to(dtype), input_precision="ieee")
        top = higher
    return top, total, mixed


@triton.jit
def _attend_heads(
    query, keys, values, key_scales, value_scales, start, end, stored, scale, dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr, QUANTIZED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """As `_attend_head` for `ROWS` of 1, else as `_attend_group`."""
    if ROWS == 1:
        top, total, mixed = _attend_head(
            query, keys, values, key_scales, value_scales, start, end, stored, scale,
            HEAD_DIM, QUANTIZED, WIDTH, BLOCK, ALIGN,
        )  # fmt: skip
    else:
        top, total, mixed = _attend_group(
            query, keys, values, key_scales, value_scales, start, end, stored, scale, dtype,
            HEAD_DIM, QUANTIZED, ROWS, WIDTH, BLOCK, ALIGN,
        )  # fmt: skip
    return top, total, mixed


@triton.jit
def _with_token(top, total, mixed, score, value):
    """Return the state of a softmax, see `_attend_head`, after one more token with its `score`, `[ROWS]`, and value."""
    higher = tl.maximum(top, score)
    weight, faded = tl.exp2(score - higher), tl.exp2(top - higher)
    return higher, total * faded + weight, mixed * faded[:, None] + weight[:, None] * value[None, :]


@triton.jit(do_not_specialize=["tokens", "layer", "layers"], do_not_specialize_on_alignment=["table"])
def attend(
    table, tokens, qkv, cos, sin, mixed_parts, softmax_parts, layer, layers, scale, norm_weights, epsilon,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, QUANTIZED: tl.constexpr, PIECE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Attend with the query heads of one KV head to one piece of a session. Grid: (pieces, KV heads).

    `layers`: of a cache. `scale`: factor of scores, for powers of 2. `norm_weights`: of the norms of query and of key
    heads, `[2, HEAD_DIM]` in the precision of `qkv`, or None: then the kernel has no instruction for norms. `epsilon`:
    of these norms. `QUANTIZED`: the cache is int8 with scales.
    `ROWS`, `WIDTH`: `GROUP` and `HEAD_DIM`, rounded up to sizes that Triton takes; `ROWS` is 1 for a group of 1.
    `BLOCK`: tokens of an iteration. `ALIGN`: all keys and values start at a multiple of this number of bytes.
    """
    piece, head = tl.program_id(0), tl.program_id(1)
    pieces = table + 5 * tokens
    place = table + 5 * tl.load(pieces + 2 * piece)
    start = tl.load(pieces + 2 * piece + 1).to(tl.int32)
    if start >= 0:
        row, stored = tl.load(place), tl.load(place + 3).to(tl.int32)
        dtype: tl.constexpr = qkv.dtype.element_ty
        keys, values, key_scales, value_scales = _cache(
            place, layer, layers, head, dtype, KV_HEADS, HEAD_DIM, QUANTIZED
        )
        d, g = tl.arange(0, WIDTH), tl.arange(0, ROWS)
        inside = d < HEAD_DIM
        heads = (g < GROUP)[:, None] & inside[None, :]
        numbers = qkv + row * (GROUP + 2) * KV_HEADS * HEAD_DIM
        cos += row * HEAD_DIM
        sin += row * HEAD_DIM
        key_weights = None
        if norm_weights is not None:
            key_weights = norm_weights + HEAD_DIM
        queries = numbers + (head * GROUP + g)[:, None] * HEAD_DIM
        query = _rotated(queries, norm_weights, epsilon, cos, sin, d[None, :], heads, HEAD_DIM)
        end = tl.minimum(start + PIECE, stored)
        top, total, mixed = _attend_heads(
            query, keys, values, key_scales, value_scales, start, end, stored, scale, dtype,
            HEAD_DIM, QUANTIZED, ROWS, WIDTH, BLOCK, ALIGN,
        )  # fmt: skip
        if start + PIECE > stored:  # the piece with the new token
            new = numbers + (GROUP * KV_HEADS + head) * HEAD_DIM
            key = _rotated(new, key_weights, epsilon, cos, sin, d, inside, HEAD_DIM).to(dtype)
            value = tl.load(new + KV_HEADS * HEAD_DIM + d, mask=inside, other=0.0)
            key = _stored(key, keys, key_scales, stored, d, HEAD_DIM, QUANTIZED)
            value = _stored(value, values, value_scales, stored, d, HEAD_DIM, QUANTIZED)
            top, total, mixed = _with_token(top, total, mixed, tl.sum(query * key[None, :], 1) * scale, value)
        out = piece * GROUP * KV_HEADS + head * GROUP + g
        tl.store(mixed_parts + out[:, None] * HEAD_DIM + d[None, :], mixed, mask=heads)
        tl.store(softmax_parts + 2 * out, top, mask=g < GROUP)
        tl.store(softmax_parts + 2 * out + 1, total, mask=g < GROUP)


@triton.jit(do_not_specialize_on_alignment=["table"])
def merge(
    table, mixed_parts, softmax_parts, out,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the pieces of one head of a token. Grid: (places, heads). `BLOCK`: pieces of an iteration.

    Writes zeros for a spare place.
    """
    place, head = table + 5 * tl.program_id(0), tl.program_id(1)
    row, stored = tl.load(place), tl.load(place + 3).to(tl.int32)
    first = tl.load(place + 4).to(tl.int32)
    d, p = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    inside = d < HEAD_DIM
    end = tl.where(first < 0, first, first + stored // PIECE + 1)
    slot_top = tl.full([BLOCK], LOWEST, tl.float32)
    slot_total = tl.zeros([BLOCK], tl.float32)
    slot_mixed = tl.zeros([BLOCK, WIDTH], tl.float32)
    for piece in range(first, end, BLOCK):
        at = (piece + p) * HEADS + head
        given = piece + p < end
        tops = tl.load(softmax_parts + 2 * at, mask=given, other=LOWEST)
        totals = tl.load(softmax_parts + 2 * at + 1, mask=given, other=0.0)
        parts = tl.load(
            mixed_parts + at[:, None] * HEAD_DIM + d[None, :], mask=given[:, None] & inside[None, :], other=0.0
        )
        higher = tl.maximum(slot_top, tops)
        faded, weights = tl.exp2(slot_top - higher), tl.exp2(tops - higher)
        slot_mixed = slot_mixed * faded[:, None] + weights[:, None] * parts
        slot_total = slot_total * faded + weights * totals
        slot_top = higher
    faded = tl.exp2(slot_top - tl.max(slot_top, 0))
    total = tl.sum(slot_total * faded, 0)
    mixed = tl.sum(slot_mixed * faded[:, None], 0) / tl.where(first < 0, 1.0, total)
    tl.store(out + (row * HEADS + head) * HEAD_DIM + d, mixed.to(out.dtype.element_ty), mask=inside)
