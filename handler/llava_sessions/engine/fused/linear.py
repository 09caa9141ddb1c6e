"""What a fused layer asks of its linears: a norm before the product, and an activation or an addition after it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .operations import Activation, RowNorm, activate


class PackedLinear(torch.nn.Module):
    """Replacement of an `nn.Linear`, with an activation after it. Its outputs equal the plain ones up to the last bits.

    The packed weight is neither a parameter nor a buffer, because an opaque tensor can't be moved, cast or saved.
    """

    def __init__(self, plain: torch.nn.Linear, activation: Activation = Activation.NONE) -> None:
        super().__init__()
        self.in_features = plain.in_features
        self.out_features = plain.out_features
        self.weight_bytes: int = plain.weight.nbytes
        self.activation = activation

    def extra_repr(self) -> str:
        """Return the text that `print` shows, as `nn.Linear.extra_repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, weight_bytes={self.weight_bytes}"

    def forward(
        self, rows: torch.Tensor, added: torch.Tensor | None = None, norm: RowNorm | None = None
    ) -> torch.Tensor:
        """Map `[..., in_features]` to `[..., out_features]`, half as many with `GATED_SILU`.

        `norm`: of the rows, before the product. `added`, of the result's shape, is added after the activation. Some
        kinds of linears write the result into `added` and return it.
        """
        if norm is not None:
            rows = norm(rows)
        if self.activation is Activation.NONE:
            return self._product(rows, added)
        out = activate(self._product(rows, None), self.activation)
        return out if added is None else out.add_(added)

    def _product(self, rows: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        """Return the linear of the rows, plus `added`."""
        raise NotImplementedError


Pack = Callable[..., PackedLinear]  # takes a plain linear and an activation, by default none
