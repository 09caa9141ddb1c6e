"""Attention of pictures with AMX: without a mask, for heads of any size. See `amx_attention`."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from . import amx, amx_attention, compiled
from .amx_attention import STEP
from .amx_products import COLUMNS

_HEAD = 16


class PictureAttention:
    """Attention without a mask for one size of heads, in bfloat16. Not thread-safe: calls share memory."""

    def __init__(self, head_dim: int) -> None:
        """Compile the loops. Raises what Numba raises."""
        self._head_dim = head_dim
        self._padded = -(-head_dim // 32) * 32
        self._loops = _compile(head_dim)
        self._task = np.zeros(_HEAD, np.int64)
        self._memory = amx_attention.Memory()
        self._configuration = amx.configuration(amx.ROWS)

    def __call__(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return attention `[pictures, heads, rows, head_dim]`, transposed from a contiguous `[pictures, rows, ...]`.

        All inputs have that shape, the same strides, and contiguous heads.
        """
        pictures, heads, rows, head_dim = query.shape
        out = query.new_empty((pictures, rows, heads, head_dim))
        constants = amx_attention.softmax_numbers(scaling)
        padded_rows = -(-rows // STEP) * STEP
        thread_bytes = amx_attention.Scratch(self._padded).values + 2 * padded_rows * self._padded * 2
        threads = torch.get_num_threads()
        slices = amx_attention.slices(pictures * heads, -(-rows // COLUMNS))
        self._task[:] = [
            0,
            self._memory.address(thread_bytes * threads),
            thread_bytes,
            self._configuration.ctypes.data,
            constants.ctypes.data,
            pictures,
            heads,
            rows,
            slices,
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            *(query.stride(at) * 2 for at in range(3)),
        ]
        compiled.run(self._loops, np.ctypeslib.as_ctypes(self._task))
        return out.transpose(1, 2)


def _make_pack(head_dim: int, padded: int) -> Any:
    """Return the compiled copy of a head's keys, padded with zeros, and the packing of its values."""
    part = amx_attention.Scratch(padded)
    values_at, last_values_at = part.values, part.last_values
    row_bytes = padded * 2
    copy = amx_attention.make_copy(head_dim, padded)
    clear = amx_attention.make_clear(padded)
    pack_values = amx_attention.pack_values()

    @numba.njit
    def pack(scratch, packed_keys, keys, values, rows, stride):
        for start in range(0, rows, STEP):
            count = min(STEP, rows - start)
            for at in range(count):
                copy(keys + (start + at) * stride, packed_keys + (start + at) * row_bytes, 0, 0)
                copy(values + (start + at) * stride, scratch + last_values_at + at * row_bytes, 0, 0)
            for at in range(count, STEP):
                clear(packed_keys + (start + at) * row_bytes, 0, 0, 0)
                clear(scratch + last_values_at + at * row_bytes, 0, 0, 0)
            target = scratch + values_at + start * row_bytes
            for at in range(padded // 32):
                pack_values(scratch + last_values_at + at * 64, target + at * 2048, row_bytes, 0)

    return pack


def _make_run_block(head_dim: int, padded: int) -> Any:
    """Return the compiled attention of up to 32 rows."""
    part = amx_attention.Scratch(padded)
    rows_at, values_at = part.rows, part.values
    last_token_at, state_bytes = amx_attention.LAST_TOKEN, amx_attention.STATE_BYTES
    row_bytes = padded * 2
    copy = amx_attention.make_copy(head_dim, padded)
    copy_out = amx_attention.make_copy(head_dim, head_dim)
    clear = amx_attention.make_clear(padded)
    pack_queries = amx_attention.make_pack_queries(padded)
    attend = amx_attention.make_attend(padded)
    int_at = compiled.pointer(types.int32)

    @numba.njit
    def run_block(scratch, packed_keys, query, stride, out, out_stride, rows, count, constants):
        padded_rows = (rows + STEP - 1) // STEP * STEP
        for at in range(COLUMNS):
            target = scratch + rows_at + at * row_bytes
            if at < count:
                copy(query + at * stride, target, 0, 0)
            else:
                clear(target, 0, 0, 0)
            int_at(scratch + at // 16 * state_bytes + last_token_at)[at % 16] = rows - 1
        pack_queries(scratch)
        halves = (count + 15) // 16
        attend(scratch, packed_keys, scratch + values_at, padded_rows, rows, rows, halves, constants)
        for at in range(count):
            copy_out(scratch + rows_at + at * row_bytes, out + at * out_stride, 0, 0)

    return run_block


@functools.cache
def _compile(head_dim: int) -> Any:
    """Compile the loops. Returns a Numba C function that takes the address of a task."""
    padded = -(-head_dim // 32) * 32
    values_at = amx_attention.Scratch(padded).values
    row_bytes = padded * 2
    pack = _make_pack(head_dim, padded)
    run_block = _make_run_block(head_dim, padded)
    prefetch_rows = amx_attention.prefetch_rows()

    @numba.cfunc(types.void(types.CPointer(types.int64)))
    def loops(pointer):
        task = numba.carray(pointer, (_HEAD,))
        memory, thread_bytes, configuration, constants = task[1], task[2], task[3], task[4]
        pictures, heads, rows, slices = task[5], task[6], task[7], task[8]
        query, keys, values, out = task[9], task[10], task[11], task[12]
        picture_stride, head_stride, stride = task[13], task[14], task[15]
        scratch = memory + compiled.thread_number() * thread_bytes
        padded_rows = (rows + STEP - 1) // STEP * STEP
        packed_keys = scratch + values_at + padded_rows * row_bytes
        amx.configure(configuration)
        out_stride = heads * head_dim * 2
        while True:
            piece = compiled.next_number(task.ctypes.data)
            if piece >= pictures * heads * slices:
                break
            head = piece // slices % heads
            picture = piece // slices // heads
            at = picture * picture_stride + head * head_stride
            pack(scratch, packed_keys, keys + at, values + at, rows, stride)
            blocks = (rows + COLUMNS - 1) // COLUMNS
            likely = min(piece + compiled.thread_count() * slices, pictures * heads * slices - 1) // slices
            next_at = likely // heads * picture_stride + likely % heads * head_stride
            for block in range(piece % slices, blocks, slices):
                row = block * COLUMNS
                prefetch_rows(query + at + (row + COLUMNS) * stride, stride, 0, 0)
                prefetch_rows(keys + next_at + row * stride, stride, 0, 0)
                prefetch_rows(values + next_at + row * stride, stride, 0, 0)
                target = out + (picture * rows + row) * out_stride + head * head_dim * 2
                count = min(COLUMNS, rows - row)
                run_block(
                    scratch, packed_keys, query + at + row * stride, stride, target, out_stride, rows, count, constants
                )
        amx.release()

    return loops
