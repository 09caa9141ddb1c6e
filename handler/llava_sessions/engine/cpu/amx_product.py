"""The inner loops of amx_linear.py: norms of rows, products of tiles, and what follows a product.

All arguments are addresses or numbers, int64.
"""

from __future__ import annotations

import numba
import numpy as np

from . import amx, compiled, vectors

zero_0, zero_1, zero_2, zero_3 = (amx.tile_zero(tile) for tile in range(4))
store_0, store_1, store_2, store_3 = (amx.tile_store(tile) for tile in range(4))
# Tiles 0 to 3 have results, 4 and 5 inputs, 6 and 7 weights.
load_a0, load_a1, load_b0, load_b1 = (amx.tile_load(tile) for tile in range(4, 8))
dot_00, dot_01, dot_10, dot_11 = (amx.tile_dot(c, a, b) for c, (a, b) in enumerate([(4, 6), (4, 7), (5, 6), (5, 7)]))

# Bytes between a weight that is used and the one that is fetched.
_AHEAD = 4096
# Bytes of the next weights that are fetched with each block of inputs.
FETCH = 128


@numba.njit
def copy_row(source, target, inputs, norm, numbers):
    """Copy one row, normed if `norm` is not 0."""
    if norm:
        norm_row(source, target, inputs, norm, numbers)
        return
    for at in range(0, inputs * 2, 64):
        vectors.store(target + at, vectors.load(source + at))


@numba.njit(error_model="numpy")  # an error in one thread would leave the others waiting
def norm_row(source, target, inputs, norm, numbers):
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
def product_1x2(x, x_stride, w, blocks, c):
    """Multiply up to 16 rows by 32 columns into `c`, float32 `[16, 32]`."""
    zero_0()
    zero_1()
    for _ in range(blocks):
        compiled.prefetch(w + _AHEAD, 2048)
        load_a0(x, x_stride)
        load_b0(w, 64)
        dot_00()
        load_b1(w + 1024, 64)
        dot_01()
        x += 64
        w += 2048
    store_0(c, 128)
    store_1(c + 64, 128)


@numba.njit
def product_2x2(x, x_stride, w, blocks, c, is_new, fetch, step):
    """Multiply 32 rows by 32 columns into `c`, float32 `[32, 32]`.

    `is_new`: these weights are not in the caches yet. Meanwhile fetch from the address `fetch` on, in steps of `step`
    bytes.
    """
    second = x + 16 * x_stride
    zero_0()
    zero_1()
    zero_2()
    zero_3()
    for _ in range(blocks):
        if is_new:
            compiled.prefetch(w + _AHEAD, 2048)
        compiled.prefetch_l2(fetch, FETCH)
        fetch += step
        load_a0(x, x_stride)
        load_b0(w, 64)
        dot_00()
        load_b1(w + 1024, 64)
        dot_01()
        load_a1(second, x_stride)
        dot_10()
        dot_11()
        x += 64
        second += 64
        w += 2048
    store_0(c, 128)
    store_1(c + 64, 128)
    store_2(c + 2048, 128)
    store_3(c + 2112, 128)


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
def finish(c, rows, column, columns, first, bias, added, out, activation):
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
