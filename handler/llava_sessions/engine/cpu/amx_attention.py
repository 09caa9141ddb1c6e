"""Attention with AMX: the loops that sessions and pictures share. Flash attention in bfloat16, compiled by Numba.

Queries are columns. Per block of 32 columns and 128 tokens the loops compute the scores `K @ Q`, their exponentials and
the sums `V^T @ exp(scores)`. The scores of the next block are computed between the
exponentials of a block, because the CPU executes tile and vector instructions at the same time. The statistics of the softmax are vectors over columns. The keys are
read as they are stored. The queries and the values are copied into the layouts of tiles before.

A column's numbers depend on its own query and on the tokens that it sees, in blocks that start at token 0. They do not
depend on the other columns. Blocks behind a column's last visible token do not change them.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir

from . import amx
from .amx_vectors import FLOATS, I32, I64, INTS, LANES, MORE_SHORTS, SHORTS, Vectors, operation

COLUMNS = 32  # of a block of queries: two tiles
STEP = 32  # tokens of a tile of probabilities
BLOCK_TOKENS = 128
_LOWEST = -3e38
_ROW_BYTES = COLUMNS * 4  # of scores and sums
_TILE = amx.TILE_BYTES
# The softmax's reference is raised if a score exceeds it by this power of two. Until then the exponentials may exceed 1.
_SLACK = 8.0
# Offsets in the state of 16 columns: reference, largest score of the block, sum, factor of the last change, and the
# last visible token.
_REFERENCE, _LARGEST, _SUM, _CHANGE, LAST_TOKEN = range(0, 320, 64)
STATE_BYTES = 512


class Scratch:
    """Memory of one thread, by part; each part is an offset in bytes."""

    def __init__(self, head_dim: int) -> None:
        """Place the parts for heads of `head_dim` numbers, a multiple of 32."""
        row = head_dim * 2
        self.state = 0
        self.scores = 2 * STATE_BYTES
        self.pairs = self.scores + 2 * BLOCK_TOKENS * _ROW_BYTES
        self.queries = self.pairs + BLOCK_TOKENS * COLUMNS * 2
        self.sums = self.queries + COLUMNS * row
        self.rows = self.sums + head_dim * _ROW_BYTES
        self.last_keys = self.rows + COLUMNS * row
        self.last_values = self.last_keys + STEP * row
        self.values = self.last_values + STEP * row


def softmax_numbers(scaling: float) -> np.ndarray:
    """Return the constants of the loops: 16 times the factor of the scores, 16 times the slack of the reference."""
    factor = scaling * math.log2(math.e)
    return np.repeat(np.array([factor, _SLACK / factor], np.float32), LANES)


@operation
def _begin_block(v: Vectors, state: Any, *_: Any) -> None:
    v.store(v.splat(_LOWEST), state, _LARGEST)


@operation
def _begin(v: Vectors, state: Any, *_: Any) -> None:
    v.store(v.splat(_LOWEST), state, _REFERENCE)
    v.store(v.splat(_LOWEST), state, _LARGEST)
    v.store(v.splat(0), state, _SUM)


def _emit_largest(v: Vectors, scores: Any, state: Any, first: Any | None) -> None:
    tops = [v.load(state, _LARGEST)] + [v.splat(_LOWEST)] * 3
    last = None if first is None else v.load(state, LAST_TOKEN, INTS)
    token = None if first is None else v.everywhere(v.builder.trunc(first, I32))
    for row in range(STEP):
        values = v.load(scores, row * _ROW_BYTES)
        if token is not None:
            seen = v.builder.icmp_signed("<=", v.builder.add(token, v.ints(row)), last)
            values = v.builder.select(seen, values, v.splat(_LOWEST))
            v.store(values, scores, row * _ROW_BYTES)
        tops[row % 4] = v.larger(values, tops[row % 4])
    v.store(v.larger(v.larger(tops[0], tops[1]), v.larger(tops[2], tops[3])), state, _LARGEST)


@operation
def _largest(v: Vectors, scores: Any, state: Any, *_: Any) -> None:
    _emit_largest(v, scores, state, None)


@operation
def _largest_visible(v: Vectors, scores: Any, state: Any, first: Any, _: Any) -> None:
    """Lower the scores of tokens that a column does not see. `first`: the first of the tokens."""
    _emit_largest(v, scores, state, first)


@operation
def _settle(v: Vectors, state: Any, constants: Any, *_: Any) -> Any:
    """Raise the reference where the block's largest score exceeds it by more than the slack; return where."""
    reference = v.load(state, _REFERENCE)
    largest = v.load(state, _LARGEST)
    limit = v.builder.fadd(reference, v.load(constants, 64))
    exceeded = v.builder.fcmp_ordered(">", largest, limit)
    raised = v.builder.select(exceeded, largest, reference)
    difference = v.builder.fmul(v.builder.fsub(reference, raised), v.load(constants, 0))
    # The polynomial is not exactly 1 at 0.
    change = v.builder.select(exceeded, v.power_of_two(difference), v.splat(1))
    v.store(raised, state, _REFERENCE)
    v.store(change, state, _CHANGE)
    v.store(v.builder.fmul(v.load(state, _SUM), change), state, _SUM)
    return v.builder.zext(v.builder.bitcast(exceeded, ir.IntType(LANES)), I64)


@operation
def _exponentials(v: Vectors, scores: Any, pairs: Any, state: Any, constants: Any) -> None:
    """Store the exponentials of 32 tokens in bfloat16, in pairs of tokens, and add them to the sum.

    Half a unit of bfloat16 is added before the lower bits are cut off.
    """
    factor = v.load(constants, 0)
    offset = v.builder.fneg(v.builder.fmul(v.load(state, _REFERENCE), factor))
    totals = [v.load(state, _SUM), v.splat(0)]
    ones = v.ints(0x3F803F80)
    for pair in range(STEP // 2):
        first, second = (
            v.bits(v.power_of_two(v.fma(v.load(scores, row * _ROW_BYTES), factor, offset), 2**-8))
            for row in (2 * pair, 2 * pair + 1)
        )
        upper = v.builder.and_(second, v.ints(-0x10000))
        both = v.builder.or_(upper, v.builder.lshr(first, v.ints(16)))
        v.store(both, pairs, pair * 64)
        totals[pair % 2] = v.add_pairs(totals[pair % 2], both, ones)
    v.store(v.builder.fadd(*totals), state, _SUM)


@operation
def _change_sums(v: Vectors, sums: Any, state: Any, *_: Any) -> None:
    """Multiply 32 rows of the sums by the change of the reference."""
    change = v.load(state, _CHANGE)
    for row in range(32):
        v.store(v.builder.fmul(v.load(sums, row * _ROW_BYTES), change), sums, row * _ROW_BYTES)


@operation
def pack_values(v: Vectors, source: Any, target: Any, stride: Any, _: Any) -> None:
    """Transpose 32 tokens by 32 numbers into two tiles of 16 numbers by 32 tokens; `stride` in bytes."""
    low, high = [], []
    for lane in range(0, 2 * LANES, 8):
        low += [number for at in range(lane, lane + 4) for number in (at, 2 * LANES + at)]
        high += [number for at in range(lane + 4, lane + 8) for number in (at, 2 * LANES + at)]
    lows, highs = [], []
    for _pair in range(STEP // 2):
        first = v.load(source, 0, MORE_SHORTS)
        second = v.load(v.builder.add(source, stride), 0, MORE_SHORTS)
        source = v.builder.add(source, v.builder.shl(stride, I64(1)))
        lows.append(v.bits(v.shuffle(first, second, low)))
        highs.append(v.bits(v.shuffle(first, second, high)))
    for part, rows in ((0, lows), (4, highs)):
        for at, row in enumerate(v.transposed(rows)):
            v.store(row, target, (at // 4 * 8 + part + at % 4) * 64)


def make_transpose_pairs(row_bytes: int) -> Any:
    """Return the operation that transposes 16 rows of 16 pairs into a tile."""

    @operation
    def transpose_pairs(v: Vectors, source: Any, target: Any, *_: Any) -> None:
        for at, row in enumerate(v.transposed([v.load(source, at * row_bytes, INTS) for at in range(LANES)])):
            v.store(row, target, at * 64)

    return transpose_pairs


def make_finish(row_bytes: int) -> Any:
    """Return the operation that divides 16 rows of the sums by the softmax's, and stores them as bfloat16 columns."""

    @operation
    def finish(v: Vectors, sums: Any, state: Any, target: Any, _: Any) -> None:
        share = v.builder.fdiv(v.splat(1), v.load(state, _SUM))
        rows = [v.builder.fmul(v.load(sums, row * _ROW_BYTES), share) for row in range(LANES)]
        for at, column in enumerate(v.transposed(rows)):
            v.store(v.narrow(column), target, at * row_bytes)

    return finish


def make_copy(numbers: int, padded: int) -> Any:
    """Return the operation that copies numbers of 16 bits and stores zeros behind them."""

    @operation
    def copy(v: Vectors, source: Any, target: Any, *_: Any) -> None:
        at = 0
        while at < padded:
            size = 32
            while size > (numbers if at < numbers else padded) - at:
                size //= 2
            kind = ir.VectorType(ir.IntType(16), size)
            v.store(v.load(source, at * 2, kind) if at < numbers else ir.Constant(kind, [0] * size), target, at * 2)
            at += size

    return copy


_zero, _load, _store = ([make(tile) for tile in range(8)] for make in (amx.tile_zero, amx.tile_load, amx.tile_store))
_zero_0, _zero_1, _zero_2, _zero_3 = _zero[:4]
_load_0, _load_1, _load_2, _load_3, _load_4, _load_5, _load_6, _load_7 = _load
_store_0, _store_1, _store_2, _store_3 = _store[:4]
_dot_0, _dot_1, _dot_2, _dot_3 = (amx.tile_dot(c, 4 + c // 2, 6 + c % 2) for c in range(4))


@numba.njit
def _store_products(out):
    """Store the tiles 0 to 3 as `[32, 32]` float32."""
    _store_0(out, _ROW_BYTES)
    _store_1(out + 64, _ROW_BYTES)
    _store_2(out + 16 * _ROW_BYTES, _ROW_BYTES)
    _store_3(out + 16 * _ROW_BYTES + 64, _ROW_BYTES)


def _make_score(head_dim: int) -> Any:
    """Return the product of 32 keys with 32 queries, `[32, 32]`."""
    stride = head_dim * 2

    @numba.njit
    def score(keys, queries, out):
        _zero_0()
        _zero_1()
        _zero_2()
        _zero_3()
        for k in range(head_dim // 32):
            _load_4(keys + k * 64, stride)
            _load_6(queries + k * 2 * _TILE, 64)
            _dot_0()
            _load_7(queries + (k * 2 + 1) * _TILE, 64)
            _dot_1()
            _load_5(keys + 16 * stride + k * 64, stride)
            _dot_2()
            _dot_3()
        _store_products(out)

    return score


def _make_mix(head_dim: int) -> Any:
    """Return the addition of `steps` products of values with exponentials to the sums `[head_dim, 32]`."""

    @numba.njit
    def mix(values, pairs, steps, first, sums):
        for part in range(head_dim // 32):
            out = sums + part * 32 * _ROW_BYTES
            if first:
                _zero_0()
                _zero_1()
                _zero_2()
                _zero_3()
            else:
                _load_0(out, _ROW_BYTES)
                _load_1(out + 64, _ROW_BYTES)
                _load_2(out + 16 * _ROW_BYTES, _ROW_BYTES)
                _load_3(out + 16 * _ROW_BYTES + 64, _ROW_BYTES)
            for k in range(steps):
                tile = values + (k * (head_dim // 16) + part * 2) * _TILE
                _load_4(tile, 64)
                _load_6(pairs + k * 2 * _TILE, 64)
                _dot_0()
                _load_7(pairs + (k * 2 + 1) * _TILE, 64)
                _dot_1()
                _load_5(tile + _TILE, 64)
                _dot_2()
                _dot_3()
            _store_products(out)

    return mix


def make_attend(head_dim: int) -> Any:
    """Return the attention of a block of columns.

    `attend(scratch, keys, values, tokens, end, clear, halves, constants)`: `keys` and `values` are addresses, of keys
    `[tokens, head_dim]` and of values packed by `pack_values`. The last `tokens % 32` keys are read in
    `Scratch.last_keys`. The columns see at most `end` tokens and all of them see the first `clear` ones. `halves`: 1 or
    2 times 16 columns are used. The results are columns in `Scratch.rows`, `[32, head_dim]` bfloat16.
    """
    part = Scratch(head_dim)
    scores_at, pairs_at, queries_at, sums_at, rows_at = part.scores, part.pairs, part.queries, part.sums, part.rows
    last_keys_at = part.last_keys
    row_bytes = head_dim * 2
    score = _make_score(head_dim)
    mix = _make_mix(head_dim)
    finish = make_finish(row_bytes)

    @numba.njit
    def score_step(scratch, keys, tokens, start, step, parity):
        token = start + step * STEP
        at = scratch + last_keys_at if token + STEP > tokens else keys + token * row_bytes
        score(at, scratch + queries_at, scratch + scores_at + (parity * BLOCK_TOKENS + step * STEP) * _ROW_BYTES)

    @numba.njit
    def find_largest(scratch, start, step, parity, clear, halves):
        token = start + step * STEP
        scores = scratch + scores_at + (parity * BLOCK_TOKENS + step * STEP) * _ROW_BYTES
        for half in range(halves):
            if token + STEP > clear:
                _largest_visible(scores + half * 64, scratch + half * STATE_BYTES, token, 0)
            else:
                _largest(scores + half * 64, scratch + half * STATE_BYTES, 0, 0)

    @numba.njit
    def settle(scratch, start, halves, constants):
        for half in range(halves):
            state = scratch + half * STATE_BYTES
            if _settle(state, constants, 0, 0) != 0 and start > 0:
                for part in range(head_dim // 32):
                    _change_sums(scratch + sums_at + part * 32 * _ROW_BYTES + half * 64, state, 0, 0)
            _begin_block(state, 0, 0, 0)

    @numba.njit
    def attend(scratch, keys, values, tokens, end, clear, halves, constants):
        for half in range(halves):
            _begin(scratch + half * STATE_BYTES, 0, 0, 0)
        steps = (min(end, BLOCK_TOKENS) + STEP - 1) // STEP
        for step in range(steps):
            score_step(scratch, keys, tokens, 0, step, 0)
            find_largest(scratch, 0, step, 0, clear, halves)
        parity = 0
        for start in range(0, end, BLOCK_TOKENS):
            settle(scratch, start, halves, constants)
            following = start + BLOCK_TOKENS
            more = (min(end - following, BLOCK_TOKENS) + STEP - 1) // STEP
            for step in range(steps):
                if step < more:
                    score_step(scratch, keys, tokens, following, step, 1 - parity)
                for half in range(halves):
                    scores = scratch + scores_at + (parity * BLOCK_TOKENS + step * STEP) * _ROW_BYTES + half * 64
                    pairs = scratch + pairs_at + (step * 2 + half) * _TILE
                    _exponentials(scores, pairs, scratch + half * STATE_BYTES, constants)
                if step < more:
                    find_largest(scratch, following, step, 1 - parity, clear, halves)
            mix(values + start * row_bytes, scratch + pairs_at, steps, start == 0, scratch + sums_at)
            steps = more
            parity = 1 - parity
        for half in range(halves):
            for at in range(head_dim // 16):
                finish(
                    scratch + sums_at + at * 16 * _ROW_BYTES + half * 64,
                    scratch + half * STATE_BYTES,
                    scratch + rows_at + half * 16 * row_bytes + at * 32,
                    0,
                )

    return attend


@operation
def prefetch_rows(v: Vectors, address: Any, stride: Any, *_: Any) -> None:
    """Fetch the first 128 bytes of 32 rows into the L2 cache. Any address is allowed."""
    for _row in range(STEP):
        for offset in (0, 64):
            line = v.builder.inttoptr(v.builder.add(address, I64(offset)), ir.IntType(8).as_pointer())
            v.call("llvm.prefetch.p0", ir.VoidType(), line, I32(0), I32(2), I32(1))
        address = v.builder.add(address, stride)


def make_clear(numbers: int) -> Any:
    """Return the operation that stores zeros of 16 bits."""

    @operation
    def clear(v: Vectors, target: Any, *_: Any) -> None:
        for at in range(0, numbers, 32):
            v.store(ir.Constant(MORE_SHORTS, [0] * 32), target, at * 2)

    return clear


class Memory:
    """Memory that grows and is reused."""

    def __init__(self) -> None:
        """Allocate nothing yet."""
        self._bytes = np.empty(0, np.uint8)

    def address(self, size: int) -> int:
        """Return the address of at least `size` bytes, at the start of a cache line. Valid until the next call."""
        if self._bytes.size < size + 64:
            self._bytes = np.zeros(size + 64, np.uint8)
        return -(-self._bytes.ctypes.data // 64) * 64


def slices(heads: int, blocks: int) -> int:
    """Return into how many pieces of work the columns of a head are divided."""
    import torch

    return max(1, min(blocks, -(-4 * torch.get_num_threads() // heads)))
