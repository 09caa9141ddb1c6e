"""What a packed linear may compute before and after its product: a norm of the rows, and an activation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

LANES = 16  # float32 numbers of a vector in compiled loops


class Activation(IntEnum):
    """The function after the product. `GATED_SILU`: silu of the first half of the columns, times the second half."""

    NONE = 0
    GATED_SILU = 1
    QUICK_GELU = 2
    GELU_TANH = 3
    GELU = 4


def activate(rows: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return the activation of `[..., columns]`, computed by torch. `rows` may be changed."""
    if activation is Activation.GATED_SILU:
        gate, up = rows.chunk(2, -1)
        return silu(gate).mul_(up)
    if activation is Activation.QUICK_GELU:
        return torch.sigmoid(1.702 * rows).mul_(rows)
    if activation is Activation.GELU:
        return gelu(rows)
    return gelu(rows, approximate="tanh") if activation is Activation.GELU_TANH else rows


class NormKind(IntEnum):
    """RMS norm, or layer norm with weight and bias."""

    RMS = 1
    LAYER = 2


class RowNorm:
    """The norm of transformers' module `plain`, as a function of rows `[..., hidden]`. On CUDA it is one launch."""

    def __init__(self, plain: Any) -> None:
        """Take an RMS norm for which `is_rms_norm` returns True, or an `nn.LayerNorm` with weight and bias."""
        self._weight: torch.Tensor = plain.weight.detach()
        self._bias: torch.Tensor | None = None
        self.kind = NormKind.RMS
        self._epsilon: float = plain.eps if isinstance(plain, torch.nn.LayerNorm) else plain.variance_epsilon
        if isinstance(plain, torch.nn.LayerNorm):
            self._bias = plain.bias.detach()
            self.kind = NormKind.LAYER

    @functools.cached_property
    def numbers(self) -> torch.Tensor:
        """Float32 numbers for compiled loops on a CPU: 16 times epsilon, the weights and a layer norm's biases."""
        parts = [torch.full((LANES,), self._epsilon), self._weight.float()]
        if self._bias is not None:
            parts.append(self._bias.float())
        return torch.cat(parts)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the norm, computed by torch."""
        if self.kind is NormKind.LAYER:
            return layer_norm(rows, self._weight.shape, self._weight, self._bias, self._epsilon)
        return rms_norm(rows, self._weight.shape, self._weight, self._epsilon)


def is_rms_norm(norm: Any) -> bool:
    """Return whether the module computes what `RowNorm` does for it, tried on a small example."""
    if {name for name, _ in norm.named_parameters()} != {"weight"} or not hasattr(norm, "variance_epsilon"):
        return False
    rows = torch.linspace(-1, 1, 2 * norm.weight.numel(), device=norm.weight.device).to(norm.weight.dtype).view(2, -1)
    # In 16 bits transformers rounds before and after the product with the weight, `RowNorm` after it only.
    allowed = max(1e-5, 2 * torch.finfo(rows.dtype).eps)
    return torch.allclose(norm(rows), RowNorm(norm)(rows), atol=allowed, rtol=allowed)


def same_activation(function: Callable[[torch.Tensor], torch.Tensor], activation: Activation) -> bool:
    """Return whether `function` computes an activation of single numbers, tried on a small example."""
    sample = torch.linspace(-4, 4, 33)
    return torch.allclose(function(sample), activate(sample.clone(), activation), atol=1e-6)
