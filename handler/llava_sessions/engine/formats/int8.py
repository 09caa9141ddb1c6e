"""8-bit integers with a scale: how the engine stores weights and KV caches in int8.

The quantization is symmetric. A row of numbers has one float32 scale, its largest amount divided by 127.
"""

from __future__ import annotations

import torch

LARGEST = 127
# Amounts below it count as zero, so that no scale is zero.
SMALLEST = 1e-30


def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows `[..., N]` as int8 `[..., N]` and float32 scales `[...]`: about `int8 * scales[..., None]`.

    Each number is divided by the scale in float32 and rounded to nearest, ties to even. The result depends on the row
    only. If a row has a number that is not finite, its scale is not finite, and its int8 numbers are undefined.
    """
    wide = rows.float()
    scales = wide.abs().amax(-1).clamp_min(SMALLEST) / LARGEST
    return (wide / scales[..., None]).round_().to(torch.int8), scales


def dequantize(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `numbers * scales[..., None]`, computed in float32 and rounded to `dtype`."""
    return numbers.to(torch.float32).mul_(scales[..., None]).to(dtype)
