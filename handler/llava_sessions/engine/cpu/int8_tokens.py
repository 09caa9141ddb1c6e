"""Keys and values in int8 for compiled attention: how a token is stored and read, and where its scale is."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from ..formats.int8 import LARGEST, SMALLEST
from . import compiled, vectors

_floats_at = compiled.pointer(types.float32)
SCALE_BYTES = 4


@numba.njit(inline="always")
def wide(number):
    """Return an int8 number as float32."""
    return np.float32(number)


@numba.njit(inline="always")
def times_scale(number, scales, token):
    """Return a float32 number times the scale of a token. `scales`: address of the tokens' scales."""
    return number * _floats_at(scales)[token]


@numba.njit(inline="always")
def unchanged(number, scales, token):
    """Return the number, where keys and values have no scales."""
    return number


def make_store(head_dim: int) -> Any:
    """Return the compiled store of one key or value, with the numbers of `formats.int8.quantize`.

    `store(source, target, scales, token)`: `source` `[head_dim]` float32; `target` `[head_dim]` int8; `scales`: address
    of the tokens' scales, of which that of `token` is written. Callers must not be compiled with fastmath: it would
    multiply by an inexact 1 / scale, and drop NaN.
    """
    return _make_vector_store(head_dim) if head_dim % vectors.LANES == 0 else _make_plain_store(head_dim)


def _make_plain_store(head_dim: int) -> Any:
    @numba.njit(error_model="numpy")
    def store(source, target, scales, token):
        largest = np.float32(SMALLEST)
        not_finite = np.float32(0)
        for d in range(head_dim):
            largest = max(largest, abs(source[d]))
            not_finite += source[d] * np.float32(0)  # 0, or NaN from then on
        scale = largest / np.float32(LARGEST) + not_finite
        _floats_at(scales)[token] = scale
        for d in range(head_dim):
            target[d] = np.int8(np.rint(source[d] / scale))

    return store


def _make_vector_store(head_dim: int) -> Any:
    """As `_make_plain_store`, 16 numbers at a time. LLVM does not vectorize that loop."""

    @numba.njit(error_model="numpy")
    def store(source, target, scales, token):
        source_at, target_at = source.ctypes.data, target.ctypes.data
        zeros = vectors.zeros()
        largest, not_finite = zeros, zeros
        for d in range(0, head_dim, vectors.LANES):
            numbers = vectors.load(source_at + 4 * d)
            largest = vectors.largest(largest, vectors.largest(numbers, zeros - numbers))
            not_finite = not_finite + numbers * zeros
        most = max(vectors.highest(largest), np.float32(SMALLEST))
        scale = most / np.float32(LARGEST) + vectors.total(not_finite)
        _floats_at(scales)[token] = scale
        divisor = vectors.splat(scale)
        for d in range(0, head_dim, vectors.LANES):
            vectors.store_int8(target_at + d, vectors.divided(vectors.load(source_at + 4 * d), divisor))

    return store


def make_widen(head_dim: int) -> Any:
    """Return the compiled conversion of stored keys or values of a head to bfloat16, as `formats.int8.dequantize`.

    `widen(numbers, scales, target, tokens)`: the addresses of int8 `[tokens, head_dim]`, of float32 `[tokens]`, and of
    bfloat16 `[tokens, head_dim]`, which is written. `head_dim`: a multiple of 16. Needs AVX-512 BF16.
    """

    @numba.njit
    def widen(numbers, scales, target, tokens):
        for token in range(tokens):
            scale = vectors.splat(_floats_at(scales)[token])
            at = token * head_dim
            for d in range(at, at + head_dim, vectors.LANES):
                vectors.store_bfloat16(target + 2 * d, vectors.load_int8(numbers + d) * scale)

    return widen
