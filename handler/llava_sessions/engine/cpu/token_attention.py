"""Attention of single new tokens of many sessions, compiled: one call per layer norms, rotates, stores and attends.

Torch has no fast call for this on a CPU. With one row of queries most vector lanes of oneDNN's products stay empty, and
each session takes a dozen calls. Numba compiles the loops below when a model is loaded.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import types

from ..fused.head_norms import HeadNorms
from . import amx, compiled, int8_tokens, vector_attention, vectors

# Below any score: where the search for the largest one starts.
_LOWEST = np.float32(-3e38)
# Length of a task's head: token count, longest session, layer, the addresses of qkv, cos, sin and out, a counter of the
# pieces of work that threads have taken, the address of the layer's head norms, and the bytes of a layer's head norms.
_HEAD = 10
_LAYER = 2
_COUNTER = 7
_NORMS = 8
_NORM_BYTES = 9


class TokenAttention:
    """Attention of single tokens for one shape of heads, in bfloat16 or float32 on the CPU."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        layers: int = 0,
    ) -> None:
        """Compile nothing yet, see `attend_all`.

        `dtype`: of queries, new keys and values, and results. `kv_dtype`: of the caches, as in `KVShape`. `layers`: of
        a cache, needed for int8 only.
        """
        self._shape = (heads, kv_heads, head_dim, dtype, layers if kv_dtype == torch.int8 else 0)

    def attend_all(self, with_norms: bool) -> Any:
        """Return the loops: a Numba function of the address of a task.

        `with_norms`: of query and key heads. The first call for a new shape compiles the loops, which takes one to two
        seconds. Raises what Numba raises.
        """
        return _compile(*self._shape, with_norms)

    def task(self, places: list[tuple[int, int, int, int]]) -> ctypes.Array[ctypes.c_int64]:
        """Return the arguments that all layers of one forward share.

        `places`, one per token: its row in the batch, the address and the capacity of its session's KV cache, in the
        layout of `KVShape`, and the number of tokens stored there.
        """
        longest = max(stored for *_, stored in places) + 1
        numbers = (len(places), longest, *[0] * (_HEAD - 2), *(number for place in places for number in place))
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
        """Rotate the tokens' queries and keys, append keys and values to the caches, and attend to all stored tokens.

        `qkv`: `[rows, (heads + 2 * kv_heads) * head_dim]`. `cos`, `sin`: `[rows, head_dim]`. All are contiguous.
        `norms`: of the tokens' query and key heads, before the rotation, or None. Writes the tokens' rows of `out`,
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
    """Set the layer and the addresses of one call in a task.

    `norms`: of `HeadNorms.numbers` of the layer, or 0. `norm_bytes`: from there to those of the next layer, needed by
    `enter_layer` only.
    """
    task[_LAYER:_HEAD] = [layer, qkv, cos, sin, out, 0, norms, norm_bytes]


@numba.njit
def enter_layer(task, layer):
    """Set the next layer in the compiled loops. No thread may be at work on the task."""
    task[_LAYER] = layer
    task[_COUNTER] = 0
    task[_NORMS] += task[_NORM_BYTES]


class _Format(NamedTuple):
    """A number format for compiled loops.

    `at`: makes a pointer of an address. `item`: bytes of a number. `wide`, `narrow`: to and from float32.
    """

    at: Any
    item: int
    wide: Any
    narrow: Any


class _Stored(NamedTuple):
    """How caches hold keys and values, for compiled loops.

    `at`, `item`, `wide`: as in `_Format`, without the scale. `layers`: of a cache with scales after the numbers, else
    0. `times_scale`, `store`: see int8_tokens.py.
    """

    at: Any
    item: int
    wide: Any
    layers: int
    times_scale: Any
    store: Any


def _format(dtype: torch.dtype) -> _Format:
    if dtype == torch.bfloat16:
        return _Format(compiled.pointer(types.uint16), 2, compiled.wide, compiled.narrow)
    return _Format(compiled.pointer(types.float32), 4, compiled.same, compiled.same)


def _stored(head_dim: int, numbers: _Format, int8_layers: int) -> _Stored:
    """Return how keys and values of a format are stored: in int8 if `int8_layers` is not 0, else as they are."""
    if int8_layers:
        at = compiled.pointer(types.int8)
        store = int8_tokens.make_store(head_dim)
        return _Stored(at, 1, int8_tokens.wide, int8_layers, int8_tokens.times_scale, store)
    narrow = numbers.narrow

    @numba.njit
    def store_plain(source, target, scales, token):
        for d in range(head_dim):
            target[d] = narrow(source[d])

    return _Stored(numbers.at, numbers.item, numbers.wide, 0, int8_tokens.unchanged, store_plain)


@functools.cache
def _compile(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, int8_layers: int, with_norms: bool) -> Any:
    """Compile the loops with all sizes as constants, so that the compiler unrolls and vectorizes them.

    `int8_layers`: layers of a cache in int8, or 0. Returns a Numba function of the address of a task.
    """
    numbers = _format(dtype)
    stored = _stored(head_dim, numbers, int8_layers)
    in_vectors = dtype == torch.bfloat16 and head_dim % vectors.LANES == 0 and amx.is_available()
    if in_vectors:
        attend = vector_attention.make_attend(head_dim, is_int8=int8_layers > 0)
    else:
        attend = _make_attend(head_dim, numbers.narrow, stored.wide, stored.times_scale)
    rotate = (_make_norm_and_rotate if with_norms else _make_rotate)(head_dim, numbers)
    run_piece = _make_run_piece(heads, kv_heads, head_dim, numbers, stored, rotate, attend)
    integers_at = compiled.pointer(types.int64)

    @numba.njit
    def attend_all(address):
        numbers = numba.carray(integers_at(address), (_HEAD,))
        tokens = numbers[0]
        places = numba.carray(integers_at(address), (_HEAD + 4 * tokens,))[_HEAD:].reshape(tokens, 4)
        query = np.empty(head_dim, np.float32)
        key = np.empty(head_dim, np.float32)
        scores = np.empty(numbers[1] + vectors.LANES, np.float32)
        # A KV head of a session is one piece of work. Each thread takes the next one.
        while True:
            piece = compiled.next_number(address + 8 * _COUNTER)
            if piece >= tokens * kv_heads:
                break
            run_piece(numbers, places[piece // kv_heads], piece % kv_heads, query, key, scores)

    return attend_all


def _make_rotate(head_dim: int, numbers: _Format) -> Any:
    """Return the compiled rotary embedding of one head, `[head_dim]`, to float32. `norm` is not used."""
    half = head_dim // 2
    wide = numbers.wide

    @numba.njit(fastmath={"contract"})  # only this: numbers that are not finite must stay so
    def rotate(source, norm, cos, sin, out):
        for d in range(half):
            low = wide(source[d])
            high = wide(source[half + d])
            out[d] = low * wide(cos[d]) - high * wide(sin[d])
            out[half + d] = high * wide(cos[half + d]) + low * wide(sin[half + d])

    return rotate


def _make_norm_and_rotate(head_dim: int, numbers: _Format) -> Any:
    """As `_make_rotate`, after the norm of the head. `norm`: address of the head's row of `HeadNorms.numbers`.

    The numbers after the norm are rounded as torch stores them.
    """
    half = head_dim // 2
    wide, narrow = numbers.wide, numbers.narrow
    floats_at = compiled.pointer(types.float32)

    @numba.njit(fastmath={"contract", "reassoc"}, error_model="numpy")  # not more, as in `_make_rotate`
    def rotate(source, norm, cos, sin, out):
        given = numba.carray(floats_at(norm), (vectors.LANES + head_dim,))
        weights = given[vectors.LANES :]
        squares = np.float32(0)
        for d in range(head_dim):
            squares += wide(source[d]) * wide(source[d])
        factor = np.float32(1) / np.sqrt(squares / np.float32(head_dim) + given[0])
        for d in range(half):
            low = wide(narrow(wide(source[d]) * factor * weights[d]))
            high = wide(narrow(wide(source[half + d]) * factor * weights[half + d]))
            out[d] = low * wide(cos[d]) - high * wide(sin[d])
            out[half + d] = high * wide(cos[half + d]) + low * wide(sin[half + d])

    return rotate


def _make_attend(head_dim: int, narrow: Any, wide: Any, times_scale: Any) -> Any:
    """Return the compiled attention of one query head to `tokens` stored keys and values `[tokens, head_dim]`.

    `narrow`: of results, see `_Format`. `wide`, `times_scale`: of stored numbers, see `_Stored`.
    """

    @numba.njit(fastmath=True, error_model="numpy")
    def attend(query, keys, values, key_scales, value_scales, tokens, scores, out):
        # Four tokens per iteration: four sums that do not depend on each other.
        fours = tokens - tokens % 4
        top = _LOWEST
        for t in range(0, fours, 4):
            a, b, c, e = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for d in range(head_dim):
                a += query[d] * wide(keys[t, d])
                b += query[d] * wide(keys[t + 1, d])
                c += query[d] * wide(keys[t + 2, d])
                e += query[d] * wide(keys[t + 3, d])
            a, b = times_scale(a, key_scales, t), times_scale(b, key_scales, t + 1)
            c, e = times_scale(c, key_scales, t + 2), times_scale(e, key_scales, t + 3)
            scores[t], scores[t + 1], scores[t + 2], scores[t + 3] = a, b, c, e
            top = max(top, max(max(a, b), max(c, e)))
        for t in range(fours, tokens):
            a = np.float32(0)
            for d in range(head_dim):
                a += query[d] * wide(keys[t, d])
            a = times_scale(a, key_scales, t)
            scores[t] = a
            top = max(top, a)
        total = np.float32(0)
        for t in range(tokens):
            scores[t] = compiled.exp(scores[t] - top)
            total += scores[t]
        mixed = np.zeros(head_dim, np.float32)
        for t in range(0, fours, 4):
            a, b = times_scale(scores[t], value_scales, t), times_scale(scores[t + 1], value_scales, t + 1)
            c, e = times_scale(scores[t + 2], value_scales, t + 2), times_scale(scores[t + 3], value_scales, t + 3)
            for d in range(head_dim):
                low = a * wide(values[t, d]) + b * wide(values[t + 1, d])
                mixed[d] += low + c * wide(values[t + 2, d]) + e * wide(values[t + 3, d])
        for t in range(fours, tokens):
            a = times_scale(scores[t], value_scales, t)
            for d in range(head_dim):
                mixed[d] += a * wide(values[t, d])
        for d in range(head_dim):
            out[d] = narrow(mixed[d] / total)

    return attend


def _make_run_piece(
    heads: int, kv_heads: int, head_dim: int, numbers: _Format, stored_as: _Stored, rotate: Any, attend: Any
) -> Any:
    """Return the compiled work on one KV head of one token: store its key and value, attend with its query heads."""
    width = heads + 2 * kv_heads
    group = heads // kv_heads
    scale = np.float32(head_dim**-0.5)
    at, item, wide, narrow = numbers
    stored_at, stored_item, _, layers, _, store = stored_as
    key_norm = (vectors.LANES + head_dim) * 4  # bytes of a row of `HeadNorms.numbers`

    @numba.njit  # without fastmath, which would change the division of `store`
    def run_piece(task, place, kv_head, query, key, scores):
        _, _, layer, qkv_at, cos_at, sin_at, out_at, _, norms, _ = task
        row, address, capacity, stored = place
        new = numba.carray(at(qkv_at + row * width * head_dim * item), (width, head_dim))
        cos = numba.carray(at(cos_at + row * head_dim * item), (head_dim,))
        sin = numba.carray(at(sin_at + row * head_dim * item), (head_dim,))
        out = numba.carray(at(out_at + row * heads * head_dim * item), (heads, head_dim))
        before = (layer * 2 * kv_heads + kv_head) * capacity  # tokens of all heads before this one
        keys = numba.carray(stored_at(address + before * head_dim * stored_item), (stored + 1, head_dim))
        values_at = address + (before + kv_heads * capacity) * head_dim * stored_item
        values = numba.carray(stored_at(values_at), (stored + 1, head_dim))
        scales = address + layers * 2 * kv_heads * capacity * head_dim * stored_item
        key_scales = scales + before * int8_tokens.SCALE_BYTES
        value_scales = key_scales + kv_heads * capacity * int8_tokens.SCALE_BYTES
        rotate(new[heads + kv_head], norms + key_norm, cos, sin, key)
        for d in range(head_dim):
            key[d] = wide(narrow(key[d]))  # as torch stores it after its own rotation
            query[d] = wide(new[heads + kv_heads + kv_head, d])  # the value: no query is in use yet
        store(key, keys[stored], key_scales, stored)
        store(query, values[stored], value_scales, stored)
        for head in range(kv_head * group, (kv_head + 1) * group):
            rotate(new[head], norms, cos, sin, query)
            for d in range(head_dim):
                query[d] *= scale
            attend(query, keys, values, key_scales, value_scales, stored + 1, scores, out[head])

    return run_piece
