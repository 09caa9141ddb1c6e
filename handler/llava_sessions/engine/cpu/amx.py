"""The tile instructions of CPUs with AMX, for loops that Numba compiles.

A tile register has up to 16 rows of 64 bytes. `tile_dot` multiplies the bfloat16 tiles A and B and adds the products to
the float32 tile C: A is `[rows, 32]`, B is `[16, columns, 2]`, that is two consecutive rows of a `[32, columns]` matrix
in one row of pairs, and C is `[rows, columns]`. Each sum is in float32, in the order of the 16 pairs. The instructions
flush denormal numbers to zero. Source: Intel's Architecture Instruction Set Extensions reference, chapter 3.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ROWS = 16  # most rows of a tile
TILE_BYTES = 1024
PAIR_K = 32  # bfloat16 numbers in a row of a tile

_I8 = ir.IntType(8)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_POINTER = _I8.as_pointer()
_NEEDED = ("amx_tile", "amx_bf16", "avx512_bf16", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
# Linux hands the tile registers to a process that asks for them (arch/x86/include/uapi/asm/prctl.h).
_ARCH_PRCTL = 158
_REQUEST_PERMISSION = 0x1023
_TILE_DATA = 18


@functools.cache
def is_available() -> bool:
    """Return whether this CPU has AMX with bfloat16, and AVX-512, and Linux lets this process use them.

    Asks Linux the first time. False also if Numba is told to compile for another CPU.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    found = torch.cpu.get_capabilities()
    # A virtual machine may hide some of them. LLVM ends the process if it has to emit an instruction that is hidden.
    if not all(found.get(name) for name in _NEEDED) or {"NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"} & set(os.environ):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def configuration(rows: int, tiles_with_rows: range = range(8)) -> np.ndarray:
    """Return the operand of `configure`: all tiles have 16 rows of 64 bytes, those of `tiles_with_rows` have `rows`."""
    config = np.zeros(64, np.uint8)
    config[0] = 1  # the palette
    config[16:32:2] = 64  # bytes of a row of each tile
    config[48:56] = [rows if tile in tiles_with_rows else ROWS for tile in range(8)]
    return config


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    """Emit a call of an LLVM intrinsic without a result."""
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        function = ir.Function(builder.module, kind, name)
    builder.call(function, arguments)


@intrinsic
def configure(_, address):
    """Set the shapes of the tiles of this thread from the 64 bytes of `configuration`, and zero them."""

    def generate(context, builder, signature, arguments):
        _call(builder, "llvm.x86.ldtilecfg", builder.inttoptr(arguments[0], _POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def release(_):
    """End this thread's use of tiles. Other code on this thread expects it."""

    def generate(context, builder, signature, arguments):
        _call(builder, "llvm.x86.tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def _memory_op(name: str, tile: int) -> Any:
    @intrinsic
    def run(_, address, stride):
        def generate(context, builder, signature, arguments):
            _call(builder, name, _I8(tile), builder.inttoptr(arguments[0], _POINTER), arguments[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return run


@functools.cache
def tile_load(tile: int) -> Any:
    """Return the intrinsic `(address, stride)` that loads a tile; `stride` in bytes from row to row."""
    return _memory_op("llvm.x86.tileloadd64", tile)


@functools.cache
def tile_store(tile: int) -> Any:
    """Return the intrinsic `(address, stride)` that stores a tile."""
    return _memory_op("llvm.x86.tilestored64", tile)


@functools.cache
def tile_zero(tile: int) -> Any:
    """Return the intrinsic `()` that zeroes a tile."""

    @intrinsic
    def run(_):
        def generate(context, builder, signature, arguments):
            _call(builder, "llvm.x86.tilezero", _I8(tile))
            return context.get_dummy_value()

        return types.void(), generate

    return run


@functools.cache
def tile_dot(c: int, a: int, b: int) -> Any:
    """Return the intrinsic `()` that adds the product of the bfloat16 tiles `a` and `b` to the float32 tile `c`."""

    @intrinsic
    def run(_):
        def generate(context, builder, signature, arguments):
            _call(builder, "llvm.x86.tdpbf16ps", _I8(c), _I8(a), _I8(b))
            return context.get_dummy_value()

        return types.void(), generate

    return run
