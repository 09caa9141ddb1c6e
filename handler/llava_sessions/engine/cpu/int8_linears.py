"""Linears for the CPU whose weights are stored as int8: half the memory of bfloat16, and fewer bytes to read.

The quantization is symmetric, with one float32 scale per output column, rounded to nearest. Inputs stay bfloat16, and
the int8 numbers are widened to it without loss. There are two kinds:

- Ours, for bfloat16 on CPUs with AMX (amx_int8.py): a weight is widened in the caches while it is multiplied.
- Torch's, for bfloat16: an operation that reads int8 (in torch: `aten/src/ATen/native/cpu/int8mm_kernel.cpp`) for few
  rows; for more rows the weight is widened for the call. In float32 torch's operation is slower than a plain linear.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from ..formats.int8 import quantize
from ..fused.linear import PackedLinear
from ..fused.operations import Activation
from . import linears
from .linears import TileLinear

# Most rows for which torch's operation on int8 is faster than widening the weight.
_FEW_ROWS = 32


class Int8TileLinear(TileLinear):
    """A linear of amx_int8.py, for inputs and results in bfloat16."""

    def _stored(self, weight: torch.Tensor) -> torch.Tensor:
        from . import amx_int8  # it needs Numba

        numbers, scales = quantize(weight)
        self.loops = amx_int8
        self._scales = scales * amx_int8.DIVISOR
        self.weight_bytes = numbers.nbytes + scales.nbytes
        return amx_int8.tiles(numbers)


class Int8Linear(PackedLinear):
    """A linear with int8 weights from torch's operations, for inputs and results in bfloat16."""

    def __init__(self, plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> None:
        super().__init__(plain, activation)
        self._numbers, self._scales = quantize(plain.weight.detach())
        self._ones = torch.ones(plain.out_features, dtype=plain.weight.dtype)
        self._bias = None if plain.bias is None else plain.bias.detach().float()
        self.weight_bytes = self._numbers.nbytes + self._scales.nbytes

    def _product(self, rows: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        flat = rows.reshape(-1, self.in_features)
        if len(flat) <= _FEW_ROWS:
            # Torch takes scales in bfloat16 only.
            out = torch._weight_int8pack_mm(flat.contiguous(), self._numbers, self._ones).float()
        else:
            out = linear(flat, self._numbers.to(rows.dtype)).float()
        out *= self._scales
        if self._bias is not None:
            out += self._bias
        out = out.view(*rows.shape[:-1], self.out_features)
        return out.to(rows.dtype) if added is None else (out + added).to(rows.dtype)


@torch.inference_mode()
def pack(plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> PackedLinear:
    """Return a linear with int8 weights for a `packable` one in bfloat16, as `linears.pack`.

    A weight with a number that is not finite keeps its precision.
    """
    if not plain.weight.isfinite().all():
        return linears.pack(plain, activation)
    found: PackedLinear | None = None
    if linears.works(_pack_as_tiles, torch.bfloat16):
        found = _pack_as_tiles(plain, activation)
    return found or Int8Linear(plain, activation)


def check(dtype: torch.dtype) -> None:
    """Raise ValueError if weights in int8 are not possible on this CPU with this dtype of inputs and results."""
    if dtype != torch.bfloat16 or not linears.works(Int8Linear, dtype):
        found = str(dtype).removeprefix("torch.")
        raise ValueError(f"`llava.weights` int8 needs a CPU with bfloat16 and dtype auto or bfloat16, got {found}")


def _pack_as_tiles(plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> PackedLinear | None:
    """Return None if the shape has no whole tiles, or without AMX."""
    return Int8TileLinear(plain, activation) if linears.takes_tiles(plain) else None
