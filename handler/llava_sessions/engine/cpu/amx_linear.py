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
import torch
from numba import types

from ..fused.operations import Activation, RowNorm
from . import amx, amx_product, compiled

COLUMNS = 32  # N must be a multiple of it
INPUTS = 32  # K must be a multiple of it

# Rows of inputs that a thread keeps in its L2 cache while it passes over the weights.
_BLOCK_BYTES = 1_250_000
# Weights of neighbouring columns that it keeps there meanwhile: their results are neighbours in memory too.
_WEIGHT_BYTES = 270_000
_SCRATCH_BYTES = 8192  # of each thread: a block of float32 results
_CONTROL_BYTES = 512  # the configuration and the counters
FIELDS = 16  # of a task
# Fields with the addresses of the inputs, of what is added, of the results, and of the counter of the work taken.
X, ADDED, OUT, COUNTER = 0, 10, 11, 14
PLACED = (X, 1, 6, 7, ADDED, OUT, 13, COUNTER)  # the fields that `place` sets


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
            self._bytes = torch.empty(0, dtype=torch.uint8)  # frees the smaller memory first
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
    scales: torch.Tensor | None = None,
) -> ctypes.Array[ctypes.c_int64]:
    """Return the task of a linear for the compiled loops, without the fields that `place` sets.

    `stored`: address of the weight's tiles. `inputs`, `columns`: K and N. `bias`: float32 `[N]`. With `GATED_SILU`
    weight and bias are `interleaved`. `scales`: for the loops of amx_int8.py.
    """
    task = (ctypes.c_int64 * FIELDS)()
    kind, numbers = (norm.kind, norm.numbers.data_ptr()) if norm is not None else (0, 0)
    task[2:6] = [inputs, columns, kind, numbers]
    task[8:10] = [stored, bias.data_ptr() if bias is not None else 0]
    task[12] = activation
    task[15] = scales.data_ptr() if scales is not None else 0
    return task


def place(
    task: ctypes.Array[ctypes.c_int64], at: int, x: int, added: int, out: int, work: Workspace, counter: int
) -> None:
    """Set the addresses of one call in the fields from `at` on. `counter`: number of the counter of `work`."""
    task[at : at + 2] = [x, work.rows]
    task[at + 6 : at + 8] = [work.copied, work.scratch]
    task[at + 10 : at + 12] = [added, out]
    task[at + 13 : at + 15] = [work.configuration, work.counters + 64 * counter]


def workspace(rows: int, inputs: int, more_bytes: int = 0) -> Workspace:
    """Return a workspace for these loops."""
    return Workspace(rows, inputs, more_bytes)


class Workspace:
    """Addresses of memory for one call of compiled loops with `rows` rows of at most `inputs` inputs.

    `copied`: the inputs after a norm, once for each thread if they are few. `scratch`: results of each thread.
    `configuration`: see `amx.configure`. `counters`: zeros, 64 bytes each. `more`: `more_bytes` for the caller. Valid
    until this thread makes the next one.
    """

    def __init__(self, rows: int, inputs: int, more_bytes: int = 0, scratch_bytes: int = _SCRATCH_BYTES) -> None:
        threads = torch.get_num_threads()
        # A block of rows has whole tiles.
        copied_bytes = 2 * inputs * (amx.ROWS * threads if rows <= amx.ROWS else -(-rows // 32) * 32)
        self.rows = rows
        self.copied = _memory.address(copied_bytes + threads * scratch_bytes + _CONTROL_BYTES + more_bytes)
        self.scratch = self.copied + copied_bytes
        self.configuration = self.scratch + threads * scratch_bytes
        self.counters = self.configuration + 64
        self.more = self.configuration + _CONTROL_BYTES
        ctypes.memmove(self.configuration, _configuration(min(rows, amx.ROWS)), 64)
        ctypes.memset(self.counters, 0, _CONTROL_BYTES - 64)


@functools.cache
def _configuration(rows: int) -> bytes:
    return bytes(amx.configuration(rows, range(5)))  # the tiles of results, and the one of inputs


@numba.njit
def _few_rows(task, thread):
    """Up to 16 rows: each thread norms all of them for itself."""
    x, rows, inputs, columns, norm, numbers, copied, scratch, stored, bias, added, out, activation, _, counter, _ = task
    if norm:
        own = copied + thread * amx.ROWS * inputs * 2
        for row in range(rows):
            amx_product.norm_row(x + row * inputs * 2, own + row * inputs * 2, inputs, norm, numbers)
        x = own
    c = scratch + thread * _SCRATCH_BYTES
    while True:
        item = compiled.next_number(counter)
        if item >= columns // 32:
            break
        amx_product.product_1x2(x, inputs * 2, stored + item * 64 * inputs, inputs // 32, c)
        amx_product.finish(c, rows, item * 32, columns, 0, bias, added, out, activation)


@numba.njit
def _many_rows(task, thread, threads):
    """A block of rows and some columns' weights stay in the L2 cache of a thread while it multiplies them."""
    x, rows, inputs, columns, norm, numbers, copied, scratch, stored, bias, added, out, activation, _, counter, _ = task
    # The last rows are copied even without a norm: tiles have 32 rows, and memory after the inputs is not read.
    whole = 0 if norm else rows // 32 * 32
    for row in range(whole + thread, rows, threads):
        amx_product.copy_row(x + row * inputs * 2, copied + (row - whole) * inputs * 2, inputs, norm, numbers)
    compiled.wait_for_threads()
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
            is_first = group == first_group
            source = x + group * 64 * inputs if group * 32 < whole else copied + (group * 32 - whole) * inputs * 2
            left = min(32, rows - group * 32)
            for pair in range(first_pair, min(first_pair + pairs, columns // 32)):
                weights = stored + pair * 64 * inputs
                if left <= 16:
                    amx_product.product_1x2(source, inputs * 2, weights, inputs // 32, c)
                else:
                    step = amx_product.FETCH if not is_first and fetch < end else 0
                    amx_product.product_2x2(source, inputs * 2, weights, inputs // 32, c, is_first, fetch, step)
                    fetch += step * (inputs // 32)
                amx_product.finish(c, left, pair * 32, columns, group * 32, bias, added, out, activation)


@numba.njit
def product(task, thread, threads):
    """Do a thread's part of a task. All threads must call it, with their tiles configured."""
    if task[1] <= 16:
        _few_rows(task, thread)
    else:
        _many_rows(task, thread, threads)


@functools.cache
def loops(work: Any = product) -> Any:
    """Compile a `product` for all shapes: a Numba C function that takes the address of a task."""

    @numba.cfunc(types.void(types.CPointer(types.int64)))
    def compute(pointer):
        task = numba.carray(pointer, (FIELDS,))
        amx.configure(task[13])
        work(task, compiled.thread_number(), compiled.thread_count())
        amx.release()

    return compute
