"""Attention for training in bfloat16 on a CPU: two batched products and a softmax in bfloat16.

Measured with 64 pictures of 82 tokens: the backward pass of PyTorch's fused attention takes half of a training step.
A step with this function takes half as long; for the language model it is a quarter faster than `eager`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "shapes_training"


@functools.lru_cache(maxsize=400)
def _causal_mask(tokens: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Return 0 or minus infinity, [1, groups * tokens, tokens]."""
    return torch.full((tokens, tokens), float("-inf")).triu(1).to(dtype).repeat(groups, 1)[None]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **ignored: object
) -> tuple[Tensor, None]:
    """Return attention's output [batch, tokens, heads, width]; `mask` is ignored: padding must be on the right."""
    batch, heads, tokens, width = query.shape
    shared = key.shape[1]
    groups = heads // shared
    query = query.reshape(batch * shared, groups * tokens, width)
    key, value = (part.reshape(batch * shared, tokens, width) for part in (key, value))
    if module.is_causal:
        bias = _causal_mask(tokens, groups, query.dtype)
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scaling)
    else:
        scores = torch.bmm(query * scaling, key.transpose(1, 2))
    mixed = torch.bmm(scores.softmax(-1), value)
    return mixed.view(batch, heads, tokens, width).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
