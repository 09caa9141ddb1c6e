"""Linears with int8 weights on CUDA: half the memory of 16-bit weights, and half the bytes to read in a decode step.

Rows are float16, bfloat16 or float32. There are two ways through a linear:

- Up to `FEW_ROWS` rows, a Triton kernel (int8_kernels.py) that reads the weights as int8. The numbers of a row do not
  depend on the other rows of the call.
- For more rows, and for all without Triton, parts of the weight are dequantized to the dtype of the rows into a scratch
  of `SCRATCH_BYTES`, from which torch's own product reads them.

The kernel multiplies the int8 numbers themselves and scales the sums; the other way rounds each dequantized weight to
the dtype of the rows. Therefore the two differ by the rounding of that dtype: a token that decodes in a step with a
prefill has slightly other numbers than alone, as with cuBLAS's products of different sizes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from ..formats.int8 import dequantize, quantize
from ..fused.linear import Pack, PackedLinear
from ..fused.operations import Activation, RowNorm, activate
from .layers import DeviceLinear

log = logging.getLogger(__name__)

FEW_ROWS = 64
# Temporary memory of a product of many rows. Torch's allocator gives every linear the same block again.
SCRATCH_BYTES = 64 * 2**20
# Rows of a weight that are quantized at once, so that float32 copies stay small while a model loads.
_QUANTIZED_BYTES = 64 * 2**20
_WARPS = 4


@dataclass(frozen=True)
class Blocks:
    """The part of the result that a program of the kernel computes, and how many blocks of inputs it loads ahead."""

    rows: int
    columns: int
    inputs: int
    stages: int


def blocks(rows: int, is_gated: bool, has_tensor_cores: bool) -> Blocks:
    """Return the blocks for this number of rows.

    With tensor cores, few columns for each program, so that 4,096 columns occupy all multiprocessors of a large GPU;
    and at most 48 KB of shared memory, so that two programs fit on a multiprocessor of compute capability 8.6 or 8.9.
    At most 32 rows: from 64 on Triton would use other instructions on newer GPUs, with other sums.
    """
    if not has_tensor_cores:
        return Blocks(4 if rows <= 4 else 16, 64, 32, 3)
    if rows <= 16:
        return Blocks(16, 32, 128, 5 if is_gated else 6)
    return Blocks(32, 32, 128, 4 if is_gated else 5)


class Int8DeviceLinear(PackedLinear):
    """A linear with int8 weights. As `DeviceLinear`, it writes the result into `added` if it is given."""

    def __init__(
        self,
        plain: torch.nn.Linear,
        activation: Activation = Activation.NONE,
        *,
        device: torch.device,
        has_kernel: bool,
    ) -> None:
        """Quantize the weight of `plain` on `device`, part by part. `plain` may be on the host.

        `has_kernel`: whether the kernel runs on the device, see `kernel_works`.
        """
        super().__init__(plain, activation)
        weight = plain.weight.detach()
        self._numbers = torch.empty(weight.shape, dtype=torch.int8, device=device)
        self._scales = torch.empty(len(weight), device=device)
        step = max(_QUANTIZED_BYTES // (weight.shape[1] * torch.float32.itemsize), 1)
        for start in range(0, len(weight), step):
            part = slice(start, start + step)
            self._numbers[part], self._scales[part] = quantize(weight[part].to(device))
        self._bias = None if plain.bias is None else plain.bias.detach().to(device)
        self._has_kernel = has_kernel and activation in (Activation.NONE, Activation.GATED_SILU)
        self._has_tensor_cores = has_tensor_cores(device, plain.weight.dtype)
        self.weight_bytes = self._numbers.nbytes + self._scales.nbytes

    @property
    def is_finite(self) -> bool:
        """Whether each number of the weight was finite."""
        return bool(self._scales.isfinite().all())

    def forward(
        self, rows: torch.Tensor, added: torch.Tensor | None = None, norm: RowNorm | None = None
    ) -> torch.Tensor:
        flat = (rows if norm is None else norm(rows)).reshape(-1, self.in_features).contiguous()
        is_gated = self.activation is Activation.GATED_SILU
        columns = self.out_features // (2 if is_gated else 1)
        more = None if added is None else added.view(-1, columns)
        if self._has_kernel and 0 < len(flat) <= FEW_ROWS:
            size = blocks(len(flat), is_gated, self._has_tensor_cores)
            out = few_rows(flat, self._numbers, self._scales, self._bias, more, is_gated, size)
        else:
            out = self._many_rows(flat, more)
        return out.view(*rows.shape[:-1], columns)

    def _many_rows(self, flat: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        """Return the linear of `[rows, in_features]` by torch's products with dequantized parts of the weight."""
        if added is not None and self._bias is None and self.activation is Activation.NONE:
            return self._product(flat, added)
        out = activate(self._product(flat, None), self.activation)
        return out if added is None else added.add_(out)

    def _product(self, flat: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        """Return `added` plus the product, in the memory of `added`; for None return the product plus the bias."""
        out = flat.new_empty((len(flat), self.out_features)) if added is None else added
        step = max(SCRATCH_BYTES // (self.in_features * flat.itemsize), 1)
        scratch = flat.new_empty((min(step, self.out_features), self.in_features))
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            numbers = self._numbers[part]
            weight = torch.mul(numbers, self._scales[part, None], out=scratch[: len(numbers)]).t()
            if added is not None:
                out[:, part].addmm_(flat, weight)
            elif self._bias is not None:
                torch.addmm(self._bias[part], flat, weight, out=out[:, part])
            else:
                torch.mm(flat, weight, out=out[:, part])
        return out


def few_rows(
    rows: torch.Tensor,
    numbers: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    added: torch.Tensor | None,
    is_gated: bool,
    size: Blocks,
) -> torch.Tensor:
    """Return the linear of `[rows, inputs]`, at least one, in one launch. See `int8_kernels.multiply`.

    Writes the result into `added` if it is given. Raises ImportError without Triton.
    """
    from . import int8_kernels  # it needs Triton, which only CUDA's wheels of torch bring

    count, inputs = rows.shape
    columns = len(numbers) // (2 if is_gated else 1)
    out = rows.new_empty((count, columns)) if added is None else added
    grid = (-(-count // size.rows), -(-columns // size.columns))
    int8_kernels.multiply[grid](
        rows,
        numbers,
        scales,
        scales if bias is None else bias,
        out,
        out,
        count,
        columns,
        inputs,
        HAS_BIAS=bias is not None,
        HAS_ADDED=added is not None,
        IS_GATED=is_gated,
        BLOCK_ROWS=size.rows,
        BLOCK_COLUMNS=size.columns,
        BLOCK_INPUTS=size.inputs,
        num_warps=_WARPS,
        num_stages=size.stages,
    )
    return out


@functools.cache
def has_tensor_cores(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether Triton multiplies rows of this dtype on the device's tensor cores."""
    if dtype == torch.float32 or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def check(dtype: torch.dtype) -> None:
    """Raise ValueError if weights in int8 are not possible on a GPU with this dtype of inputs and results."""
    if dtype not in (torch.float16, torch.bfloat16):
        found = str(dtype).removeprefix("torch.")
        raise ValueError(f"`llava.weights` int8 needs dtype auto, float16 or bfloat16 on a GPU, got {found}")


def pack_for(device: torch.device, dtype: torch.dtype) -> Pack:
    """Return the `Pack` that makes linears with int8 weights on a device, for rows of this dtype.

    It takes plain linears on any device. A weight with a number that is not finite keeps its precision.
    """
    has_kernel = kernel_works(device, dtype)

    @torch.inference_mode()
    def pack(plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> PackedLinear:
        packed = Int8DeviceLinear(plain, activation, device=device, has_kernel=has_kernel)
        return packed if packed.is_finite else DeviceLinear(plain.to(device), activation)

    return pack


@functools.cache
@torch.inference_mode()
def kernel_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel runs on the device and computes the numbers of the dequantized weights.

    Compiles the kernel for all sizes of blocks. The result is cached for the process. If it is False a warning is
    logged.
    """
    try:
        if all(_matches(device, dtype, count) for count in (3, 16, 33)):
            return True
        log.warning("int8_kernel_wrong dtype=%s", str(dtype).removeprefix("torch."))
    except Exception:  # any error of Triton, the C compiler or the device: torch's products are used instead
        log.warning("int8_kernel_missing", exc_info=True)
    return False


def _matches(device: torch.device, dtype: torch.dtype, count: int) -> bool:
    """Compare the kernel with torch's linear of the dequantized weights, in float32, on an example.

    The example is compiled as the linears of a layer are: with a bias, with an addition, with an activation, or plain.
    """
    inputs, columns = 160, 96
    wave = torch.linspace(-9, 9, 2 * columns * inputs).mul(37).sin()
    numbers, scales = quantize(wave.view(2 * columns, inputs) * torch.linspace(0.5, 2, 2 * columns)[:, None])
    rows = wave[-count * inputs :].view(count, inputs).to(dtype)
    bias = wave[:columns].to(dtype)
    added = torch.linspace(-1, 1, count * columns).view(count, columns).to(dtype)
    allowed = max(1e-5, 2 * torch.finfo(dtype).eps)
    for is_gated, given, more in ((False, None, None), (False, bias, None), (False, None, added), (True, None, None)):
        width = columns * (2 if is_gated else 1)
        weight = dequantize(numbers[:width], scales[:width], torch.float32)
        expected = linear(rows.float(), weight, None if given is None else given.float())
        expected = activate(expected, Activation.GATED_SILU if is_gated else Activation.NONE)
        if more is not None:
            expected += more.float()
        got = few_rows(
            rows.to(device),
            numbers[:width].to(device),
            scales[:width].to(device),
            None if given is None else given.to(device),
            None if more is None else more.to(device, copy=True),
            is_gated,
            blocks(count, is_gated, has_tensor_cores(device, dtype)),
        )
        if not (got.cpu().float() - expected).abs().max() <= allowed * expected.abs().max():
            return False
    return True


def move_others(model: Any, device: torch.device) -> None:
    """Move a transformers model from the host to a device, without the linears of its language model and its head.

    `pack_for`'s function moves these one by one, so that the device never holds all weights in 16 bits.
    """
    found = list(_linears(model))
    for parent, name, _ in found:
        setattr(parent, name, torch.nn.Identity())
    model.to(device)
    for parent, name, child in found:
        setattr(parent, name, child)


def pack_all(model: Any, pack: Pack) -> None:
    """Replace the plain linears of a transformers model's language model, and its head."""
    for parent, name, child in list(_linears(model)):
        setattr(parent, name, pack(child))


def freed_bytes(model: Any) -> int:
    """Return the bytes that int8 weights would free of a loaded transformers model: 0 if all linears have them."""
    text = model.model.language_model
    plain = [part for part in (*text.modules(), model.lm_head) if isinstance(part, (torch.nn.Linear, DeviceLinear))]
    held = sum(part.weight_bytes if isinstance(part, DeviceLinear) else part.weight.nbytes for part in plain)
    if plain and getattr(model.lm_head, "weight", None) is text.embed_tokens.weight:
        held -= model.lm_head.weight.nbytes  # the table of embeddings stays
    return held - sum(part.out_features * (part.in_features + torch.float32.itemsize) for part in plain)


def _linears(model: Any) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    """Yield the plain linears of the language model and the head, each with its parent and its name there."""
    parents = [*model.model.language_model.modules(), model]
    for parent in parents:
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear:
                yield parent, name, child
