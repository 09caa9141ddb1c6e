"""Which kernel torch 2.13 chooses for `scaled_dot_product_attention` on a CUDA device, and what the engine calls.

The rules are those of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, without dropout and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

HALVES = (torch.float16, torch.bfloat16)
CUDNN, FLASH, EFFICIENT, MATH = "cudnn", "flash", "efficient", "math"


@dataclass(frozen=True)
class Call:
    """What the choice of a kernel depends on. `has_mask`: a tensor of visible tokens, not torch's `CausalBias`."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    has_mask: bool
    rows: int
    tokens: int

    @property
    def is_grouped(self) -> bool:
        """Whether there are fewer KV heads than query heads."""
        return self.heads != self.kv_heads


def backend(call: Call, capability: tuple[int, int], cudnn: bool = False) -> str:
    """Return the kernel of a call. `cudnn`: cuDNN's attention is not turned off.

    cuDNN comes first on Hopper and Blackwell. Flash attention takes 16-bit numbers from compute capability 8.0 on, no
    mask, and grouped heads. Memory-efficient attention takes a mask and float32, and no grouped heads. The rest is
    computed in float32 with all scores in memory ("math").
    """
    if cudnn and capability >= (9, 0) and call.dtype in HALVES and call.head_dim % 8 == 0:
        return CUDNN
    if capability >= (8, 0) and call.dtype in HALVES and not call.has_mask and call.head_dim <= 256:
        return FLASH
    # bfloat16 needs compute capability 8.0 here too.
    has_type = call.dtype != torch.bfloat16 or capability >= (8, 0)
    if has_type and not call.is_grouped and call.head_dim % (4 if call.dtype == torch.float32 else 8) == 0:
        return EFFICIENT
    return MATH


class RecordedCalls(TorchFunctionMode):
    """Notes every call of `scaled_dot_product_attention`, before torch replaces a `CausalBias`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[Call] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is scaled_dot_product_attention:
            query, keys = args[:2]
            mask = options.get("attn_mask")
            has_mask = mask is not None and not isinstance(mask, CausalBias)
            assert options.get("enable_gqa", False) or query.shape[1] == keys.shape[1]
            self.calls.add(
                Call(
                    dtype=query.dtype,
                    heads=query.shape[1],
                    kv_heads=keys.shape[1],
                    head_dim=query.shape[3],
                    has_mask=has_mask,
                    rows=query.shape[2],
                    tokens=keys.shape[2],
                )
            )
        return func(*args, **options)
