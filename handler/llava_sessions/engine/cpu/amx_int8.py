"""The compiled loops of amx_linear.py for weights in int8.

The weights are stored in the same order as in bfloat16, except that of 64 numbers the first 32 alternate with the
others. For up to 16 rows, a block of 32 inputs x 32 columns is widened to bfloat16 in the L1 cache while the block
before it is multiplied. For more rows, 32 columns are widened in the L2 cache and multiplied by all rows. The results
are multiplied by the scales of the columns.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import amx, amx_linear, amx_product, compiled, vectors
from .amx_linear import Workspace

# The widened numbers are the int8 numbers divided by it: `widen_int8`.
DIVISOR = 256
_BLOCK_BYTES = 1024  # 32 inputs x 32 columns
# Bytes between a weight that is widened and the one that is fetched.
_AHEAD = 4096
_RESULT_BYTES = 4096  # a block of float32 results
_SHORTS = ir.VectorType(ir.IntType(16), 32)
_HALVES = ir.VectorType(ir.HalfType(), 32)


def tiles(numbers: torch.Tensor) -> torch.Tensor:
    """Return an int8 weight `[N, K]`, without -128, in the stored order, as a new tensor of the same size."""
    return amx_linear.tiles(numbers).view(-1, 2, 32).transpose(1, 2).contiguous()


def run(
    task: ctypes.Array[ctypes.c_int64], rows: torch.Tensor, out: torch.Tensor, added: torch.Tensor | None = None
) -> None:
    """Compute a linear as `amx_linear.run`, for a task with scales: float32 `[N]`, multiplied by `DIVISOR`."""
    work = workspace(*rows.shape)
    amx_linear.place(task, 0, rows.data_ptr(), 0 if added is None else added.data_ptr(), out.data_ptr(), work, 0)
    compiled.run(amx_linear.loops(product), task)


def workspace(rows: int, inputs: int, more_bytes: int = 0) -> Workspace:
    """Return a workspace whose scratch has room for widened weights."""
    return Workspace(rows, inputs, more_bytes, _RESULT_BYTES + 2 * _BLOCK_BYTES * max(2, inputs // 32))


@intrinsic
def _widen(_, source, target):
    """Convert a block of 1,024 int8 numbers to bfloat16 and divide them by 256. 0 becomes 2**-31, 2**-23 of 1.

    int8 times 256 becomes float16, whose upper bits are those of bfloat16 except for two bits of the exponent. With
    AVX-512 FP16 that takes four instructions for 32 numbers.
    """

    def constant(number: int) -> Any:
        return ir.Constant(_SHORTS, [number] * 32)

    def place(builder: Any, address: Any, offset: int) -> Any:
        return builder.inttoptr(builder.add(address, ir.IntType(64)(offset)), _SHORTS.as_pointer())

    def generate(context, builder, signature, arguments):
        source, target = arguments
        for line in range(_BLOCK_BYTES // 64):
            both = builder.load(place(builder, source, 64 * line))
            both.align = 1
            parts = (builder.shl(both, constant(8)), builder.and_(both, constant(-0x100)))
            for half, part in enumerate(parts):
                bits = builder.bitcast(builder.sitofp(part, _HALVES), _SHORTS)
                bits = builder.and_(builder.ashr(bits, constant(3)), constant(~0x7000))
                bits = builder.or_(bits, constant(0x3000))
                builder.store(bits, place(builder, target, 128 * line + 64 * half), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@numba.njit
def _widen_columns(w, target, blocks):
    """Widen 32 columns."""
    for _ in range(blocks):
        compiled.prefetch(w + _AHEAD, 1024)
        _widen(w, target)
        w += _BLOCK_BYTES
        target += 2 * _BLOCK_BYTES


@numba.njit
def _scale(c, rows, scales):
    """Multiply `rows` rows of 32 results by the scales of their columns."""
    low = vectors.load(scales)
    high = vectors.load(scales + 64)
    for row in range(rows):
        at = c + row * 128
        vectors.store(at, vectors.load(at) * low)
        vectors.store(at + 64, vectors.load(at + 64) * high)


@numba.njit
def _product_1x2(x, x_stride, w, blocks, c):
    """Multiply up to 16 rows by 32 columns into `c`, float32 `[16, 32]`, without the scales.

    Two widened blocks follow `c`.
    """
    amx_product.zero_0()
    amx_product.zero_1()
    both = c + _RESULT_BYTES
    wide = both
    _widen(w, wide)
    for block in range(1, blocks + 1):
        if block < blocks:
            w += _BLOCK_BYTES
            compiled.prefetch(w + _AHEAD, 1024)
            _widen(w, both + block % 2 * 2048)
        amx_product.load_a0(x, x_stride)
        amx_product.load_b0(wide, 64)
        amx_product.dot_00()
        amx_product.load_b1(wide + 1024, 64)
        amx_product.dot_01()
        x += 64
        wide = both + block % 2 * 2048
    amx_product.store_0(c, 128)
    amx_product.store_1(c + 64, 128)


@numba.njit
def product(task, thread, threads):
    """Do a thread's part of a task. All threads must call it, with their tiles configured."""
    x, rows, inputs, columns, norm, numbers, copied, scratch = task[:8]
    stored, bias, added, out, activation, _, counter, scales = task[8:]
    blocks = inputs // 32
    whole = 0 if norm else rows // 32 * 32
    if rows > 16:
        # The last rows are copied even without a norm, as in amx_linear.py.
        for row in range(whole + thread, rows, threads):
            target = copied + (row - whole) * inputs * 2
            amx_product.copy_row(x + row * inputs * 2, target, inputs, norm, numbers)
        compiled.wait_for_threads()
    elif norm:
        copied += thread * amx.ROWS * inputs * 2
        for row in range(rows):
            amx_product.norm_row(x + row * inputs * 2, copied + row * inputs * 2, inputs, norm, numbers)
        x = copied
    c = scratch + thread * (_RESULT_BYTES + 2 * _BLOCK_BYTES * max(2, blocks))
    wide = c + _RESULT_BYTES
    while True:
        pair = compiled.next_number(counter)
        if pair >= columns // 32:
            break
        w = stored + pair * _BLOCK_BYTES * blocks
        if rows <= 16:
            _product_1x2(x, inputs * 2, w, blocks, c)
            _scale(c, rows, scales + pair * 128)
            amx_product.finish(c, rows, pair * 32, columns, 0, bias, added, out, activation)
            continue
        _widen_columns(w, wide, blocks)
        for first in range(0, rows, 32):
            left = min(32, rows - first)
            source = x + first * inputs * 2 if first < whole else copied + (first - whole) * inputs * 2
            if left <= 16:
                amx_product.product_1x2(source, inputs * 2, wide, blocks, c)
            else:
                amx_product.product_2x2(source, inputs * 2, wide, blocks, c, False, wide, 0)
            _scale(c, left, scales + pair * 128)
            amx_product.finish(c, left, pair * 32, columns, first, bias, added, out, activation)
