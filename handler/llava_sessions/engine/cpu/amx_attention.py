"""Attention with AMX: the loops that sessions and pictures share. Flash attention in bfloat16, compiled by Numba.

Queries are columns. Per block of 32 columns and 128 tokens the loops compute the scores `K @ Q`, their exponentials and
the sums `V^T @ exp(scores)`. The scores of the next block are computed between the exponentials of a block, because the
CPU executes tile and vector instructions at the same time. The statistics of the softmax are vectors over columns. The
keys are read as they are stored. The queries and the values are copied into the layouts of tiles before.

A column's numbers depend on its own query and on the tokens that it sees, in blocks that start at token 0. They do not
depend on the other columns. Blocks behind a column's last visible token do not change them.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir

from . import amx
from .amx_products import COLUMNS, ROW_BYTES, make_mix, make_score
from .amx_vectors import (
    I32,
    I64,
    INTS,
    LANES,
    MORE_SHORTS,
    Vectors,
    function,
    operation,
    prefetch,
    transposed,
)

STEP = 32  # tokens of a tile of probabilities
BLOCK_TOKENS = 128
_LOWEST = -3e38
_TILE = amx.TILE_BYTES
# The softmax's reference is raised if a score exceeds it by this power of two. Exponentials may exceed 1 until then.
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
        self.statistics = 0
        self.scores = 2 * STATE_BYTES
        self.pairs = self.scores + 2 * BLOCK_TOKENS * ROW_BYTES
        self.queries = self.pairs + BLOCK_TOKENS * COLUMNS * 2
        self.sums = self.queries + COLUMNS * row
        self.rows = self.sums + head_dim * ROW_BYTES
        self.last_keys = self.rows + COLUMNS * row
        self.last_values = self.last_keys + STEP * row
        self.values = self.last_values + STEP * row


def softmax_numbers(scaling: float) -> np.ndarray:
    """Return the constants of the loops: 16 times the factor of the scores, 16 times the slack of the reference."""
    factor = scaling * math.log2(math.e)
    return np.repeat(np.array([factor, _SLACK / factor], np.float32), LANES)


def _bits(v: Vectors, numbers: Any) -> Any:
    return v.builder.bitcast(numbers, INTS)


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
        values = v.load(scores, row * ROW_BYTES)
        if token is not None:
            seen = v.builder.icmp_signed("<=", v.builder.add(token, v.ints(row)), last)
            values = v.builder.select(seen, values, v.splat(_LOWEST))
            v.store(values, scores, row * ROW_BYTES)
        tops[row % 4] = v.larger(values, tops[row % 4])
    v.store(v.larger(v.larger(tops[0], tops[1]), v.larger(tops[2], tops[3])), state, _LARGEST)


@function
def _largest(v: Vectors, scores: Any, state: Any, *_: Any) -> None:
    _emit_largest(v, scores, state, None)


@function
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


@function
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
            _bits(v, v.power_of_two(v.fma(v.load(scores, row * ROW_BYTES), factor, offset), 2**-8))
            for row in (2 * pair, 2 * pair + 1)
        )
        upper = v.builder.and_(second, v.ints(-0x10000))
        both = v.builder.or_(upper, v.builder.lshr(first, v.ints(16)))
        v.store(both, pairs, pair * 64)
        totals[pair % 2] = v.add_pairs(totals[pair % 2], both, ones)
    v.store(v.builder.fadd(*totals), state, _SUM)


@function
def _change_sums(v: Vectors, sums: Any, state: Any, *_: Any) -> None:
    """Multiply 32 rows of the sums by the change of the reference."""
    change = v.load(state, _CHANGE)
    for row in range(32):
        v.store(v.builder.fmul(v.load(sums, row * ROW_BYTES), change), sums, row * ROW_BYTES)


@function
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
        lows.append(_bits(v, v.shuffle(first, second, low)))
        highs.append(_bits(v, v.shuffle(first, second, high)))
    for part, rows in ((0, lows), (4, highs)):
        for at, row in enumerate(transposed(v, rows)):
            v.store(row, target, (at // 4 * 8 + part + at % 4) * 64)


def make_transpose_pairs(row_bytes: int) -> Any:
    """Return the operation that transposes 16 rows of 16 pairs into a tile."""

    @function
    def transpose_pairs(v: Vectors, source: Any, target: Any, *_: Any) -> None:
        for at, row in enumerate(transposed(v, [v.load(source, at * row_bytes, INTS) for at in range(LANES)])):
            v.store(row, target, at * 64)

    return transpose_pairs()


def make_pack_queries(head_dim: int) -> Any:
    """Return the compiled packing of the 32 queries in `Scratch.rows` into tiles."""
    part = Scratch(head_dim)
    rows_at, queries_at = part.rows, part.queries
    row_bytes = head_dim * 2
    transpose_pairs = make_transpose_pairs(row_bytes)

    @numba.njit
    def pack_queries(scratch):
        for half in range(2):
            for k in range(head_dim // 32):
                source = scratch + rows_at + half * 16 * row_bytes + k * 64
                transpose_pairs(source, scratch + queries_at + (k * 2 + half) * _TILE, 0, 0)

    return pack_queries


def make_finish(row_bytes: int) -> Any:
    """Return the operation that divides 16 rows of the sums by the softmax's, and stores them as bfloat16 columns."""

    @function
    def finish(v: Vectors, sums: Any, state: Any, target: Any, _: Any) -> None:
        share = v.builder.fdiv(v.splat(1), v.load(state, _SUM))
        rows = [v.builder.fmul(v.load(sums, row * ROW_BYTES), share) for row in range(LANES)]
        for at, column in enumerate(transposed(v, rows)):
            v.store(v.narrow(column), target, at * row_bytes)

    return finish()


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


def _make_score_step(head_dim: int) -> Any:
    """Return the scores of 32 tokens, stored in one of two buffers."""
    part = Scratch(head_dim)
    scores_at, queries_at, last_keys_at = part.scores, part.queries, part.last_keys
    score = make_score(head_dim)

    @numba.njit
    def score_step(scratch, keys, tokens, start, step, parity):
        token = start + step * STEP
        at = scratch + last_keys_at if token + STEP > tokens else keys + token * head_dim * 2
        score(at, scratch + queries_at, scratch + scores_at + (parity * BLOCK_TOKENS + step * STEP) * ROW_BYTES)

    return score_step


def _make_find_largest(head_dim: int) -> Any:
    """Return the search for the largest scores of 32 tokens, which hides those that a column does not see."""
    scores_at = Scratch(head_dim).scores
    largest, largest_visible = _largest(), _largest_visible()

    @numba.njit
    def find_largest(scratch, start, step, parity, clear, halves):
        token = start + step * STEP
        scores = scratch + scores_at + (parity * BLOCK_TOKENS + step * STEP) * ROW_BYTES
        for half in range(halves):
            if token + STEP > clear:
                largest_visible(scores + half * 64, scratch + half * STATE_BYTES, token, 0)
            else:
                largest(scores + half * 64, scratch + half * STATE_BYTES, 0, 0)

    return find_largest


def _make_settle(head_dim: int) -> Any:
    """Return the choice of the softmax's references for a block."""
    sums_at = Scratch(head_dim).sums
    change_sums = _change_sums()

    @numba.njit
    def settle(scratch, start, halves, constants):
        for half in range(halves):
            state = scratch + half * STATE_BYTES
            if _settle(state, constants, 0, 0) != 0 and start > 0:
                for part in range(head_dim // 32):
                    change_sums(scratch + sums_at + part * 32 * ROW_BYTES + half * 64, state, 0, 0)
            _begin_block(state, 0, 0, 0)

    return settle


def _make_write(head_dim: int) -> Any:
    """Return the division of the sums by those of the exponentials, and their transposition to columns."""
    part = Scratch(head_dim)
    sums_at, rows_at = part.sums, part.rows
    row_bytes = head_dim * 2
    finish = make_finish(row_bytes)

    @numba.njit
    def write(scratch, halves):
        for half in range(halves):
            for at in range(head_dim // 16):
                source = scratch + sums_at + at * 16 * ROW_BYTES + half * 64
                target = scratch + rows_at + half * 16 * row_bytes + at * 32
                finish(source, scratch + half * STATE_BYTES, target, 0)

    return write


def make_attend(head_dim: int) -> Any:
    """Return the attention of a block of columns.

    `attend(scratch, keys, values, tokens, end, clear, halves, constants)`: `keys` and `values` are addresses, of keys
    `[tokens, head_dim]` and of values packed by `pack_values`. The last `tokens % 32` keys are read in
    `Scratch.last_keys`. The columns see at most `end` tokens and all of them see the first `clear` ones. `halves`: 1 or
    2 times 16 columns are used. The results are columns in `Scratch.rows`, `[32, head_dim]` bfloat16.
    """
    part = Scratch(head_dim)
    scores_at, pairs_at, sums_at = part.scores, part.pairs, part.sums
    row_bytes = head_dim * 2
    score_step, find_largest = _make_score_step(head_dim), _make_find_largest(head_dim)
    settle, mix, write = _make_settle(head_dim), make_mix(head_dim), _make_write(head_dim)
    exponentials = _exponentials()

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
                    scores = scratch + scores_at + (parity * BLOCK_TOKENS + step * STEP) * ROW_BYTES + half * 64
                    pairs = scratch + pairs_at + (step * 2 + half) * _TILE
                    exponentials(scores, pairs, scratch + half * STATE_BYTES, constants)
                if step < more:
                    find_largest(scratch, following, step, 1 - parity, clear, halves)
            mix(values + start * row_bytes, scratch + pairs_at, steps, start == 0, scratch + sums_at)
            steps = more
            parity = 1 - parity
        write(scratch, halves)

    return attend


@function
def prefetch_rows(v: Vectors, address: Any, stride: Any, *_: Any) -> None:
    """Fetch the first 128 bytes of 32 rows into the L2 cache. Any address is allowed."""
    for _row in range(STEP):
        prefetch(v, address, 128, 2)
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
    """Return into how many pieces of work the `blocks` of a head are divided: four pieces per thread or more."""
    return max(1, min(blocks, -(-4 * torch.get_num_threads() // heads)))
