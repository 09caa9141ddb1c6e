"""Linears and norms of a decoder layer on CUDA, for `fused.layer.FusedLayer`.

With `ragged.RaggedAttention` a layer takes 10 launches in a decode step, whatever the number of sessions: two norms,
four products with their additions inside, two kernels of attention, and SiLU and product of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from ..fused.layer import fuse_layers
from ..fused.linear import Pack, PackedLinear
from ..fused.operations import Activation, RowNorm, is_rms_norm

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class DeviceLinear(PackedLinear):
    """A linear of the device's own library, as `torch.nn.functional.linear`.

    Writes the result into `added` if it is given: the addition is then part of the product. Out of place torch would
    copy `added` first.
    """

    def __init__(self, plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> None:
        super().__init__(plain, activation)
        self._weight = plain.weight.detach()
        self._bias = None if plain.bias is None else plain.bias.detach()

    def _product(self, rows: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        if added is None:
            return linear(rows, self._weight, self._bias)
        if self._bias is not None:
            return added.add_(linear(rows, self._weight, self._bias))
        return added.addmm_(rows, self._weight.t())


class DeviceNorm(torch.nn.Module):
    """The norm after the last layer, in one launch. Rows as in `RowNorm`."""

    def __init__(self, plain: Any) -> None:
        """Take an RMS norm for which `is_rms_norm` returns True."""
        super().__init__()
        self._norm = RowNorm(plain)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the norm of the rows."""
        return self._norm(rows)


@torch.inference_mode()
def pack(plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> PackedLinear:
    """Return a `DeviceLinear` that shares the weight of `plain`."""
    return DeviceLinear(plain, activation)


def packable(module: Any) -> bool:
    """Return whether the module is a plain linear in a precision that the fused layers take."""
    return type(module) is torch.nn.Linear and module.weight.dtype in _DTYPES


@torch.inference_mode()
def fuse(text: Any, pack: Pack = pack) -> bool:
    """Replace the decoder layers of a transformers text model, and its last norm, by fused ones.

    If a layer does not fit, change nothing and return False. Takes memory for the joined weights of one layer.
    """
    if not fuse_layers(text.layers, pack, packable):
        return False
    if is_rms_norm(text.norm):
        text.norm = DeviceNorm(text.norm)
    return True
