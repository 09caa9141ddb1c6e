"""The way from a loaded model to fused layers with ragged attention on CUDA. Both are tried on an example before use.

The attention must compute and store what torch's own attention does for a few sessions, and the fused form of the
model's first layer what the plain layer does. In the layer's example each session has one token, because the weights of
a softmax over several tokens may depend on the last bits of queries and keys, and those differ between the two forms.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .attention import PackedKV, Segment, TokenAttention
from .cuda import layers
from .fused import head_norms
from .fused.head_norms import HeadNorms
from .fused.layer import FusedLayer, fits
from .fused.linear import Pack
from .kv import KVShape, SessionKV

log = logging.getLogger(__name__)

# Sessions of the examples: the stored and the new tokens of each. The longest has several pieces of ragged attention.
_FOR_ATTENTION = ((5, 1), (0, 3), (300, 1), (0, 1), (4, 2))
_FOR_LAYER = ((0, 1), (0, 1), (0, 1))
_LEAST_ERROR = 1e-4  # relative, in float32: sums of products in another order

Example = tuple[tuple[int, int], ...]
MakeAttention = Callable[[int, KVShape], TokenAttention]


@torch.inference_mode()
def use_fused_layers(
    text: Any, heads: int, shape: KVShape, pack: Pack = layers.pack, make: MakeAttention | None = None
) -> TokenAttention | None:
    """Replace the decoder layers of a transformers text model by fused ones; return the attention of their tokens.

    `text`: with the engine's attention registered. `heads`: query heads of a layer. `shape`: of the KV caches. `pack`:
    for the linears of the layers, which may still be on the host. `make`: returns the attention; None:
    `RaggedAttention`. Changes nothing and returns None if a layer is of another kind, and, with a warning in the log,
    if Triton, its compiler or the device refuses a kernel or the numbers are wrong.
    """
    attention = _tried(text, heads, shape, make or _ragged)
    if attention is not None:
        layers.fuse(text, pack)
    log.info("cuda_layers path=%s", "plain" if attention is None else "fused")
    return attention


def _tried(text: Any, heads: int, shape: KVShape, make: MakeAttention) -> TokenAttention | None:
    """Return the attention if all layers fit, and attention and the first layer pass their trials.

    The trial has the device's own linears. Int8 linears have other numbers, and a trial of their own.
    """
    first = text.layers[0].to(shape.device)
    try:
        if not all(fits(layer, layers.packable) for layer in text.layers):
            return None
        attention = make(heads, shape)
        if not _attention_matches(text, heads, shape, attention):
            log.warning(
                "ragged_attention_wrong heads=%d kv_heads=%d head_dim=%d", heads, shape.kv_heads, shape.head_dim
            )
        elif not _layer_matches(first, text, heads, shape, attention):
            log.warning("fused_layer_wrong class=%s", type(first).__name__)
        else:
            return attention
    except Exception:  # any error of Triton, the C compiler or the device: torch's own attention is used instead
        log.warning("ragged_attention_missing", exc_info=True)
    return None


def _ragged(heads: int, shape: KVShape) -> TokenAttention:
    """Return the Triton kernels for a model. Raises ImportError without Triton."""
    from .cuda.ragged import RaggedAttention

    return RaggedAttention(
        heads, shape.kv_heads, shape.head_dim, shape.dtype, shape.device, kv_dtype=shape.kv_dtype, layers=shape.layers
    )


def _attention_matches(text: Any, heads: int, shape: KVShape, attention: TokenAttention) -> bool:
    """Return whether the attention computes and stores what torch's does, next to sessions with several new tokens.

    Head norms, if the model has any, get the weights of an example: those of a trained model may give scores so large
    that the weights of a softmax depend on the last bits.
    """
    norms = head_norms.of_attention(text.layers[0].self_attn)
    if norms is not None:
        norms = HeadNorms(_wave((2, shape.head_dim), shape), norms.epsilon)
    rows = sum(new for _, new in _FOR_ATTENTION)
    qkv = _wave((rows, (heads + 2 * shape.kv_heads) * shape.head_dim), shape)
    (cos, sin), _ = _positions(_FOR_ATTENTION, text, qkv)
    results = []
    for each in (None, attention):
        segments = _segments(_FOR_ATTENTION, shape)
        out = PackedKV(segments, heads, each).attend(0, qkv.clone(), cos[0], sin[0], norms)
        results.append([out, *_caches(segments)])
    return all(_is_close(got, expected, expected, shape) for expected, got in zip(*results, strict=True))


def _layer_matches(plain: Any, text: Any, heads: int, shape: KVShape, attention: TokenAttention) -> bool:
    """Return whether a fused layer computes and stores what the plain layer does."""
    hidden = _wave((1, len(_FOR_LAYER), text.config.hidden_size), shape)
    position, position_ids = _positions(_FOR_LAYER, text, hidden)
    results = []
    for layer, each in ((plain, None), (FusedLayer(plain, layers.pack), attention)):
        segments = _segments(_FOR_LAYER, shape)
        packed = PackedKV(segments, heads, each)
        out = layer(
            hidden.clone(),
            position_embeddings=position,
            position_ids=position_ids,
            past_key_values=packed,
            packed=packed,
        )
        results.append([out, *_caches(segments)])
    (expected, *expected_caches), (got, *got_caches) = results
    return _is_close(got, expected, expected - hidden, shape) and all(
        _is_close(one, other, other, shape) for one, other in zip(got_caches, expected_caches, strict=True)
    )


def _segments(example: Example, shape: KVShape) -> list[Segment]:
    """Return the example's sessions, whose caches hold numbers also behind the stored tokens."""
    segments = []
    for stored, rows in example:
        # In int8 the attention depends on the number of layers.
        kv = SessionKV(shape if shape.is_int8 else replace(shape, layers=1))
        kv.reserve(stored + rows)
        kv.length = stored
        kv.write(0, 0, *_wave((2, shape.kv_heads, kv.capacity, shape.head_dim), shape))
        segments.append(Segment(kv, [0] * rows, None, [], False))
    return segments


def _caches(segments: list[Segment]) -> list[torch.Tensor]:
    """Return the keys and values of the first layer of each session."""
    return [torch.cat(segment.kv.read(0, segment.kv.capacity)) for segment in segments]


def _positions(
    example: Example, text: Any, numbers: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the rotary embedding of the example's rows, in the precision of `numbers`, and their positions."""
    positions = [at for stored, rows in example for at in range(stored, stored + rows)]
    position_ids = torch.tensor(positions).to(numbers.device)[None]
    return text.rotary_emb(numbers, position_ids=position_ids), position_ids


def _wave(size: tuple[int, ...], shape: KVShape) -> torch.Tensor:
    """Return numbers between -1 and 1 on the device, in its precision."""
    return torch.linspace(-9, 9, math.prod(size)).mul(37).sin().view(size).to(shape.dtype).to(shape.device)


def _is_close(got: torch.Tensor, expected: torch.Tensor, computed: torch.Tensor, shape: KVShape) -> bool:
    """Return whether the error is that of roundings. False if a number is not finite.

    `computed`: what the operations have computed of `expected`, which may contain an addend.
    """
    rounding = torch.finfo(shape.dtype).eps
    allowed = rounding * expected.float().norm() + max(_LEAST_ERROR, 8 * rounding) * computed.float().norm()
    return bool((got.float() - expected.float()).norm() <= allowed)
