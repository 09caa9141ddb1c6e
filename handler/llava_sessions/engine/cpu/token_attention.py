"""Owns attention of single new tokens, one of each of many sessions: rotation, store and attention in one call a layer.

Must not know sessions, models or batches. Torch has no fast call for it on a CPU: with one row of queries the vector
lanes of oneDNN's products stay mostly empty, and it takes a dozen calls a session. Numba compiles the loops below
when a model is loaded, and the OpenMP threads that torch computes with run them: a second pool of threads would
fight with them for the cores.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Through torch's library, whichever OpenMP that is linked with.
_openmp = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
_run = _openmp.GOMP_parallel
_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_run.restype = None
_thread, _threads = _openmp.omp_get_thread_num, _openmp.omp_get_num_threads
for _count in (_thread, _threads):
    _count.argtypes = ()
    _count.restype = ctypes.c_int

_LEAST = np.float32(-3e38)
_LOG2_E = np.float32(1.4426950408889634)


class TokenAttention:
    """Attention of single tokens for one shape of heads, in bfloat16 or float32 on the CPU."""

    # What a task begins with: tokens, the most that a session will hold, layer, and four addresses; the places follow.
    _HEAD = 7

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Compiles; takes a second or two."""
        self._loops = _compile(heads, kv_heads, head_dim, dtype, self._HEAD)

    def task(self, places: list[tuple[int, int, int, int]]) -> ctypes.Array:
        """What the calls of one forward have in common: for each token its row of the batch, and of its session's KV
        `[layers, 2, kv_heads, capacity, head_dim]` the address, the capacity, and how many tokens it holds already.
        """
        longest = max(stored for *_, stored in places) + 1
        numbers = (len(places), longest, *[0] * (self._HEAD - 2), *(number for place in places for number in place))
        return (ctypes.c_int64 * len(numbers))(*numbers)

    def __call__(
        self,
        task: ctypes.Array,
        layer: int,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Rotate the tokens' queries and keys, store keys and values behind what is stored, and attend to all of it.

        `qkv`: `[rows, (heads + 2 * kv_heads) * head_dim]`; `cos` and `sin`: `[rows, head_dim]`; all contiguous. Writes
        the tokens' rows of `out`, `[rows, heads * head_dim]`.
        """
        task[2 : self._HEAD] = (layer, qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
        _run(self._loops.address, ctypes.addressof(task), torch.get_num_threads(), 0)


_I32 = ir.IntType(32)


def _pointer(number: types.Type):
    """What makes an address a pointer to numbers of a type."""

    @intrinsic
    def at(_, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.int64), generate

    return at


@intrinsic
def _wide(_, number):
    """bfloat16, which Numba knows as uint16, -> float32: the upper half of its bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _I32), _I32(16)), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _narrow(_, number):
    """float32 -> bfloat16, to the nearest, ties to even."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, _I32(16)), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _two_to(_, whole):
    """2 to the power of a whole float32 above -127, by its exponent's bits."""

    def generate(context, builder, signature, arguments):
        exponent = builder.add(builder.fptosi(arguments[0], _I32), _I32(127))
        return builder.bitcast(builder.shl(exponent, _I32(23)), ir.FloatType())

    return types.float32(types.float32), generate


@numba.njit(fastmath=True, inline="always")
def _exp(x):
    """e to the power of x for x up to 0, as a polynomial: unlike the library's, it runs in vector lanes."""
    x = max(x * _LOG2_E, np.float32(-126))
    whole = np.floor(x + np.float32(0.5))
    part = x - whole
    power = np.float32(0.0096181291) + part * np.float32(0.0013333558)
    power = np.float32(0.2402265070) + part * (np.float32(0.0555041087) + part * power)
    return _two_to(whole) * (np.float32(1) + part * (np.float32(0.6931471806) + part * power))


@numba.njit(inline="always")
def _same(number):
    return number


@functools.cache
def _compile(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, head: int):
    """The loops, with sizes as constants: the compiler unrolls and vectorizes them."""
    if dtype == torch.bfloat16:
        numbers_at, wide, narrow = _pointer(types.uint16), _wide, _narrow
    else:
        numbers_at, wide, narrow = _pointer(types.float32), _same, _same
    item, width = dtype.itemsize, heads + 2 * kv_heads
    half, group, scale = head_dim // 2, heads // kv_heads, np.float32(head_dim**-0.5)

    @numba.njit(fastmath=True)
    def rotate(source, cos, sin, out):
        for d in range(half):
            low, high = wide(source[d]), wide(source[half + d])
            out[d] = low * wide(cos[d]) - high * wide(sin[d])
            out[half + d] = high * wide(cos[half + d]) + low * wide(sin[half + d])

    @numba.njit(fastmath=True)
    def attend(query, keys, values, tokens, scores, out):
        # Four tokens at a time: sums that do not wait for each other.
        fours, top = tokens - tokens % 4, _LEAST
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
            scores[t] = _exp(scores[t] - top)
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

    @numba.cfunc(types.void(types.CPointer(types.int64)))
    def loops(pointer):
        tokens, longest, layer, qkv_at, cos_at, sin_at, out_at = numba.carray(pointer, (head,))
        places = numba.carray(pointer, (head + 4 * tokens,))[head:].reshape(tokens, 4)
        query, key = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
        scores = np.empty(longest, np.float32)
        # A KV head of a session is a piece of work; each thread takes every so many-th.
        for piece in range(_thread(), tokens * kv_heads, _threads()):
            row, address, capacity, stored = places[piece // kv_heads]
            kv_head = piece % kv_heads
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

    return loops
