"""Linears for the CPU whose weights are packed in the layout that the product reads, in as few bytes as possible.

There are three kinds. Each is tried on a small example before it is used; if neither works, a plain linear is kept.

- Ours, for bfloat16 on CPUs with AMX (amx_linear.py): a norm before and an activation after the product are part of it.
- oneDNN's, for bfloat16 and float32: the operations into which torch's inductor turns frozen linears (in torch:
  `torch/_inductor/fx_passes/mkldnn_fusion.py`, `aten/src/ATen/native/mkldnn/Linear.cpp`).
- FBGEMM's, for float32 (in torch: `aten/src/ATen/native/quantized/cpu/qlinear_dynamic.cpp`): inputs, products and sums
  are float32, and the weight is stored as float16 and widened in registers. Checkpoints of the LLaVA family are
  published in float16 and bfloat16, so half the memory loses no precision, and a decode step, which mostly reads
  weights, takes half the time. A weight that float16 can't represent is packed by oneDNN.

Measurements: bench/README.md, "The CPU's fast paths one by one".
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from ..fused.linear import Pack, PackedLinear
from ..fused.operations import Activation, RowNorm, activate
from .weight_memory import weight_memory

log = logging.getLogger(__name__)

# Number of rows that oneDNN picks the layout for. The layouts for 1, 16 and 256 rows were equally fast.
_ROWS_HINT = 16
# Largest error of a stored weight, relative to the largest weight of its row: a quarter of float32's rounding.
_MAX_RELATIVE_ERROR = 2.0**-26
# A number below 2 to the power of this is finite in float16 after any rounding.
_HALF_EXPONENT = 15


class TileLinear(PackedLinear):
    """A linear of amx_linear.py, in bfloat16.

    The exact GELU follows as a call of its own: as a part of the loops it made all other linears slower too.
    """

    def __init__(self, plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> None:
        super().__init__(plain, activation)
        from . import amx_linear  # it needs Numba

        weight = plain.weight.detach()
        bias = None if plain.bias is None else plain.bias.detach().float()
        if activation is Activation.GATED_SILU:
            weight = amx_linear.interleaved(weight)
            bias = None if bias is None else amx_linear.interleaved(bias)
        self.loops: Any = amx_linear
        self._scales: torch.Tensor | None = None
        self._tiles = weight_memory.copy(self._stored(weight))
        self._bias = bias
        self.result_features = plain.out_features // (2 if activation is Activation.GATED_SILU else 1)

    def _stored(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight `[N, K]` in the order of the loops."""
        tiles: torch.Tensor = self.loops.tiles(weight)
        return tiles

    def fields(self, norm: RowNorm | None) -> Any:
        """Return the linear as a task of the compiled loops, see `amx_linear.fields`."""
        from . import amx_linear

        return amx_linear.fields(
            self._tiles.data_ptr(),
            self.in_features,
            self.out_features,
            self._bias,
            norm,
            Activation.NONE if self.activation is Activation.GELU else self.activation,
            self._scales,
        )

    def forward(
        self, rows: torch.Tensor, added: torch.Tensor | None = None, norm: RowNorm | None = None
    ) -> torch.Tensor:
        if rows.dtype != torch.bfloat16 or (added is not None and added.dtype != torch.bfloat16):
            raise TypeError(f"rows must be bfloat16, got {rows.dtype if added is None else added.dtype}")
        flat = rows.reshape(-1, self.in_features).contiguous()
        out = flat.new_empty((len(flat), self.result_features))
        if not len(flat):
            return out.view(*rows.shape[:-1], self.result_features)  # a tile without rows is an illegal instruction
        more = None if added is None else added.reshape(out.shape).contiguous()
        if self.activation is Activation.GELU:
            self.loops.run(self.fields(norm), flat, out)
            out = activate(out, self.activation)
            out = out if more is None else out.add_(more)
        else:
            self.loops.run(self.fields(norm), flat, out, more)
        return out.view(*rows.shape[:-1], self.result_features)


class OneDNNLinear(PackedLinear):
    """oneDNN's packed linear; the weight keeps its precision, bfloat16 or float32."""

    def __init__(self, plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> None:
        super().__init__(plain, activation)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), _ROWS_HINT)
        self._bias = None if plain.bias is None else plain.bias.detach()

    def _product(self, rows: torch.Tensor, added: torch.Tensor | None) -> Any:
        if added is None:
            return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(rows, added, self._packed, self._bias, "add")


class _HalfLinear(PackedLinear):
    """FBGEMM's float32 linear; the weight is stored as float16, multiplied by `scale`."""

    def __init__(self, plain: torch.nn.Linear, scale: float, activation: Activation = Activation.NONE) -> None:
        super().__init__(plain, activation)
        weight = plain.weight.detach()
        bias = None if plain.bias is None else plain.bias.detach() * scale
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight * scale, bias)
        self._unscale = 1 / scale
        self.weight_bytes = weight.numel() * torch.float16.itemsize

    def _product(self, rows: torch.Tensor, added: torch.Tensor | None) -> Any:
        out = torch.ops.quantized.linear_dynamic_fp16(rows, self._packed)
        if added is not None:
            return torch.add(added, out, alpha=self._unscale)
        return out if self._unscale == 1 else out.mul_(self._unscale)


@torch.inference_mode()
def pack(plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> PackedLinear:
    """Return the fastest packed linear for a `packable` one. Of `plain` it keeps a reference to the bias only."""
    found: PackedLinear | None = None
    if plain.weight.dtype == torch.bfloat16 and works(_pack_as_tiles, torch.bfloat16):
        found = _pack_as_tiles(plain, activation)
    elif plain.weight.dtype == torch.float32 and works(_pack_as_half, torch.float32):
        found = _pack_as_half(plain, activation)
    return found or OneDNNLinear(plain, activation)


@torch.inference_mode()
def pack_all(module: torch.nn.Module, pack: Pack = pack) -> int:
    """Replace every `packable` linear below `module` by a `PackedLinear` and return their number.

    The plain weights are freed one by one. A weight with another reference (a tied head) stays in memory as well.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.Linear) and packable(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, pack(child))
    return len(found)


def packable(module: Any) -> bool:
    """Return whether the module is a plain linear on the CPU, in a precision in which torch packs linears here."""
    return type(module) is torch.nn.Linear and module.weight.device.type == "cpu" and can_pack(module.weight.dtype)


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether oneDNN's packed linears exist for `dtype` (bfloat16 or float32) and compute `linear`'s numbers."""
    return works(OneDNNLinear, dtype)


@functools.cache
@torch.inference_mode()
def works(make: Callable[..., PackedLinear | None], dtype: torch.dtype) -> bool:
    """Return whether a kind of packed linear runs on this CPU and computes `linear`'s numbers on a small example.

    The result is cached for the process; `works.cache_clear()` discards it.
    """
    try:
        if not torch.backends.mkldnn.is_available() or dtype not in (torch.bfloat16, torch.float32):
            return False
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        return _matches_linear(make, dtype)
    except Exception:  # such as a missing op of torch or an error of the compiler: the next kind is used
        log.info("linears_missing kind=%s", make.__name__, exc_info=True)
        return False


def _matches_linear(make: Callable[..., PackedLinear | None], dtype: torch.dtype) -> bool:
    """Compare a packed linear, with and without its additions, with `torch.nn.functional.linear`."""
    plain = torch.nn.Linear(96, 64, dtype=dtype)
    # Small weights, most of which float16 represents only with a scale.
    plain.weight.copy_((torch.linspace(-1, 1, 64 * 96).bfloat16() * 2**-9).reshape(64, 96))
    plain.bias.copy_(torch.linspace(1, -1, 64))
    rms: Any = torch.nn.RMSNorm(96, dtype=dtype)
    rms.variance_epsilon = 1e-6
    norms = (None, RowNorm(torch.nn.LayerNorm(96, dtype=dtype)), RowNorm(rms))
    for count in (3, 20, 40):
        rows = (torch.linspace(-1, 1, count * 96) * 2**9).reshape(1, count, 96).to(dtype)
        for activation in Activation:
            packed = make(plain, activation)
            if packed is None:
                return False
            for before in norms:
                expected = linear(rows if before is None else before(rows), plain.weight, plain.bias)
                expected = activate(expected, activation).float()
                added = torch.ones_like(expected).to(dtype)
                atol, rtol = (0.05, 0.02) if dtype == torch.bfloat16 else (1e-4, 1e-4)
                alone = packed(rows, None, before).float()
                more = packed(rows, added, before).float() - 1
                if not all(torch.allclose(one, expected, atol=atol, rtol=rtol) for one in (alone, more)):
                    return False
    return True


def _pack_as_tiles(plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> PackedLinear | None:
    """Return None if the shape has no whole tiles, or without AMX."""
    return TileLinear(plain, activation) if takes_tiles(plain) else None


def takes_tiles(plain: torch.nn.Linear) -> bool:
    """Return whether this CPU has AMX and the weight consists of whole tiles. Raises ImportError without Numba."""
    from . import amx, amx_linear

    whole = plain.out_features % amx_linear.COLUMNS == 0 and plain.in_features % amx_linear.INPUTS == 0
    return whole and amx.is_available()


def _pack_as_half(plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> PackedLinear | None:
    scale = _half_scale(plain.weight.detach())
    return None if scale is None else _HalfLinear(plain, scale, activation)


def _half_scale(weight: torch.Tensor) -> float | None:
    """Return the power of two by which a float32 weight `[out, in]` fits into float16, or None if there is none.

    float16 has enough mantissa bits for any bfloat16 but a smaller range of exponents. With the largest weight just
    below the upper end of the range, bfloat16 numbers down to 2**-32 of it are exact. The rounding of smaller ones must
    be below float32's rounding of the larger ones' products; this is checked row by row.
    """
    allowed = weight.abs().amax(1) * _MAX_RELATIVE_ERROR
    largest = weight.abs().max().item()
    for scale in (1.0, 2.0 ** (_HALF_EXPONENT - math.frexp(largest)[1])):
        lost = (weight * scale).half().float().div_(scale).sub_(weight).abs_().amax(1)
        if (lost <= allowed).all():
            return scale
    return None
