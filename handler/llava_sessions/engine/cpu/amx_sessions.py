"""Attention of several new tokens of each session with AMX: one call per layer norms, rotates, stores and attends."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from ..fused.head_norms import HeadNorms
from . import amx, amx_attention, compiled, int8_tokens
from .amx_attention import STEP
from .amx_product import norm_row
from .amx_products import COLUMNS
from .amx_vectors import LANES, Vectors, function

# Length of a task's head, and numbers per session behind it.
_HEAD = 14
_LAYER = 7
# Address of the layer's head norms, and the bytes of a layer's head norms.
_NORMS = 12
_NORM_BYTES = 13
_PLACE = 5


class SessionAttention:
    """Causal attention for one shape of heads, in bfloat16. Not thread-safe: calls share memory."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, int8_layers: int = 0) -> None:
        """Compile nothing yet, see `attend_all`. `head_dim`: a multiple of 32.

        `int8_layers`: layers of a cache in int8, or 0 for caches in bfloat16.
        """
        self._int8_layers = int8_layers
        self._heads = heads
        self._kv_heads = kv_heads
        self._head_dim = head_dim
        # Copies of a head's tokens: packed values, and in int8 keys and values in bfloat16.
        self._copies = 3 if int8_layers else 1
        self._memory = amx_attention.Memory()
        self._configuration = amx.configuration(amx.ROWS)
        self._constants = amx_attention.softmax_numbers(head_dim**-0.5)

    def attend_all(self, with_norms: bool) -> Any:
        """Return the loops: a Numba function of the address of a task, which changes the tiles of its thread.

        `with_norms`: of query and key heads. The first call for a new shape compiles the loops. Raises what Numba
        raises.
        """
        return _compile(self._heads, self._kv_heads, self._head_dim, self._int8_layers, with_norms)

    def task(self, places: list[tuple[int, int, int, int, int]]) -> ctypes.Array[ctypes.c_int64]:
        """Return the arguments that all layers of one forward share. Valid until the next call.

        `places`, one per session: its first row in the batch, the number of its rows, the address and the capacity of
        its KV cache, in the layout of `KVShape`, and the number of tokens stored there.
        """
        tokens = max(rows + stored for _, rows, _, _, stored in places)
        columns = max(rows for _, rows, _, _, _ in places) * self._heads // self._kv_heads
        padded = -(-tokens // STEP) * STEP
        thread_bytes = amx_attention.Scratch(self._head_dim).values + self._copies * padded * self._head_dim * 2
        head = (
            0,
            self._memory.address(thread_bytes * torch.get_num_threads()),
            thread_bytes,
            self._configuration.ctypes.data,
            self._constants.ctypes.data,
            len(places),
            amx_attention.slices(len(places) * self._kv_heads, -(-columns // COLUMNS)),
        )
        numbers = (*head, *[0] * (_HEAD - len(head)), *(number for place in places for number in place))
        return (ctypes.c_int64 * len(numbers))(*numbers)

    def __call__(
        self,
        task: ctypes.Array[ctypes.c_int64],
        layer: int,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out: torch.Tensor,
        norms: HeadNorms | None = None,
    ) -> None:
        """Rotate queries and keys, append keys and values to the caches, and attend to all tokens up to each row's own.

        `qkv`: `[rows, (heads + 2 * kv_heads) * head_dim]`. `cos`, `sin`: `[rows, head_dim]`. All are contiguous
        bfloat16. `norms`: of the query and key heads, before the rotation, or None. Writes the sessions' rows of `out`,
        `[rows, heads * head_dim]`. The first call with norms, and the first one without, compile the loops.
        """
        loops = compiled.as_c_function(self.attend_all(norms is not None))
        norms_at = 0 if norms is None else norms.numbers.data_ptr()
        place(task, layer, qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), norms_at)
        compiled.run(loops, task)


def place(
    task: ctypes.Array[ctypes.c_int64],
    layer: int,
    qkv: int,
    cos: int,
    sin: int,
    out: int,
    norms: int = 0,
    norm_bytes: int = 0,
) -> None:
    """As `token_attention.place`."""
    task[0] = 0
    task[_LAYER:_HEAD] = [layer, qkv, cos, sin, out, norms, norm_bytes]


@numba.njit
def enter_layer(task, layer):
    """Set the next layer in the compiled loops. No thread may be at work on the task."""
    task[0] = 0
    task[_LAYER] = layer
    task[_NORMS] += task[_NORM_BYTES]


def _make_rotate(head_dim: int) -> Any:
    """Return the operation that rotates one head, `[head_dim]`. Arguments: source, cosines, sines, target."""

    @function
    def rotate(v: Vectors, source: Any, cosines: Any, sines: Any, target: Any) -> None:
        for offset in range(0, head_dim, 32):
            first, second = offset, head_dim + offset
            low, low_cos, low_sin = (v.load_wide(at, first) for at in (source, cosines, sines))
            high, high_cos, high_sin = (v.load_wide(at, second) for at in (source, cosines, sines))
            b = v.builder
            v.store(v.narrow(b.fsub(b.fmul(low, low_cos), b.fmul(high, low_sin))), target, first)
            v.store(v.narrow(v.fma(high, high_cos, b.fmul(low, high_sin))), target, second)

    return rotate()


def _make_turn(head_dim: int, with_norms: bool) -> Any:
    """Return the compiled norm, if `with_norms`, and rotation of a head of row `row` of the batch.

    `turn(task, scratch, source, row, is_key, target)`: the head is rounded to bfloat16 after the norm.
    """
    rotate = _make_rotate(head_dim)
    head_bytes = head_dim * 2
    normed_at = amx_attention.Scratch(head_dim).sums  # not in use outside of the attention of a block
    norm_bytes = (LANES + head_dim) * 4  # of a row of `HeadNorms.numbers`

    @numba.njit
    def turn(task, scratch, source, row, is_key, target):
        if with_norms:
            norm_row(source, scratch + normed_at, head_dim, 1, task[_NORMS] + is_key * norm_bytes)
            source = scratch + normed_at
        rotate(source, task[9] + row * head_bytes, task[10] + row * head_bytes, target)

    return turn


def _make_store(heads: int, kv_heads: int, head_dim: int, turn: Any, copy: Any) -> Any:
    """Return the compiled store of a KV head's new keys and values."""
    head_bytes = head_dim * 2
    row_bytes = (heads + 2 * kv_heads) * head_bytes

    @numba.njit
    def store(task, scratch, row, rows, kv_head, keys, values):
        for at in range(rows):
            source = task[8] + (row + at) * row_bytes + (heads + kv_head) * head_bytes
            turn(task, scratch, source, row + at, 1, keys + at * head_bytes)
            copy(source + kv_heads * head_bytes, values + at * head_bytes, 0, 0)

    return store


def _make_take_plain(heads: int, kv_heads: int, head_dim: int, turn: Any, copy: Any) -> Any:
    """Return the compiled store of a KV head's new tokens, which returns the addresses of all its keys and values."""
    head_bytes = head_dim * 2
    store = _make_store(heads, kv_heads, head_dim, turn, copy)

    @numba.njit
    def take(task, scratch, place, kv_head, wide):
        row, rows, address, capacity, stored = place
        size = capacity * head_bytes
        keys = address + (task[_LAYER] * 2 * kv_heads + kv_head) * size
        values = keys + kv_heads * size
        store(task, scratch, row, rows, kv_head, keys + stored * head_bytes, values + stored * head_bytes)
        return keys, values

    return take


def _make_take_int8(heads: int, kv_heads: int, head_dim: int, turn: Any, layers: int) -> Any:
    """As `_make_take_plain`, for caches in int8. The addresses are those of copies in bfloat16 in the scratch."""
    part = amx_attention.Scratch(head_dim)
    rows_at, values_at = part.rows, part.values
    head_bytes = head_dim * 2
    row_bytes = (heads + 2 * kv_heads) * head_bytes
    store, widen = int8_tokens.make_store(head_dim), int8_tokens.make_widen(head_dim)
    shorts_at, bytes_at = compiled.pointer(types.uint16), compiled.pointer(types.int8)
    from_bfloat16 = compiled.wide

    @numba.njit
    def store_one(source, target, scales, token, wide):
        numbers = numba.carray(shorts_at(source), (head_dim,))
        for d in range(head_dim):
            wide[d] = from_bfloat16(numbers[d])
        store(wide, numba.carray(bytes_at(target + token * head_dim), (head_dim,)), scales, token)

    @numba.njit
    def take(task, scratch, place, kv_head, wide):
        row, rows, address, capacity, stored = place
        before = (task[_LAYER] * 2 * kv_heads + kv_head) * capacity  # tokens of all heads before this one
        keys = address + before * head_dim
        values = keys + kv_heads * capacity * head_dim
        key_scales = address + layers * 2 * kv_heads * capacity * head_dim + before * int8_tokens.SCALE_BYTES
        value_scales = key_scales + kv_heads * capacity * int8_tokens.SCALE_BYTES
        for at in range(rows):
            source = task[8] + (row + at) * row_bytes + (heads + kv_head) * head_bytes
            turn(task, scratch, source, row + at, 1, scratch + rows_at)
            store_one(scratch + rows_at, keys, key_scales, stored + at, wide)
            store_one(source + kv_heads * head_bytes, values, value_scales, stored + at, wide)
        copy_bytes = (task[2] - values_at) // 3  # see `SessionAttention.task`
        wide_keys = scratch + values_at + copy_bytes
        wide_values = wide_keys + copy_bytes
        widen(keys, key_scales, wide_keys, stored + rows)
        widen(values, value_scales, wide_values, stored + rows)
        return wide_keys, wide_values

    return take


def _make_pack(head_dim: int, copy: Any) -> Any:
    """Return the compiled packing of the values of a KV head; the last keys are copied, so that reads stay inside."""
    part = amx_attention.Scratch(head_dim)
    values_at, last_values_at, last_keys_at = part.values, part.last_values, part.last_keys
    row_bytes = head_dim * 2
    clear = amx_attention.make_clear(head_dim)
    pack_values = amx_attention.pack_values()
    prefetch_rows = amx_attention.prefetch_rows()

    @numba.njit
    def pack(scratch, keys, values, tokens):
        for start in range(0, tokens, STEP):
            source = values + start * row_bytes
            if start + STEP > tokens:
                for at in range(STEP):
                    if start + at < tokens:
                        copy(keys + (start + at) * row_bytes, scratch + last_keys_at + at * row_bytes, 0, 0)
                        copy(source + at * row_bytes, scratch + last_values_at + at * row_bytes, 0, 0)
                    else:
                        clear(scratch + last_keys_at + at * row_bytes, 0, 0, 0)
                        clear(scratch + last_values_at + at * row_bytes, 0, 0, 0)
                source = scratch + last_values_at
            prefetch_rows(keys + start * row_bytes, row_bytes, 0, 0)
            for at in range(head_dim // 32):
                pack_values(source + at * 64, scratch + values_at + start * row_bytes + at * 2048, row_bytes, 0)

    return pack


def _make_run_block(heads: int, kv_heads: int, head_dim: int, turn: Any, copy: Any) -> Any:
    """Return the compiled attention of 32 columns: query head `column % group` of row `column // group`."""
    part = amx_attention.Scratch(head_dim)
    rows_at, values_at = part.rows, part.values
    last_token_at, state_bytes = amx_attention.LAST_TOKEN, amx_attention.STATE_BYTES
    head_bytes = head_dim * 2
    row_bytes = (heads + 2 * kv_heads) * head_bytes
    group = heads // kv_heads
    pack_queries = amx_attention.make_pack_queries(head_dim)
    clear = amx_attention.make_clear(head_dim)
    attend = amx_attention.make_attend(head_dim)
    int_at = compiled.pointer(types.int32)

    @numba.njit
    def take_queries(task, scratch, row, stored, kv_head, first, count):
        for at in range(COLUMNS):
            column = first + min(at, count - 1)
            target = scratch + rows_at + at * head_bytes
            if at < count:
                head = kv_head * group + column % group
                source = task[8] + (row + column // group) * row_bytes + head * head_bytes
                turn(task, scratch, source, row + column // group, 0, target)
            else:
                clear(target, 0, 0, 0)
            int_at(scratch + at // 16 * state_bytes + last_token_at)[at % 16] = stored + column // group
        pack_queries(scratch)

    @numba.njit
    def run_block(task, scratch, keys, row, stored, tokens, kv_head, first, count):
        take_queries(task, scratch, row, stored, kv_head, first, count)
        end = stored + (first + count - 1) // group + 1
        seen_by_all = stored + first // group + 1
        attend(scratch, keys, scratch + values_at, tokens, end, seen_by_all, (count + 15) // 16, task[4])
        for at in range(count):
            column = first + at
            head = (row + column // group) * heads + kv_head * group + column % group
            copy(scratch + rows_at + at * head_bytes, task[11] + head * head_bytes, 0, 0)

    return run_block


@functools.cache
def _compile(heads: int, kv_heads: int, head_dim: int, int8_layers: int, with_norms: bool) -> Any:
    """Compile the loops, see `SessionAttention.attend_all`.

    A piece of work is a KV head of a session, or a slice of its columns. Slices of one head store the same numbers.
    """
    turn = _make_turn(head_dim, with_norms)
    copy = amx_attention.make_copy(head_dim, head_dim)
    if int8_layers:
        take = _make_take_int8(heads, kv_heads, head_dim, turn, int8_layers)
    else:
        take = _make_take_plain(heads, kv_heads, head_dim, turn, copy)
    pack = _make_pack(head_dim, copy)
    run_block = _make_run_block(heads, kv_heads, head_dim, turn, copy)
    group = heads // kv_heads

    integers_at = compiled.pointer(types.int64)

    @numba.njit
    def attend_all(task_at):
        task = numba.carray(integers_at(task_at), (_HEAD,))
        sessions, slices = task[5], task[6]
        places = numba.carray(integers_at(task_at), (_HEAD + _PLACE * sessions,))[_HEAD:].reshape(sessions, _PLACE)
        scratch = task[1] + compiled.thread_number() * task[2]
        wide = np.empty(head_dim, np.float32)
        amx.configure(task[3])
        while True:
            piece = compiled.next_number(task_at)
            if piece >= sessions * kv_heads * slices:
                break
            kv_head = piece // slices % kv_heads
            place = places[piece // slices // kv_heads]
            row, rows, _, _, stored = place
            keys, values = take(task, scratch, place, kv_head, wide)
            pack(scratch, keys, values, stored + rows)
            for first in range(piece % slices * COLUMNS, rows * group, slices * COLUMNS):
                count = min(COLUMNS, rows * group - first)
                run_block(task, scratch, keys, row, stored, stored + rows, kv_head, first, count)
        amx.release()

    return attend_all
