"""RMS norms of each query head and of each key head, before the rotary embedding, as in Qwen3's attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.functional import rms_norm

from .operations import LANES, is_rms_norm

# Names of the norms among the children of an attention module.
NAMES = frozenset({"q_norm", "k_norm"})


class HeadNorms:
    """The norms of one layer's attention. The norm of a head of `head_dim` numbers is computed in float32.

    `weights`: `[2, head_dim]` in the model's precision, contiguous: of query heads, then of key heads. `epsilon`: of
    both norms. The source is transformers' `Qwen3RMSNorm`.
    """

    def __init__(self, weights: torch.Tensor, epsilon: float) -> None:
        self.weights = weights
        self.epsilon = epsilon

    @functools.cached_property
    def numbers(self) -> torch.Tensor:
        """Float32 `[2, 16 + head_dim]` for compiled loops on a CPU: of query heads, then of key heads, 16 times epsilon
        and the weights, as in `RowNorm.numbers`.
        """
        return torch.cat([torch.full((2, LANES), self.epsilon), self.weights.float()], 1)

    def __call__(self, heads: torch.Tensor, query_heads: int) -> None:
        """Replace the heads by their norms, computed by torch.

        `heads`: `[rows, query_heads + kv_heads, head_dim]`, the query heads first. May be a view, such as a part of the
        result of a layer's first linear.
        """
        parts = heads.split((query_heads, heads.shape[1] - query_heads), 1)
        for part, weight in zip(parts, self.weights, strict=True):
            part.copy_(rms_norm(part, weight.shape, weight, self.epsilon))


def of_attention(attention: Any) -> HeadNorms | None:
    """Return the head norms of an attention module that `fused.layer.fits` accepts, or None if it has none."""
    if not hasattr(attention, "q_norm"):
        return None
    norms = (attention.q_norm, attention.k_norm)
    return HeadNorms(torch.stack([norm.weight.detach() for norm in norms]), norms[0].variance_epsilon)


def are_head_norms(attention: Any) -> bool:
    """Return whether `q_norm` and `k_norm` of an attention module compute what `HeadNorms` does.

    They must be RMS norms over `head_dim`, with one epsilon. Each is tried on a small example, see `is_rms_norm`.
    """
    norms = (attention.q_norm, attention.k_norm)
    return (
        all(is_rms_norm(norm) and norm.weight.shape == (attention.head_dim,) for norm in norms)
        and len({norm.variance_epsilon for norm in norms}) == 1
    )
