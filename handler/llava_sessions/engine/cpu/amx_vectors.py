"""Operations on 512-bit vectors for loops that Numba compiles, as straight-line code.

LLVM vectorizes Numba's loops with 256 bits. The operations here state 512-bit vectors explicitly. Each takes addresses
as int64 and needs AVX-512, which all CPUs with AMX have. Addresses may have any alignment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .vectors import BFloat

LANES = 16

I32 = ir.IntType(32)
I64 = ir.IntType(64)
FLOAT = ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(I32, LANES)
SHORTS = ir.VectorType(ir.IntType(16), LANES)
MORE_SHORTS = ir.VectorType(ir.IntType(16), 2 * LANES)
BFLOATS = ir.VectorType(BFloat(), 2 * LANES)
# 2 to the power of 0 to 1 with a relative error of 1e-4, lowest power first.
_POWER = (0.99992495, 0.69583497, 0.22606651, 0.07802344)


class Vectors:
    """Emits vector instructions at the position of an LLVM builder."""

    def __init__(self, builder: Any) -> None:
        """Use a builder."""
        self.builder = builder

    def load(self, address: Any, offset: int, kind: Any = FLOATS) -> Any:
        """Load a vector from `offset` bytes behind an address."""
        return self.builder.load(self._pointer(address, offset, kind), align=1)

    def store(self, value: Any, address: Any, offset: int) -> None:
        """Store a vector."""
        self.builder.store(value, self._pointer(address, offset, value.type), align=1)

    def _pointer(self, address: Any, offset: int, kind: Any) -> Any:
        return self.builder.inttoptr(self.builder.add(address, I64(offset)), kind.as_pointer())

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """Call an LLVM intrinsic."""
        function = self.builder.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [argument.type for argument in arguments])
            function = ir.Function(self.builder.module, kind, name)
        return self.builder.call(function, arguments)

    def splat(self, number: float) -> Any:
        """Return a vector of one float32 number."""
        return ir.Constant(FLOATS, [number] * LANES)

    def ints(self, number: int) -> Any:
        """Return a vector of one int32 number."""
        return ir.Constant(INTS, [number] * LANES)

    def everywhere(self, value: Any) -> Any:
        """Return a vector whose lanes all are the scalar `value`."""
        kind = ir.VectorType(value.type, LANES)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        return self.shuffle(first, first, [0] * LANES)

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Return the lanes of `a` and `b` by number."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c, rounded once."""
        return self.call("llvm.fma.v16f32", FLOATS, a, b, c)

    def larger(self, a: Any, b: Any) -> Any:
        """Return the larger numbers of both."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def power_of_two(self, x: Any, more: float = 0.0) -> Any:
        """Return 2 to the power of a finite `x`, multiplied by (1 + a number between more / 2 and more)."""
        all_lanes = ir.IntType(16)(0xFFFF)
        part = self.call("llvm.x86.avx512.mask.reduce.ps.512", FLOATS, x, I32(1), self.splat(0), all_lanes, I32(4))
        power = self.splat(_POWER[3])
        for factor in (_POWER[2], _POWER[1], _POWER[0] + more):
            power = self.fma(power, part, self.splat(factor))
        return self.call("llvm.x86.avx512.mask.scalef.ps.512", FLOATS, power, x, self.splat(0), all_lanes, I32(4))

    def add_pairs(self, total: Any, a: Any, b: Any) -> Any:
        """Add the products of two vectors of 16 bfloat16 pairs, summed over each pair."""
        pairs = [self.builder.bitcast(value, BFLOATS) for value in (a, b)]
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, *pairs)

    def load_wide(self, address: Any, offset: int) -> Any:
        """Load 16 bfloat16 numbers and convert them to float32."""
        extended = self.builder.zext(self.load(address, offset, SHORTS), INTS)
        return self.builder.bitcast(self.builder.shl(extended, self.ints(16)), FLOATS)

    def narrow(self, numbers: Any) -> Any:
        """Convert 16 float32 numbers to bfloat16, as int16, rounding to nearest, ties to even."""
        bits = self.builder.bitcast(numbers, INTS)
        odd = self.builder.and_(self.builder.lshr(bits, self.ints(16)), self.ints(1))
        rounded = self.builder.add(bits, self.builder.add(odd, self.ints(0x7FFF)))
        return self.builder.trunc(self.builder.lshr(rounded, self.ints(16)), SHORTS)


# Lanes of `shuffle` that combine two vectors within each 128 bits: 32-bit numbers, then 64-bit numbers, then 128 bits.
_IN_FOURS = range(0, LANES, 4)
_LOW = [lane for at in _IN_FOURS for lane in (at, LANES + at, at + 1, LANES + at + 1)]
_HIGH = [lane + 2 for lane in _LOW]
_EVEN = [lane for at in _IN_FOURS for lane in (at, at + 1, LANES + at, LANES + at + 1)]
_ODD = [lane + 2 for lane in _EVEN]
_FIRSTS = [at + lane for at in range(0, 2 * LANES, 8) for lane in range(4)]
_SECONDS = [lane + 4 for lane in _FIRSTS]


def transposed(v: Vectors, rows: list[Any]) -> list[Any]:
    """Return the transposed matrix of 16 rows of 16 numbers of 32 bits."""
    fours = []  # per 4 rows: column j of each of the four 128-bit lanes
    for at in _IN_FOURS:
        a, b, c, d = rows[at : at + 4]
        ab = (v.shuffle(a, b, _LOW), v.shuffle(a, b, _HIGH))
        cd = (v.shuffle(c, d, _LOW), v.shuffle(c, d, _HIGH))
        fours.append([v.shuffle(ab[j // 2], cd[j // 2], _ODD if j % 2 else _EVEN) for j in range(4)])
    out: list[Any] = [None] * LANES
    for j in range(4):
        a, b, c, d = (four[j] for four in fours)
        for parity, lanes in enumerate((_FIRSTS, _SECONDS)):
            x = v.shuffle(a, b, lanes)
            y = v.shuffle(c, d, lanes)
            out[4 * parity + j] = v.shuffle(x, y, _FIRSTS)
            out[4 * (parity + 2) + j] = v.shuffle(x, y, _SECONDS)
    return out


def prefetch(v: Vectors, address: Any, size: int, locality: int) -> None:
    """Fetch `size` bytes into the L1 cache (`locality` 3) or the L2 cache (2). Any address is allowed."""
    for offset in range(0, size, 64):
        line = v.builder.inttoptr(v.builder.add(address, I64(offset)), ir.IntType(8).as_pointer())
        v.call("llvm.prefetch.p0", ir.VoidType(), line, I32(0), I32(locality), I32(1))


def operation(emit: Callable[..., Any]) -> Any:
    """Return the intrinsic of four int64 numbers for `emit(vectors, a, b, c, d)`, which emits its instructions.

    The intrinsic returns the int64 that `emit` returns, or 0.
    """

    @intrinsic
    def run(_, a, b, c, d):
        def generate(context, builder, signature, arguments):
            result = emit(Vectors(builder), *arguments)
            return I64(0) if result is None else result

        return types.int64(types.int64, types.int64, types.int64, types.int64), generate

    return run


_SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.int64)
_functions: list[Any] = []  # keeps their machine code


def function(emit: Callable[..., Any]) -> Callable[[], Any]:
    """As `operation`, but return a function without arguments that compiles it once and returns it.

    Compiled loops call it by its address. A long operation inside the loops would be optimized again with each of them.
    """
    inlined = operation(emit)

    @functools.cache
    def compile_once() -> Any:
        @numba.cfunc(_SIGNATURE)
        def call(a, b, c, d):
            return inlined(a, b, c, d)

        _functions.append(call)
        return call.ctypes

    return compile_once
