"""Owns linears as a CPU computes them fast: packed as the product reads them, in as few bytes as hold the weights.

Must not know sessions, layers or transformers' classes. There are two kinds, each tried on a small example before it is
used; where neither works, a plain linear stays what it is.

- oneDNN's, for bfloat16 and float32: what torch's inductor makes of frozen linears (in torch:
  `torch/_inductor/fx_passes/mkldnn_fusion.py`, `aten/src/ATen/native/mkldnn/Linear.cpp`).
- FBGEMM's, for float32 (in torch: `aten/src/ATen/native/quantized/cpu/qlinear_dynamic.cpp`): inputs, products and sums
  are float32, and the weight lies in memory as float16, widened in registers. Checkpoints of the LLaVA family are
  published in float16 and bfloat16, so nothing is given up for half the memory and, in a decode step, which is the
  reading of the weights, half the time. A weight that half its bytes can't hold is packed by oneDNN.

What it gains. In bfloat16 (bench model, 2 cores of an AMD EPYC with avx512_bf16, best of a run; plain, oneDNN's):
decode of 1 chat 47, 30 ms; of 16 chats 269, 247; a follow-up of 45 tokens 95, 70; vision tower and projector 731, 625.
In float32 (2 cores with AVX2, median of alternating runs over 6 layers; plain, oneDNN's, FBGEMM's): 1 row 22, 26, 11
ms; 4 rows 58, 26, 11; 16 rows 65, 38, 23; 45 rows 105, 68, 52; 256 rows 382, 337, 289; 640 rows 870, 799, 689.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch.nn.functional import linear

# A hint at how many rows a linear mostly sees; the layouts for 1, 16 and 256 measured the same.
_ROWS_HINT = 16
# Of the largest weight of its row, by so much may a weight be off: a quarter of what float32 rounds a product by.
_LOST_AT_MOST = 2.0**-26
# A float16 below 2 to the power of this is a finite number, however it was rounded.
_HALF_EXPONENT = 15


class PackedLinear(torch.nn.Module):
    """Takes the place of an `nn.Linear`, and gives its numbers up to the last bits."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        # What it keeps is neither a parameter nor a buffer: opaque tensors can't be moved, cast or saved.
        self.weight_bytes: int = plain.weight.nbytes

    def extra_repr(self) -> str:
        """What `print` shows of it, as for `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, weight_bytes={self.weight_bytes}"


class _OneDNNLinear(PackedLinear):
    """The weight in its own precision, bfloat16 or float32."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__(plain)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), _ROWS_HINT)
        self._bias = None if plain.bias is None else plain.bias.detach()

    def forward(self, rows: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`; `added`, of that shape, is added before it is rounded."""
        if added is None:
            return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(rows, added, self._packed, self._bias, "add")


class _HalfLinear(PackedLinear):
    """A float32 linear whose weight lies in memory as float16, times `scale`."""

    def __init__(self, plain: torch.nn.Linear, scale: float) -> None:
        super().__init__(plain)
        weight = plain.weight.detach()
        bias = None if plain.bias is None else plain.bias.detach() * scale
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight * scale, bias)
        self._unscale = 1 / scale
        self.weight_bytes = weight.numel() * torch.float16.itemsize

    def forward(self, rows: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`; `added`, of that shape, is added."""
        out = torch.ops.quantized.linear_dynamic_fp16(rows, self._packed)
        if added is not None:
            return torch.add(added, out, alpha=self._unscale)
        return out if self._unscale == 1 else out.mul_(self._unscale)


@torch.inference_mode()
def pack(plain: torch.nn.Linear) -> PackedLinear:
    """The packed linear that computes a `packable` one fastest. It holds nothing of the plain one but its bias."""
    found = None
    if plain.weight.dtype == torch.float32 and _works(_half, torch.float32):
        found = _half(plain)
    return found or _OneDNNLinear(plain)


@torch.inference_mode()
def pack_all(module: torch.nn.Module) -> int:
    """Replace every `packable` linear below `module` by a `PackedLinear`; returns how many.

    Plain weights are freed one by one; one that something else holds too (a tied head) stays there as well. Returns 0,
    with nothing changed, where there is none.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if packable(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, pack(child))
    return len(found)


def packable(module: torch.nn.Module) -> bool:
    """Whether it is a plain linear on the CPU, in a precision in which this torch packs linears."""
    found = type(module) is torch.nn.Linear
    return found and module.weight.device.type == "cpu" and can_pack(module.weight.dtype)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's packed linears for `dtype`, bfloat16 or float32, and they compute what `linear`
    computes.
    """
    return _works(_OneDNNLinear, dtype)


@functools.cache
@torch.inference_mode()
def _works(make: Callable[[torch.nn.Linear], PackedLinear | None], dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU have such linears, with the numbers of `linear` on a small example."""
    try:
        fits = torch.backends.mkldnn.is_available() and dtype in (torch.bfloat16, torch.float32)
        if not fits or (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return False
        plain = torch.nn.Linear(32, 64, dtype=dtype)
        # As halves hold them, most with the help of a scale.
        plain.weight.copy_((torch.linspace(-1, 1, 64 * 32).bfloat16() * 2**-9).reshape(64, 32))
        plain.bias.copy_(torch.linspace(1, -1, 64))
        rows = (torch.linspace(-1, 1, 3 * 32) * 2**9).reshape(1, 3, 32).to(dtype)
        wanted, packed = linear(rows, plain.weight, plain.bias).float(), make(plain)
        got = packed(rows).float(), packed(rows, torch.ones_like(wanted).to(dtype)).float() - 1
        allowed = {"atol": 0.05, "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
        return all(torch.allclose(one, wanted, **allowed) for one in got)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def _half(plain: torch.nn.Linear) -> _HalfLinear | None:
    scale = _half_scale(plain.weight.detach())
    return None if scale is None else _HalfLinear(plain, scale)


def _half_scale(weight: torch.Tensor) -> float | None:
    """The power of two that makes a float32 weight `[out, in]` one that float16 holds; None where none does.

    float16 has bits enough for any bfloat16, but a smaller range of exponents. With the largest weight just below the
    upper end of that range, bfloat16 numbers down to 2**-32 of it are held exactly, and the rounding of those still
    smaller is lost beside what float32 rounds the larger ones' products by; that is looked at row by row.
    """
    allowed = weight.abs().amax(1) * _LOST_AT_MOST
    largest = weight.abs().max().item()
    for scale in (1.0, 2.0 ** (_HALF_EXPONENT - math.frexp(largest)[1])):
        lost = (weight * scale).half().float().div_(scale).sub_(weight).abs_().amax(1)
        if (lost <= allowed).all():
            return scale
    return None
