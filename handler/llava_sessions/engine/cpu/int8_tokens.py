"""Keys and values in int8 for token_attention.py: how a token is stored, and where its scale is."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from ..formats.int8 import LARGEST, SMALLEST
from . import compiled

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
    of the tokens' scales, of which that of `token` is written.
    """

    # Without fastmath, as its callers: it would multiply by an inexact 1 / scale, and drop NaN.
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
