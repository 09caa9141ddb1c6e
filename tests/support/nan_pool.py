"""A pool of KV memory whose blocks hold NaN: any read beyond a cache's tokens changes the numbers."""

from __future__ import annotations

import math

import torch

from llava_sessions.engine.kv_pool import KVBlock, KVPool


class NanPool(KVPool):
    """A pool in which each block holds NaN, in float32 and bfloat16, when a cache takes it."""

    def take(self, size: int) -> KVBlock:
        block = super().take(size)
        # The bits of two bfloat16 NaN, which together are a float32 NaN.
        block.memory.view(torch.bfloat16).fill_(math.nan)
        return block
