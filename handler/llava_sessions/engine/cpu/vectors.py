"""Vectors of 16 float32 numbers for loops that Numba compiles.

Left alone, LLVM takes vectors of 8 numbers on CPUs with AVX-512 and does not find the conversions to and from bfloat16.
Vectors are Numba values: `+`, `-` and `*` work on them. Addresses are int64.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16

_FLOAT = ir.FloatType()
_I8S = ir.VectorType(ir.IntType(8), LANES)
_I16S = ir.VectorType(ir.IntType(16), LANES)
_I32S = ir.VectorType(ir.IntType(32), LANES)
_VECTOR = ir.VectorType(_FLOAT, LANES)


class BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no type information
    """LLVM's bfloat, which llvmlite lacks."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


_BFLOATS = ir.VectorType(BFloat(), LANES)


class Vector(types.Type):  # type: ignore[misc]  # Numba has no type information
    """Numba's type of 16 float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="float32 x 16")


VECTOR = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]  # Numba has no type information
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Return an LLVM intrinsic of the module."""
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = align
    return loaded


def _splat(builder: Any, number: Any) -> Any:
    start = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(start, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_I32S, [0] * LANES))


@intrinsic
def splat(_, number):
    """Return 16 times the same float32."""

    def generate(context, builder, signature, arguments):
        return _splat(builder, arguments[0])

    return VECTOR(types.float32), generate


@intrinsic
def zeros(_):
    """Return 16 zeros."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(_VECTOR, [0.0] * LANES)

    return VECTOR(), generate


@intrinsic
def load(_, address):
    """Return 16 float32 numbers from an address."""

    def generate(context, builder, signature, arguments):
        return _load(builder, arguments[0], _VECTOR, 4)

    return VECTOR(types.int64), generate


@intrinsic
def load_bfloat16(_, address):
    """Return 16 bfloat16 numbers from an address as float32."""

    def generate(context, builder, signature, arguments):
        narrow = _load(builder, arguments[0], _I16S, 2)
        shift = ir.Constant(_I32S, [16] * LANES)
        return builder.bitcast(builder.shl(builder.zext(narrow, _I32S), shift), _VECTOR)

    return VECTOR(types.int64), generate


@intrinsic
def load_int8(_, address):
    """Return 16 int8 numbers from an address as float32."""

    def generate(context, builder, signature, arguments):
        narrow = _load(builder, arguments[0], _I8S, 1)
        return builder.sitofp(builder.sext(narrow, _I32S), _VECTOR)

    return VECTOR(types.int64), generate


@intrinsic
def store(_, address, vector):
    """Store 16 float32 numbers."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], builder.inttoptr(arguments[0], _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, VECTOR), generate


@intrinsic
def store_int8(_, address, vector):
    """Store 16 numbers as int8, rounded to nearest, ties to even. They must be between -128 and 127."""

    def generate(context, builder, signature, arguments):
        address, numbers = arguments
        nearest = builder.call(_function(builder, "llvm.rint.v16f32", _VECTOR, _VECTOR), [numbers])
        narrow = builder.trunc(builder.fptosi(nearest, _I32S), _I8S)
        builder.store(narrow, builder.inttoptr(address, _I8S.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, VECTOR), generate


@intrinsic
def store_bfloat16(_, address, vector):
    """Store 16 numbers as bfloat16, rounded to nearest, ties to even. Needs AVX-512 BF16."""

    def generate(context, builder, signature, arguments):
        convert = _function(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", _BFLOATS, _VECTOR)
        narrow = builder.call(convert, [arguments[1]])
        builder.store(narrow, builder.inttoptr(arguments[0], _BFLOATS.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, VECTOR), generate


@intrinsic
def store_bfloat16_pair(_, address, low, high):
    """Store 32 numbers as bfloat16, those of `low` first. Needs AVX-512 BF16."""

    def generate(context, builder, signature, arguments):
        address, low, high = arguments
        kind = ir.VectorType(BFloat(), 2 * LANES)
        convert = _function(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", kind, _VECTOR, _VECTOR)
        narrow = builder.call(convert, [high, low])
        builder.store(narrow, builder.inttoptr(address, kind.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, VECTOR, VECTOR), generate


@intrinsic
def fused(_, a, b, c):
    """Return a * b + c, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.call(_function(builder, "llvm.fma.v16f32", _VECTOR, _VECTOR, _VECTOR, _VECTOR), arguments)

    return VECTOR(VECTOR, VECTOR, VECTOR), generate


@intrinsic
def largest(_, a, b):
    """Return the larger number of each pair."""

    def generate(context, builder, signature, arguments):
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return VECTOR(VECTOR, VECTOR), generate


@intrinsic
def highest(_, vector):
    """Return the largest of the 16 numbers."""

    def generate(context, builder, signature, arguments):
        return builder.call(_function(builder, "llvm.vector.reduce.fmax.v16f32", _FLOAT, _VECTOR), arguments)

    return types.float32(VECTOR), generate


@intrinsic
def total(_, vector):
    """Return the sum of the 16 numbers, in a fixed order of pairs."""

    def generate(context, builder, signature, arguments):
        add = _function(builder, "llvm.vector.reduce.fadd.v16f32", _FLOAT, _FLOAT, _VECTOR)
        return builder.call(add, [_FLOAT(0.0), arguments[0]], fastmath=("reassoc",))

    return types.float32(VECTOR), generate


@intrinsic
def first(_, vector):
    """Return the first number."""

    def generate(context, builder, signature, arguments):
        return builder.extract_element(arguments[0], ir.IntType(32)(0))

    return types.float32(VECTOR), generate


@intrinsic
def exp(_, vector):
    """Return e to the power of each number between -87 and 87, others are clamped. Relative error below 1e-5."""

    def generate(context, builder, signature, arguments):
        def constant(number: float) -> Any:
            return ir.Constant(_VECTOR, [number] * LANES)

        def fma(a: Any, b: Any, c: Any) -> Any:
            return builder.call(_function(builder, "llvm.fma.v16f32", _VECTOR, _VECTOR, _VECTOR, _VECTOR), [a, b, c])

        x = builder.fmul(arguments[0], constant(1.4426950216293335))  # to a power of 2
        for edge, side in ((-126.0, "<"), (126.0, ">")):
            x = builder.select(builder.fcmp_ordered(side, x, constant(edge)), constant(edge), x)
        nearest = builder.call(_function(builder, "llvm.rint.v16f32", _VECTOR, _VECTOR), [x])
        part = builder.fsub(x, nearest)
        power = constant(0.009618129)
        power = fma(part, constant(0.0013333558), power)
        for factor in (0.05550410866, 0.2402265070, 0.6931471806, 1.0):
            power = fma(part, power, constant(factor))
        whole = builder.shl(builder.fptosi(nearest, _I32S), ir.Constant(_I32S, [23] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(power, _I32S), whole), _VECTOR)

    return VECTOR(VECTOR), generate


@intrinsic
def divided(_, a, b):
    """Return a / b."""

    def generate(context, builder, signature, arguments):
        return builder.fdiv(*arguments)

    return VECTOR(VECTOR, VECTOR), generate


def _arithmetic(name: str) -> Any:
    @intrinsic
    def run(_, a, b):
        def generate(context, builder, signature, arguments):
            return getattr(builder, name)(*arguments)

        return VECTOR(VECTOR, VECTOR), generate

    return run


def _overload(python: Any, name: str) -> None:
    run = _arithmetic(name)

    @overload(python)
    def _(a, b):
        if isinstance(a, Vector) and isinstance(b, Vector):
            return lambda a, b: run(a, b)
        return None


_overload(operator.add, "fadd")
_overload(operator.sub, "fsub")
_overload(operator.mul, "fmul")
