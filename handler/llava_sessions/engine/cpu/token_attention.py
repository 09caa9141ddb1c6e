"""Attention of single new tokens of many sessions, compiled: rotation, store and attention in one call per layer.

Torch has no fast call for this on a CPU. With one row of queries most vector lanes of oneDNN's products stay empty, and
each session takes a dozen calls. Numba compiles the loops below when a model is loaded.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from . import amx, compiled, vector_attention, vectors

# Below any score: where the search for the largest one starts.
_LOWEST = np.float32(-3e38)
# Length of a task's head: token count, longest session, layer, the addresses of qkv, cos, sin and out, and a counter of
# the pieces of work that threads have taken.
_HEAD = 8
_LAYER = 2
_COUNTER = 7


class TokenAttention:
    """Attention of single tokens for one shape of heads, in bfloat16 or float32 on the CPU."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Compile the loops. Takes one to two seconds for a new shape."""
        self.attend_all = _compile(heads, kv_heads, head_dim, dtype)
        self._loops = compiled.as_c_function(self.attend_all)

    def task(self, places: list[tuple[int, int, int, int]]) -> ctypes.Array[ctypes.c_int64]:
        """Return the arguments that all layers of one forward share.

        `places`, one per token: its row in the batch, the address and the capacity of its session's KV tensor `[layers,
        2, kv_heads, capacity, head_dim]`, and the number of tokens stored there.
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
    ) -> None:
        """Rotate the tokens' queries and keys, append keys and values to the caches, and attend to all stored tokens.

        `qkv`: `[rows, (heads + 2 * kv_heads) * head_dim]`. `cos`, `sin`: `[rows, head_dim]`. All are contiguous. Writes
        the tokens' rows of `out`, `[rows, heads * head_dim]`.
        """
        place(task, layer, qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
        compiled.run(self._loops, task)


def place(task: ctypes.Array[ctypes.c_int64], layer: int, qkv: int, cos: int, sin: int, out: int) -> None:
    """Set the layer and the addresses of one call in a task."""
    task[_LAYER:_HEAD] = [layer, qkv, cos, sin, out, 0]


@numba.njit
def enter_layer(task, layer):
    """Set the next layer in the compiled loops. No thread may be at work on the task."""
    task[_LAYER] = layer
    task[_COUNTER] = 0


@functools.cache
def _compile(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Any:
    """Compile the loops with all sizes as constants, so that the compiler unrolls and vectorizes them.

    Returns a Numba function of the address of a task.
    """
    is_bfloat16 = dtype == torch.bfloat16
    integers_at = compiled.pointer(types.int64)
    numbers_at = compiled.pointer(types.uint16 if is_bfloat16 else types.float32)
    wide = compiled.wide if is_bfloat16 else compiled.same
    narrow = compiled.narrow if is_bfloat16 else compiled.same
    rotate = _make_rotate(head_dim, wide)
    in_vectors = is_bfloat16 and head_dim % vectors.LANES == 0 and amx.is_available()
    attend = vector_attention.make_attend(head_dim) if in_vectors else _make_attend(head_dim, wide, narrow)
    run_piece = _make_run_piece(heads, kv_heads, head_dim, dtype.itemsize, numbers_at, narrow, rotate, attend)

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


def _make_rotate(head_dim: int, wide: Any) -> Any:
    """Return the compiled rotary embedding of one head, `[head_dim]`, to float32."""
    half = head_dim // 2

    @numba.njit(fastmath=True)
    def rotate(source, cos, sin, out):
        for d in range(half):
            low = wide(source[d])
            high = wide(source[half + d])
            out[d] = low * wide(cos[d]) - high * wide(sin[d])
            out[half + d] = high * wide(cos[half + d]) + low * wide(sin[half + d])

    return rotate


def _make_attend(head_dim: int, wide: Any, narrow: Any) -> Any:
    """Return the compiled attention of one query head to `tokens` stored keys and values `[tokens, head_dim]`."""

    @numba.njit(fastmath=True)
    def attend(query, keys, values, tokens, scores, out):
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
            scores[t], scores[t + 1], scores[t + 2], scores[t + 3] = a, b, c, e
            top = max(top, max(max(a, b), max(c, e)))
        for t in range(fours, tokens):
            a = np.float32(0)
            for d in range(head_dim):
                a += query[d] * wide(keys[t, d])
            scores[t] = a
            top = max(top, a)
        total = np.float32(0)
        for t in range(tokens):
            scores[t] = compiled.exp(scores[t] - top)
            total += scores[t]
        mixed = np.zeros(head_dim, np.float32)
        for t in range(0, fours, 4):
            a, b, c, e = scores[t], scores[t + 1], scores[t + 2], scores[t + 3]
            for d in range(head_dim):
                low = a * wide(values[t, d]) + b * wide(values[t + 1, d])
                mixed[d] += low + c * wide(values[t + 2, d]) + e * wide(values[t + 3, d])
        for t in range(fours, tokens):
            for d in range(head_dim):
                mixed[d] += scores[t] * wide(values[t, d])
        for d in range(head_dim):
            out[d] = narrow(mixed[d] / total)

    return attend


def _make_run_piece(
    heads: int, kv_heads: int, head_dim: int, item: int, numbers_at: Any, narrow: Any, rotate: Any, attend: Any
) -> Any:
    """Return the compiled work on one KV head of one token: store its key and value, attend with its query heads.

    `item`: bytes of a number.
    """
    width = heads + 2 * kv_heads
    group = heads // kv_heads
    scale = np.float32(head_dim**-0.5)

    @numba.njit(fastmath=True)
    def run_piece(task, place, kv_head, query, key, scores):
        _, _, layer, qkv_at, cos_at, sin_at, out_at, _ = task
        row, address, capacity, stored = place
        numbers = numba.carray(numbers_at(qkv_at + row * width * head_dim * item), (width, head_dim))
        cos = numba.carray(numbers_at(cos_at + row * head_dim * item), (head_dim,))
        sin = numba.carray(numbers_at(sin_at + row * head_dim * item), (head_dim,))
        out = numba.carray(numbers_at(out_at + row * heads * head_dim * item), (heads, head_dim))
        size = capacity * head_dim * item
        keys_at = address + (layer * 2 * kv_heads + kv_head) * size
        keys = numba.carray(numbers_at(keys_at), (stored + 1, head_dim))
        values = numba.carray(numbers_at(keys_at + kv_heads * size), (stored + 1, head_dim))
        rotate(numbers[heads + kv_head], cos, sin, key)
        for d in range(head_dim):
            keys[stored, d] = narrow(key[d])
            values[stored, d] = numbers[heads + kv_heads + kv_head, d]
        for at in range(kv_head * group, (kv_head + 1) * group):
            rotate(numbers[at], cos, sin, query)
            for d in range(head_dim):
                query[d] *= scale
            attend(query, keys, values, stored + 1, scores, out[at])

    return run_piece
