"""The packed batch of one forward, and the attention functions that transformers calls for it.

All new tokens of a step are one row of a batch. Attention runs per session on that session's own KV cache, so a
session's numbers do not depend on the other sessions of the step. Built on two extension points of transformers:
`AttentionInterface.register` and the `past_key_values` protocol (`update`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from .cpu import attention as cpu_attention
from .device import takes_grouped_heads
from .fused.head_norms import HeadNorms
from .kv import SessionKV

if TYPE_CHECKING:
    from .cpu.amx_sessions import SessionAttention  # importing it needs Numba

# Names under which the attention functions are registered with transformers.
TEXT_ATTENTION = "session_sdpa"
VISION_ATTENTION = "picture_sdpa"


class TokenAttention(Protocol):
    """Attention of single new tokens of many sessions: `cpu.token_attention` or `cuda.ragged`."""

    def task(self, places: list[tuple[int, int, int, int]]) -> Any:
        """Return the arguments that all layers of one forward share.

        `places`, one per token: its row in the batch, the address and the capacity of its session's KV tensor `[layers,
        2, kv_heads, capacity, head_dim]`, and the number of tokens stored there.
        """

    def __call__(
        self,
        task: Any,
        layer: int,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out: torch.Tensor,
        norms: HeadNorms | None = None,
    ) -> None:
        """Rotate the tokens' queries and keys, append keys and values to the caches, and attend to all stored tokens.

        `qkv`: `[rows, (heads + 2 * kv_heads) * head_dim]`. `cos`, `sin`: `[rows, head_dim]`. All are contiguous.
        `norms`: of the tokens' query and key heads, before the rotation, or None. Writes the tokens' rows of `out`,
        `[rows, heads * head_dim]`.
        """


@dataclass(frozen=True)
class Segment:
    """One session's new tokens in a packed forward. They follow the `kv.length` stored tokens.

    `features`: `[places, hidden]`, the embeddings of the tokens at the indices `feature_places` of `token_ids`, or
    None. An image token outside `feature_places` (a model generated it) is embedded like any other token. `sample`:
    return the logits of the last token.
    """

    kv: SessionKV
    token_ids: list[int]
    features: torch.Tensor | None
    feature_places: list[int]
    sample: bool


@dataclass(frozen=True)
class _Span:
    """Rows `start` to `end` of the pack, which belong to one session, with the inputs of their attention.

    `stored`: tokens in the cache before them. `mask`: see `causal_mask`; None if nothing is hidden or if `is_causal`
    describes it.
    """

    kv: SessionKV
    stored: int
    start: int
    end: int
    mask: torch.Tensor | None
    is_causal: bool


class PackedKV:
    """The KV caches of all segments of one forward, as transformers' `past_key_values` and for fused layers.

    Transformers' layers call `update`, which stores each session's new keys and values in its own cache, and then the
    registered attention function, which reads them there. Fused layers call `attend`, which does both. With compiled
    attention, segments are excluded from `spans`: one compiled call handles all segments of one token, another one all
    longer segments.
    """

    is_compileable = False  # part of the `past_key_values` protocol

    def __init__(
        self,
        segments: list[Segment],
        heads: int,
        token_attention: TokenAttention | None,
        session_attention: SessionAttention | None = None,
    ) -> None:
        """Reserve room in each cache. Raises torch's out-of-memory error; the caches keep all stored tokens."""
        self._heads = heads
        self._token_attention = token_attention
        self._session_attention = session_attention
        self.spans: list[_Span] = []
        self.ends: list[int] = []
        places: list[tuple[int, int, int, int]] = []
        longer: list[tuple[int, int, int, int, int]] = []
        start = 0
        for segment in segments:
            kv = segment.kv
            rows = len(segment.token_ids)
            kv.reserve(kv.length + rows)
            if token_attention is not None and rows == 1:
                places.append((start, kv.address, kv.capacity, kv.length))
            elif session_attention is not None:
                longer.append((start, rows, kv.address, kv.capacity, kv.length))
            else:
                mask = causal_mask(kv.length, rows, kv.shape.device) if kv.length and rows > 1 else None
                self.spans.append(_Span(kv, kv.length, start, start + rows, mask, not kv.length and rows > 1))
            start += rows
            self.ends.append(start)
        self._task = token_attention.task(places) if token_attention is not None and places else None
        self._longer_task = session_attention.task(longer) if session_attention is not None and longer else None
        self.tasks = None if self.spans else (self._task, self._longer_task)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values of one layer, `[1, kv_heads, rows, head_dim]` each, and return them."""
        for span in self.spans:
            span.kv.write(layer, span.stored, keys[0, :, span.start : span.end], values[0, :, span.start : span.end])
        return keys, values

    def attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: HeadNorms | None = None
    ) -> torch.Tensor:
        """Norm, rotate, store and attend for a fused layer, see `fused.layer.Batch.attend`."""
        out = qkv.new_empty((len(qkv), self._heads * cos.shape[-1]))
        if self._token_attention is not None and self._task is not None:
            self._token_attention(self._task, layer, qkv, cos, sin, out, norms)
        if self._session_attention is not None and self._longer_task is not None:
            self._session_attention(self._longer_task, layer, qkv, cos, sin, out, norms)
        for span in self.spans:
            self._attend_span(span, layer, qkv, cos, sin, out, norms)
        return out

    def _attend_span(
        self,
        span: _Span,
        layer: int,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out: torch.Tensor,
        norms: HeadNorms | None,
    ) -> None:
        """As `attend`, for the rows of one session. Writes these rows of `out`."""
        rows = slice(span.start, span.end)
        head_dim = cos.shape[-1]
        kv_heads = span.kv.shape.kv_heads
        numbers = qkv[rows].view(span.end - span.start, -1, head_dim)
        rotated = numbers[:, : self._heads + kv_heads]
        if norms is not None:
            norms(rotated, self._heads)
        cpu_attention.rotate(rotated, cos[rows], sin[rows])
        queries, keys, values = numbers.transpose(0, 1).split((self._heads, kv_heads, kv_heads))
        span.kv.write(layer, span.stored, keys, values)
        attended = _attend(span, layer, queries[None], head_dim**-0.5)
        out[rows] = attended[0].transpose(0, 1).flatten(1)


class TokenBatch:
    """Single new tokens of sessions, as a `fused.layer.Batch`, whose task belongs to the caller.

    For a captured step: the caller changes the numbers of `task` between replays, not the tensor. It is passed to a
    transformers model in place of `PackedKV`; only fused layers can use it.
    """

    is_compileable = False  # part of the `past_key_values` protocol

    def __init__(self, token_attention: TokenAttention, task: Any, heads: int) -> None:
        """`task`: as `TokenAttention.task` returns it. `heads`: query heads of a layer."""
        self._token_attention = token_attention
        self._heads = heads
        self.tasks = (task, None)

    def attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: HeadNorms | None = None
    ) -> torch.Tensor:
        """Norm, rotate, store and attend, see `fused.layer.Batch.attend`."""
        out = qkv.new_empty((len(qkv), self._heads * cos.shape[-1]))
        self._token_attention(self.tasks[0], layer, qkv, cos, sin, out, norms)
        return out


def causal_mask(stored: int, new: int, device: torch.device) -> torch.Tensor:
    """Return `[new, stored + new]`: a new token sees all stored tokens, itself and the new tokens before it.

    On a CPU a bool tensor, True where a token is visible. On CUDA torch's description of it, with which flash attention
    runs. With a bool tensor and fewer KV heads than query heads torch 2.13 has only its slow float32 computation.
    """
    if device.type == "cuda":
        return causal_lower_right(new, stored + new)
    return torch.ones((new, stored + new), dtype=torch.bool, device=device).tril(stored)


def _packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    packed: PackedKV,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to each session's own cache, in which `PackedKV.update` has stored the new keys and values.

    `query`: `[1, heads, rows, head_dim]`. Result: `[1, rows, heads, head_dim]`.
    """
    out = torch.empty_like(query.transpose(1, 2))
    for span in packed.spans:
        attended = _attend(span, module.layer_idx, query[:, :, span.start : span.end], scaling)
        out[:, span.start : span.end] = attended.transpose(1, 2)
    return out, None


def _attend(span: _Span, layer: int, query: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return attention `[1, heads, rows, head_dim]` of a span's queries to its cache, which has the new tokens."""
    keys, values = span.kv.read(layer, span.stored + span.end - span.start)
    groups = query.shape[1] // keys.shape[1]
    if groups > 1 and not takes_grouped_heads(query.device, query.dtype):
        keys = keys.repeat_interleave(groups, 1)
        values = values.repeat_interleave(groups, 1)
    return cpu_attention.attention(query, keys, values, scaling, span.mask, span.is_causal)


def _vision_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend without a mask in a vision tower.

    `query`, `key`, `value`: `[pictures, heads, patches, head_dim]`. Result: `[pictures, patches, heads, head_dim]`.
    """
    return cpu_attention.full_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(TEXT_ATTENTION, _packed_attention)
AttentionInterface.register(VISION_ATTENTION, _vision_attention)
