"""The two products of attention with AMX: 32 keys by 32 queries, and values by exponentials. See `amx_attention`."""

from __future__ import annotations

from typing import Any

import numba

from . import amx
from .amx import TILE_BYTES

COLUMNS = 32  # of a block of queries: two tiles
ROW_BYTES = COLUMNS * 4  # of scores and sums, in float32

_zero, _load, _store = ([make(tile) for tile in range(8)] for make in (amx.tile_zero, amx.tile_load, amx.tile_store))
_zero_0, _zero_1, _zero_2, _zero_3 = _zero[:4]
_load_0, _load_1, _load_2, _load_3, _load_4, _load_5, _load_6, _load_7 = _load
_store_0, _store_1, _store_2, _store_3 = _store[:4]
_dot_0, _dot_1, _dot_2, _dot_3 = (amx.tile_dot(c, 4 + c // 2, 6 + c % 2) for c in range(4))


@numba.njit
def _store_products(out):
    """Store the tiles 0 to 3 as `[32, 32]` float32."""
    _store_0(out, ROW_BYTES)
    _store_1(out + 64, ROW_BYTES)
    _store_2(out + 16 * ROW_BYTES, ROW_BYTES)
    _store_3(out + 16 * ROW_BYTES + 64, ROW_BYTES)


def make_score(head_dim: int) -> Any:
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
            _load_6(queries + k * 2 * TILE_BYTES, 64)
            _dot_0()
            _load_7(queries + (k * 2 + 1) * TILE_BYTES, 64)
            _dot_1()
            _load_5(keys + 16 * stride + k * 64, stride)
            _dot_2()
            _dot_3()
        _store_products(out)

    return score


def make_mix(head_dim: int) -> Any:
    """Return the addition of `steps` products of values with exponentials to the sums `[head_dim, 32]`."""

    @numba.njit
    def mix(values, pairs, steps, first, sums):
        for part in range(head_dim // 32):
            out = sums + part * 32 * ROW_BYTES
            if first:
                _zero_0()
                _zero_1()
                _zero_2()
                _zero_3()
            else:
                _load_0(out, ROW_BYTES)
                _load_1(out + 64, ROW_BYTES)
                _load_2(out + 16 * ROW_BYTES, ROW_BYTES)
                _load_3(out + 16 * ROW_BYTES + 64, ROW_BYTES)
            for k in range(steps):
                tile = values + (k * (head_dim // 16) + part * 2) * TILE_BYTES
                _load_4(tile, 64)
                _load_6(pairs + k * 2 * TILE_BYTES, 64)
                _dot_0()
                _load_7(pairs + (k * 2 + 1) * TILE_BYTES, 64)
                _dot_1()
                _load_5(tile + TILE_BYTES, 64)
                _dot_2()
                _dot_3()
            _store_products(out)

    return mix
