"""The way from a loaded model to fused layers with ragged attention on CUDA. It is tried on an example before use.

The example is the model's first layer with a few sessions. The fused layer must compute what the plain layer computes,
and must store the same keys and values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .attention import PackedKV, Segment, TokenAttention
from .cuda import layers
from .fused.layer import FusedLayer, fits
from .fused.linear import Pack
from .kv import KVShape, SessionKV

log = logging.getLogger(__name__)

# Sessions of the example: the stored and the new tokens of each. The longest has several pieces of ragged attention.
_EXAMPLE = ((5, 1), (0, 3), (300, 1), (0, 1), (4, 2))
_LEAST_ERROR = 1e-4  # relative, in float32: sums of products in another order

MakeAttention = Callable[[int, KVShape], TokenAttention]


@torch.inference_mode()
def use_fused_layers(
    text: Any, heads: int, shape: KVShape, pack: Pack = layers.pack, make: MakeAttention | None = None
) -> TokenAttention | None:
    """Replace the decoder layers of a transformers text model by fused ones; return the attention of their tokens.

    `text`: with the engine's attention registered. `heads`: query heads of a layer. `shape`: of the KV caches. `make`:
    returns the attention; None: `RaggedAttention`. Changes nothing and returns None if a layer is of another kind, and,
    with a warning in the log, if Triton, its compiler or the device refuses a kernel or the numbers are wrong.
    """
    attention = _tried(text, heads, shape, pack, make or _ragged)
    if attention is not None:
        layers.fuse(text, pack)
    log.info("cuda_layers path=%s", "plain" if attention is None else "fused")
    return attention


def _tried(text: Any, heads: int, shape: KVShape, pack: Pack, make: MakeAttention) -> TokenAttention | None:
    """Return the attention if all layers fit and the first one passes its trial."""
    first = text.layers[0]
    try:
        if not all(fits(layer, layers.packable) for layer in text.layers):
            return None
        attention = make(heads, shape)
        if _matches(first, FusedLayer(first, pack), text, heads, shape, attention):
            return attention
        log.warning("ragged_attention_wrong heads=%d kv_heads=%d head_dim=%d", heads, shape.kv_heads, shape.head_dim)
    except Exception:  # any error of Triton, the C compiler or the device: torch's own attention is used instead
        log.warning("ragged_attention_missing", exc_info=True)
    return None


def _ragged(heads: int, shape: KVShape) -> TokenAttention:
    """Return the Triton kernels for a model. Raises ImportError without Triton."""
    from .cuda.ragged import RaggedAttention

    return RaggedAttention(
        heads, shape.kv_heads, shape.head_dim, shape.dtype, shape.device, kv_dtype=shape.kv_dtype, layers=shape.layers
    )


def _matches(plain: Any, fused: FusedLayer, text: Any, heads: int, shape: KVShape, attention: TokenAttention) -> bool:
    """Return whether the layers compute and store the same numbers, up to the rounding of the precision."""
    count = sum(rows for _, rows in _EXAMPLE)
    hidden = _wave(torch.Size((1, count, text.config.hidden_size)), shape)
    expected, expected_kv = _run(plain, hidden, text, heads, shape, None)
    got, got_kv = _run(fused, hidden, text, heads, shape, attention)
    change = (expected - hidden).norm()
    return _is_close(got, expected, change, shape.dtype) and all(
        _is_close(one, other, other.norm(), shape.dtype) for one, other in zip(got_kv, expected_kv, strict=True)
    )


def _run(
    layer: Any, hidden: torch.Tensor, text: Any, heads: int, shape: KVShape, attention: TokenAttention | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the hidden states after a layer, and the caches of the example's sessions, both in float32."""
    segments = []
    for stored, rows in _EXAMPLE:
        # In int8 the attention depends on the number of layers.
        kv = SessionKV(shape if shape.is_int8 else replace(shape, layers=1))
        kv.reserve(stored + rows)
        kv.length = stored
        kv.write(0, 0, *_wave(torch.Size((2, shape.kv_heads, kv.capacity, shape.head_dim)), shape))
        segments.append(Segment(kv, [0] * rows, None, [], False))
    packed = PackedKV(segments, heads, attention)
    positions = [at for stored, rows in _EXAMPLE for at in range(stored, stored + rows)]
    position_ids = torch.tensor(positions).to(shape.device)[None]
    out = layer(
        hidden.clone(),
        position_embeddings=text.rotary_emb(hidden, position_ids=position_ids),
        position_ids=position_ids,
        past_key_values=packed,
        packed=packed,
    )
    caches = [torch.cat(segment.kv.read(0, segment.kv.capacity)) for segment in segments]
    return out.float(), [cache.float() for cache in caches]


def _wave(size: torch.Size, shape: KVShape) -> torch.Tensor:
    """Return numbers between -1 and 1 on the device, in its precision."""
    return torch.linspace(-9, 9, size.numel()).mul(37).sin().view(size).to(shape.dtype).to(shape.device)


def _is_close(got: torch.Tensor, expected: torch.Tensor, change: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether the error is that of roundings in a precision. False if a number is not finite."""
    rounding = torch.finfo(dtype).eps
    allowed = rounding * expected.norm() + max(_LEAST_ERROR, 8 * rounding) * change
    return bool((got - expected).norm() <= allowed)
