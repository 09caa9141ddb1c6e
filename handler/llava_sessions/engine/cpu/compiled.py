"""What the compiled loops of this package share: threads, addresses, number formats and vectorized functions.

Numba compiles the loops when a model is loaded. Torch's own OpenMP threads run them, because a second thread pool would
compete with torch's for the cores.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

# Found through torch's library, so that it is the OpenMP runtime that torch itself is linked with.
_openmp = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
_openmp.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_openmp.GOMP_parallel.restype = None
# Callable from compiled loops.
thread_number = _openmp.omp_get_thread_num
thread_count = _openmp.omp_get_num_threads
for _function in (thread_number, thread_count):
    _function.argtypes = ()
    _function.restype = ctypes.c_int
wait_for_threads = _openmp.GOMP_barrier
wait_for_threads.argtypes = ()
wait_for_threads.restype = None

_LOG2_E = np.float32(1.4426950408889634)

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_CACHE_LINE = 64


def run(loops: Any, task: ctypes.Array[Any]) -> None:
    """Call a Numba C function once on each of torch's threads, with the address of `task`; wait for all of them."""
    _openmp.GOMP_parallel(loops.address, ctypes.addressof(task), torch.get_num_threads(), 0)


@functools.cache
def as_c_function(function: Any) -> Any:
    """Return a Numba function of one address as a C function, which `run` takes."""
    return numba.cfunc(types.void(types.int64))(function.py_func)


def pointer(number: Any) -> Any:
    """Return a Numba intrinsic that converts an int64 address to a pointer to `number`, a Numba type."""

    @intrinsic
    def at(_, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.int64), generate

    return at


@intrinsic
def wide(_, number):
    """Convert bfloat16, which Numba handles as uint16, to float32: the upper half of its bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _I32), _I32(16)), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def narrow(_, number):
    """Convert float32 to bfloat16, rounding to nearest, ties to even."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, _I32(16)), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _two_to(_, whole):
    """Return 2 to the power of a whole float32 above -127, by writing its exponent bits."""

    def generate(context, builder, signature, arguments):
        exponent = builder.add(builder.fptosi(arguments[0], _I32), _I32(127))
        return builder.bitcast(builder.shl(exponent, _I32(23)), ir.FloatType())

    return types.float32(types.float32), generate


@numba.njit(fastmath=True, inline="always")
def exp(x):
    """Return e to the power of x, x <= 0, by a polynomial: unlike the C library's, it is vectorized."""
    x = max(x * _LOG2_E, np.float32(-126))
    whole = np.floor(x + np.float32(0.5))
    part = x - whole
    power = np.float32(0.0096181291) + part * np.float32(0.0013333558)
    power = np.float32(0.2402265070) + part * (np.float32(0.0555041087) + part * power)
    return _two_to(whole) * (np.float32(1) + part * (np.float32(0.6931471806) + part * power))


@intrinsic
def next_number(_, address):
    """Add 1 to the int64 at an address, atomically; return the number before. Threads take their work by it."""

    def generate(context, builder, signature, arguments):
        counter = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", counter, _I64(1), "monotonic")

    return types.int64(types.int64), generate


def _make_prefetch(locality: int) -> Any:
    """Return the intrinsic `(address, size)`. `locality`: of LLVM's prefetch."""

    @intrinsic
    def run(_, address, size):
        if not isinstance(size, types.IntegerLiteral):
            raise RequireLiteralValue("size")

        def generate(context, builder, signature, arguments):
            pointer = ir.IntType(8).as_pointer()
            name = "llvm.prefetch.p0"
            kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
            fetch = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            for offset in range(0, size.literal_value, _CACHE_LINE):
                line = builder.inttoptr(builder.add(arguments[0], _I64(offset)), pointer)
                builder.call(fetch, [line, _I32(0), _I32(locality), _I32(1)])  # for a read, data
            return context.get_dummy_value()

        return types.void(types.int64, size), generate

    return run


# Fetch `size` bytes, a constant, from an address on into the L1 or the L2 cache. Any address is allowed.
prefetch = _make_prefetch(3)
prefetch_l2 = _make_prefetch(2)


@numba.njit(inline="always")
def same(number):
    """Return float32 as it is, where bfloat16 would be converted."""
    return number
