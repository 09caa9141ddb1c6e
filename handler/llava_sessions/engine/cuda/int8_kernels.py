"""Triton kernel of a linear with int8 weights, for few rows: it reads each weight once, as int8.

A weight is widened to the dtype of the rows, without loss, after it was read. 16-bit rows are multiplied on the tensor
cores from compute capability 8 on. Sums are float32. A result is one sum over all inputs in their order, which does not
depend on other rows.

Importing this module needs Triton. Triton decides at import whether its kernels are compiled or interpreted
(TRITON_INTERPRET).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["row_count"])
def multiply(
    rows,
    numbers,
    scales,
    bias,
    added,
    out,
    row_count,
    columns,
    inputs,
    HAS_BIAS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Compute a block of `out`. Grid: blocks of rows, blocks of columns.

    `rows`: `[row_count, inputs]`. `numbers`: int8 `[columns, inputs]`. `scales`: float32 `[columns]`. `bias`:
    `[columns]`. `added`, `out`: `[row_count, columns]`, may be the same. All are contiguous. With `IS_GATED`, numbers,
    scales and bias are twice as long: the result is silu of the first half of the columns, times the second half.
    """
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    k = tl.arange(0, BLOCK_INPUTS)
    is_row = m < row_count
    is_column = n < columns
    row_block = rows + m[:, None] * inputs + k[None, :]
    block = numbers + n[:, None] * inputs + k[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    other = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, inputs, BLOCK_INPUTS):
        is_input = k[None, :] < inputs - start
        x = tl.load(row_block + start, mask=is_row[:, None] & is_input, other=0.0)
        w = tl.load(block + start, mask=is_column[:, None] & is_input, other=0)
        total = tl.dot(x, tl.trans(w).to(x.dtype), total, input_precision="ieee")
        if IS_GATED:
            w = tl.load(block + (columns * inputs + start), mask=is_column[:, None] & is_input, other=0)
            other = tl.dot(x, tl.trans(w).to(x.dtype), other, input_precision="ieee")
    total = _scaled(total, scales, bias, n, is_column, HAS_BIAS)
    if IS_GATED:
        other = _scaled(other, scales + columns, bias + columns, n, is_column, HAS_BIAS)
        small = tl.exp(-tl.abs(total))  # at most 1: the exponential of a large number would be infinite
        total = total * tl.where(total < 0, small, 1.0) / (1.0 + small) * other
    place = m[:, None] * columns + n[None, :]
    is_result = is_row[:, None] & is_column[None, :]
    if HAS_ADDED:
        total += tl.load(added + place, mask=is_result, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=is_result)


@triton.jit
def _scaled(total, scales, bias, n, is_column, HAS_BIAS: tl.constexpr):
    """Return the sums times the scales of their columns, plus the bias."""
    total *= tl.load(scales + n, mask=is_column, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=is_column, other=0.0).to(tl.float32)[None, :]
    return total
