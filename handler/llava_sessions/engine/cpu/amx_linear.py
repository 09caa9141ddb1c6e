"""The compiled loops of a linear in bfloat16 with AMX: norm, product, bias, activation and sum in one call.

A call reads each weight once from memory, in the order in which it is stored, and prefetches it. A call with few rows
therefore takes the time of reading its weights. Threads take blocks of 32 columns from a counter: if the system takes
the core of one thread away for a while, the other threads do more of the work.

The weights `[N, K]` are stored as tiles `[N / 32, K / 32, 2, 16, 16, 2]`: 32 columns, 32 inputs, half of the columns,
pair of inputs, column, input of the pair.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from . import amx, compiled, vectors
from .operations import Activation, RowNorm

COLUMNS = 32  # N must be a multiple of it
INPUTS = 32  # K must be a multiple of it

_zero_0, _zero_1, _zero_2, _zero_3 = (amx.tile_zero(tile) for tile in range(4))
_store_0, _store_1, _store_2, _store_3 = (amx.tile_store(tile) for tile in range(4))
_load_a0, _load_a1, _load_b0, _load_b1 = (amx.tile_load(tile) for tile in range(4, 8))
_dot_00, _dot_01, _dot_10, _dot_11 = (
    amx.tile_dot(c, a, b) for c, (a, b) in enumerate([(4, 6), (4, 7), (5, 6), (5, 7)])
)

# Bytes between a weight that is used and the one that is fetched.
_AHEAD = 4096
# Rows of inputs that a thread keeps in its L2 cache while it passes over the weights.
_BLOCK_BYTES = 1_250_000
# Weights of neighbouring columns that it keeps there meanwhile: their results are neighbours in memory too.
_WEIGHT_BYTES = 270_000
# Bytes of the next weights that are fetched with each block of inputs.
_FETCH = 128
_SCRATCH_BYTES = 8192  # of each thread: a block of float32 results
_CONTROL_BYTES = 512  # the configuration and the counters
FIELDS = 15  # of a task


def tiles(weight: torch.Tensor) -> torch.Tensor:
    """Return a bfloat16 weight `[N, K]` in the stored order, as a new tensor of the same size."""
    n, k = weight.shape
    return weight.view(n // 32, 2, 16, k // 32, 16, 2).permute(0, 3, 1, 4, 2, 5).contiguous()


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight `[N, ...]` whose halves alternate every 16 rows, so that a block of columns has pairs of both."""
    return weight.view(2, len(weight) // 32, 16, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


class _Memory(threading.local):
    """Memory that the calls of one thread reuse: a tensor that is touched once costs no page faults later."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def address(self, count: int) -> int:
        """Return the address of at least `count` bytes, on a page boundary. Valid until the next call."""
        if len(self._bytes) < count + 4096:
            self._bytes = torch.empty(count + count // 2 + 4096, dtype=torch.uint8)
        return -(-self._bytes.data_ptr() // 4096) * 4096


_memory = _Memory()


def run(
    task: ctypes.Array[ctypes.c_int64], rows: torch.Tensor, out: torch.Tensor, added: torch.Tensor | None = None
) -> None:
    """Compute `out = activation(norm(rows) @ weight.T + bias) + added` for a task of `fields`.

    All are contiguous bfloat16. `rows`: `[M, K]`. `added` and `out`: `[M, N]`, with `GATED_SILU` `[M, N / 2]`.
    """
    work = Workspace(*rows.shape)
    place(task, 0, rows.data_ptr(), 0 if added is None else added.data_ptr(), out.data_ptr(), work, 0)
    compiled.run(loops(), task)


def fields(
    stored: int,
    inputs: int,
    columns: int,
    bias: torch.Tensor | None,
    norm: RowNorm | None,
    activation: Activation,
) -> ctypes.Array[ctypes.c_int64]:
    """Return the task of a linear for the compiled loops, without the fields that `place` sets.

    `stored`: address of the weight's tiles. `inputs`, `columns`: K and N. `bias`: float32 `[N]`. With `GATED_SILU`
    weight and bias are `interleaved`.
    """
    task = (ctypes.c_int64 * FIELDS)()
    task[2:6] = (
        inputs,
        columns,
        norm.kind if norm is not None else 0,
        norm.numbers.data_ptr() if norm is not None else 0,
    )
    task[8:10] = stored, bias.data_ptr() if bias is not None else 0
    task[12] = activation
    return task


def place(
    task: ctypes.Array[ctypes.c_int64], at: int, x: int, added: int, out: int, work: Workspace, counter: int
) -> None:
    """Set the addresses of one call in the fields from `at` on. `counter`: number of the counter of `work`."""
    task[at : at + 2] = x, work.rows
    task[at + 6 : at + 8] = work.normed, work.scratch
    task[at + 10 : at + 12] = added, out
    task[at + 13 : at + 15] = work.configuration, work.counters + 64 * counter


class Workspace:
    """Addresses of memory for one call of compiled loops with `rows` rows of at most `inputs` inputs.

    `normed`: the inputs after a norm, once for each thread if they are few. `scratch`: results of each thread.
    `configuration`: see `amx.configure`. `counters`: zeros, 64 bytes each. `more`: `more_bytes` for the caller. Valid
    until this thread makes the next one.
    """

    def __init__(self, rows: int, inputs: int, more_bytes: int = 0) -> None:
        threads = torch.get_num_threads()
        normed_bytes = 2 * inputs * (rows if rows > amx.ROWS else amx.ROWS * threads)
        self.rows = rows
        self.normed = _memory.address(normed_bytes + threads * _SCRATCH_BYTES + _CONTROL_BYTES + more_bytes)
        self.scratch = self.normed + normed_bytes
        self.configuration = self.scratch + threads * _SCRATCH_BYTES
        self.counters = self.configuration + 64
        self.more = self.configuration + _CONTROL_BYTES
        ctypes.memmove(self.configuration, _configuration(min(rows, amx.ROWS)), 64)
        ctypes.memset(self.counters, 0, _CONTROL_BYTES - 64)


@functools.cache
def _configuration(rows: int) -> bytes:
    return bytes(amx.configuration(rows, range(5)))  # the tiles of results, and the one of inputs


@numba.njit
def _norm_row(source, target, inputs, norm, numbers):
    """Write the norm of one row."""
    sums = vectors.zeros()
    squares = vectors.zeros()
    for at in range(0, inputs * 2, 32):
        x = vectors.load_bfloat16(source + at)
        sums = sums + x
        squares = vectors.fused(x, x, squares)
    mean = np.float32(0)
    if norm == 2:
        mean = vectors.total(sums) / np.float32(inputs)
        squares = vectors.zeros()
        for at in range(0, inputs * 2, 32):
            x = vectors.load_bfloat16(source + at) - vectors.splat(mean)
            squares = vectors.fused(x, x, squares)
    epsilon = vectors.first(vectors.load(numbers))
    inverse = np.float32(1) / np.sqrt(vectors.total(squares) / np.float32(inputs) + epsilon)
    scale = vectors.splat(inverse)
    shift = vectors.splat(-mean * inverse)
    weights = numbers + 64
    for at in range(0, inputs * 2, 32):
        x = vectors.fused(vectors.load_bfloat16(source + at), scale, shift) * vectors.load(weights + 2 * at)
        if norm == 2:
            x = x + vectors.load(weights + inputs * 4 + 2 * at)
        vectors.store_bfloat16(target + at, x)


@numba.njit
def _product_1x2(x, x_stride, w, blocks, c):
    """Multiply up to 16 rows by 32 columns into `c`, float32 `[16, 32]`."""
    _zero_0()
    _zero_1()
    for _ in range(blocks):
        compiled.prefetch(w + _AHEAD, 2048)
        _load_a0(x, x_stride)
        _load_b0(w, 64)
        _dot_00()
        _load_b1(w + 1024, 64)
        _dot_01()
        x += 64
        w += 2048
    _store_0(c, 128)
    _store_1(c + 64, 128)


@numba.njit
def _product_2x2(x, x_stride, w, blocks, c, ahead, fetch, step):
    """Multiply 32 rows by 32 columns into `c`, float32 `[32, 32]`. `ahead`: see `_AHEAD`; 0: fetch no weights.

    Meanwhile fetch from the address `fetch` on, in steps of `step` bytes.
    """
    second = x + 16 * x_stride
    _zero_0()
    _zero_1()
    _zero_2()
    _zero_3()
    for _ in range(blocks):
        if ahead:
            compiled.prefetch(w + ahead, 2048)
        compiled.prefetch_l2(fetch, _FETCH)
        fetch += step
        _load_a0(x, x_stride)
        _load_b0(w, 64)
        _dot_00()
        _load_b1(w + 1024, 64)
        _dot_01()
        _load_a1(second, x_stride)
        _dot_10()
        _dot_11()
        x += 64
        second += 64
        w += 2048
    _store_0(c, 128)
    _store_1(c + 64, 128)
    _store_2(c + 2048, 128)
    _store_3(c + 2112, 128)


@numba.njit
def _activated(x, activation):
    one = vectors.splat(np.float32(1))
    if activation == 2:
        z = x * vectors.splat(np.float32(-1.702))
    else:
        cubed = vectors.fused(x * x * x, vectors.splat(np.float32(0.044715)), x)
        z = cubed * vectors.splat(np.float32(-1.5957691216))
    return vectors.divided(x, one + vectors.exp(z))


@numba.njit
def _finish(c, rows, column, columns, first, bias, added, out, activation):
    """Write the results of `rows` rows from row `first` on and 32 columns from `column` on."""
    one = vectors.splat(np.float32(1))
    zero = vectors.splat(np.float32(0))
    for row in range(rows):
        low = vectors.load(c + row * 128)
        high = vectors.load(c + row * 128 + 64)
        if bias:
            low = low + vectors.load(bias + column * 4)
            high = high + vectors.load(bias + column * 4 + 64)
        if activation == 1:
            low = vectors.divided(low * high, one + vectors.exp(zero - low))
            place = (first + row) * columns + column
            if added:
                low = low + vectors.load_bfloat16(added + place)
            vectors.store_bfloat16(out + place, low)
            continue
        if activation:
            low = _activated(low, activation)
            high = _activated(high, activation)
        place = ((first + row) * columns + column) * 2
        if added:
            low = low + vectors.load_bfloat16(added + place)
            high = high + vectors.load_bfloat16(added + place + 32)
        vectors.store_bfloat16_pair(out + place, low, high)


@numba.njit
def _few_rows(task, thread):
    """Up to 16 rows: each thread norms all of them for itself."""
    x, rows, inputs, columns, norm, numbers, normed, scratch, stored, bias, added, out, activation, _, counter = task
    if norm:
        own = normed + thread * amx.ROWS * inputs * 2
        for row in range(rows):
            _norm_row(x + row * inputs * 2, own + row * inputs * 2, inputs, norm, numbers)
        x = own
    c = scratch + thread * _SCRATCH_BYTES
    while True:
        item = compiled.next_number(counter)
        if item >= columns // 32:
            break
        _product_1x2(x, inputs * 2, stored + item * 64 * inputs, inputs // 32, c)
        _finish(c, rows, item * 32, columns, 0, bias, added, out, activation)


@numba.njit
def _many_rows(task, thread, threads):
    """A block of rows and some columns' weights stay in the L2 cache of a thread while it multiplies them."""
    x, rows, inputs, columns, norm, numbers, normed, scratch, stored, bias, added, out, activation, _, counter = task
    if norm:
        for row in range(thread, rows, threads):
            _norm_row(x + row * inputs * 2, normed + row * inputs * 2, inputs, norm, numbers)
        compiled.wait_for_threads()
        x = normed
    c = scratch + thread * _SCRATCH_BYTES
    all_groups = (rows + 31) // 32
    groups = max(1, min(all_groups, _BLOCK_BYTES // (64 * inputs)))
    passes = (all_groups + groups - 1) // groups
    pairs = max(1, min(columns // 32, _WEIGHT_BYTES // (64 * inputs)))
    items = (columns // 32 + pairs - 1) // pairs
    item = compiled.next_number(counter)
    while item < items * passes:
        first_pair = item % items * pairs
        first_group = item // items * groups
        item = compiled.next_number(counter)
        fetch = stored + item % items * pairs * 64 * inputs  # the weights of this thread's next item
        end = fetch + pairs * 64 * inputs
        for group in range(first_group, min(first_group + groups, all_groups)):
            left = min(32, rows - group * 32)
            ahead = _AHEAD if group == first_group else 0
            for pair in range(first_pair, min(first_pair + pairs, columns // 32)):
                weights = stored + pair * 64 * inputs
                if left <= 16:
                    _product_1x2(x + group * 64 * inputs, inputs * 2, weights, inputs // 32, c)
                else:
                    step = _FETCH if not ahead and fetch < end else 0
                    _product_2x2(x + group * 64 * inputs, inputs * 2, weights, inputs // 32, c, ahead, fetch, step)
                    fetch += step * (inputs // 32)
                _finish(c, left, pair * 32, columns, group * 32, bias, added, out, activation)


@numba.njit
def product(task, thread, threads):
    """Do a thread's part of a task. All threads must call it, with their tiles configured."""
    if task[1] <= 16:
        _few_rows(task, thread)
    else:
        _many_rows(task, thread, threads)


@functools.cache
def loops() -> Any:
    """Compile the loops for all shapes: a Numba C function that takes the address of a task."""

    @numba.cfunc(types.void(types.CPointer(types.int64)))
    def compute(pointer):
        task = numba.carray(pointer, (FIELDS,))
        amx.configure(task[13])
        product(task, compiled.thread_number(), compiled.thread_count())
        amx.release()

    return compute
