"""Owns the weights: loads a checkpoint of the LLaVA family, encodes pictures, and runs one packed forward.

Must not know turns, scheduling or text. Builds on transformers' extension points only: `get_image_features` and
`get_video_features`, `AttentionInterface.register`, and the `past_key_values` protocol (`update`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from ..ipc.messages import PreparedPicture
from . import attention
from .cpu import layers, linears
from .kv import KVShape, SessionKV

SUPPORTED_MODEL_TYPES = ("llava", "llava_next", "llava_onevision")
# Their attention is causal over everything before, and hands its keyword arguments through to ours.
SUPPORTED_TEXT_TYPES = ("llama", "mistral", "qwen2")
_ATTENTION = "session_sdpa"
_VISION_ATTENTION = "picture_sdpa"
# Of a token's KV: attention over less takes no time that would be worth a compiler's at each start of the engine.
_COMPILE_FROM_BYTES = 16 * 2**10
# Rotary embeddings that change with the longest position of a forward: sessions would disturb each other.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


class UnsupportedCheckpoint(Exception):
    """The checkpoint can't be served; the message says what was found and what is supported."""


@dataclass(frozen=True)
class Segment:
    """One session's new tokens in a packed forward: ids behind the `kv.length` stored ones.

    `features`, `[places, hidden]`, stand in for the tokens at `feature_places` of `token_ids`, or are None. An image
    token that a model generates is a token like any other. `sample`: whether the last one's logits are wanted.
    """

    kv: SessionKV
    token_ids: list[int]
    features: torch.Tensor | None
    feature_places: list[int]
    sample: bool


@dataclass(frozen=True)
class _Span:
    """A segment's rows in the pack, and what its attention needs: `stored` tokens lie before its own.

    `mask`: `[rows, stored + rows]`, where a new token sees all stored ones, itself and the new ones before it; None
    where there is nothing to hide or `is_causal` says it.
    """

    kv: SessionKV
    stored: int
    start: int
    end: int
    mask: torch.Tensor | None
    is_causal: bool


class _PackedKV:
    """All segments of one forward, in transformers' `past_key_values` protocol, and as fused layers see them.

    `update` stores each session's new keys and values in that session's own tensor; the attention function reads them
    there. `attend` does both. With `tokens`, the segments of one token are its work, and not among the spans.
    """

    is_compileable = False

    def __init__(self, segments: list[Segment], heads: int, tokens: layers.TokenAttention | None) -> None:
        self._heads, self._tokens = heads, tokens
        self.spans: list[_Span] = []
        self.ends: list[int] = []
        places: list[tuple[int, int, int, int]] = []
        start = 0
        for segment in segments:
            kv, rows = segment.kv, len(segment.token_ids)
            kv.reserve(kv.length + rows)
            if tokens is not None and rows == 1:
                places.append((start, kv.address, kv.capacity, kv.length))
            else:
                mask = _causal_mask(kv.length, rows, kv.shape.device) if kv.length and rows > 1 else None
                self.spans.append(_Span(kv, kv.length, start, start + rows, mask, not kv.length and rows > 1))
            start += rows
            self.ends.append(start)
        self._task = tokens.task(places) if places else None

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple:
        """Store `[1, kv_heads, rows, head_dim]` keys and values of one layer."""
        for span in self.spans:
            span.kv.write(layer, span.stored, keys[0, :, span.start : span.end], values[0, :, span.start : span.end])
        return keys, values

    def attend(self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """What a fused layer asks for, see `layers.Batch`."""
        out = qkv.new_empty((len(qkv), self._heads * cos.shape[-1]))
        if self._task is not None:
            self._tokens(self._task, layer, qkv, cos, sin, out)
        for span in self.spans:
            place = slice(span.start, span.end)
            numbers = qkv[place].unflatten(-1, (-1, cos.shape[-1]))
            turned = numbers[:, : self._heads + span.kv.shape.kv_heads]
            attention.rotate(turned, cos[place], sin[place])
            queries, keys, values = numbers.transpose(0, 1).split(
                (self._heads, span.kv.shape.kv_heads, span.kv.shape.kv_heads)
            )
            span.kv.write(layer, span.stored, keys, values)
            stored = span.kv.read(layer, span.stored + len(numbers))
            attended = attention.attention(queries[None], *stored, cos.shape[-1] ** -0.5, span.mask, span.is_causal)
            out[place] = attended[0].transpose(0, 1).flatten(1)
        return out


def _causal_mask(stored: int, new: int, device: torch.device) -> torch.Tensor:
    return torch.ones((new, stored + new), dtype=torch.bool, device=device).tril(stored)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    packed: _PackedKV | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed forward: each session's rows against that session's own KV.

    `query`: `[1, heads, rows, head_dim]`. Returns `[1, rows, heads, head_dim]`.
    """
    out = torch.empty_like(query.transpose(1, 2))
    for span in packed.spans:
        keys, values = span.kv.read(module.layer_idx, span.stored + span.end - span.start)
        rows = query[:, :, span.start : span.end]
        attended = attention.attention(rows, keys, values, scaling, span.mask, span.is_causal)
        out[:, span.start : span.end] = attended.transpose(1, 2)
    return out, None


def _look(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a vision tower: each patch sees all. `[pictures, heads, patches, head_dim]` each."""
    return attention.full_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attend)
AttentionInterface.register(_VISION_ATTENTION, _look)


class Model:
    """A loaded checkpoint on one device."""

    def __init__(self, model: torch.nn.Module) -> None:
        text = model.config.get_text_config()
        self._model = model.eval()
        self._text = model.model.language_model
        self._text.set_attn_implementation(_ATTENTION)
        model.model.vision_tower.set_attn_implementation(_VISION_ATTENTION)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.context_tokens: int = _context_tokens(text)
        media = (getattr(model.config, name, None) for name in ("image_token_id", "video_token_id"))
        self.media_token_ids: frozenset[int] = frozenset(token for token in media if token is not None)
        # Width and height of a picture that makes as much work as any can: where pictures are tiled, the most tiles.
        grids = getattr(model.config, "image_grid_pinpoints", None) or [(64, 64)]
        self.largest_picture: tuple[int, int] = max(((w, h) for h, w in grids), key=lambda side: side[0] * side[1])
        self.eos_token_ids: frozenset[int] = _eos(model)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.kv_shape = KVShape(text.num_hidden_layers, text.num_key_value_heads, head_dim, self.dtype, self.device)
        self.feature_bytes: int = text.hidden_size * self.dtype.itemsize
        self._heads: int = text.num_attention_heads
        self._tokens = None
        if isinstance(self._text.layers[0], layers.FusedLayer) and self.kv_shape.token_bytes >= _COMPILE_FROM_BYTES:
            self._tokens = layers.token_attention(self._heads, self.kv_shape.kv_heads, head_dim, self.dtype)

    @classmethod
    def load(cls, checkpoint: str | Path, dtype: torch.dtype | str = "auto", device: str = "auto") -> Model:
        """Load a folder or hub id through accelerate's device map.

        "auto" is CUDA when there, else CPU; bfloat16 where the device computes in it, else float16 on CUDA and float32
        on CPU. Raises `UnsupportedCheckpoint`, and OSError when the checkpoint can't be found.
        """
        config = AutoConfig.from_pretrained(checkpoint)
        problem = _unsupported(config)
        if problem:
            raise UnsupportedCheckpoint(problem)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = native_dtype(torch.device(device))
        elif isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        _drop_unused_vision_layers(config)
        model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, config=config, dtype=dtype, device_map={"": device}
        )
        layers.fuse_layers(model.model.language_model.layers)
        if linears.pack_all(model.model) and linears.packable(model.lm_head):
            model.lm_head = linears.pack(model.lm_head)
        return cls(model)

    @torch.inference_mode()
    def encode(self, picture: PreparedPicture) -> torch.Tensor:
        """Vision tower and projector: one picture or clip -> its features `[image tokens, hidden]` on the device."""
        inputs = {name: torch.from_numpy(array).to(self.device) for name, array in picture.inputs.items()}
        for name in ("pixel_values", "pixel_values_videos"):
            if name in inputs:
                inputs[name] = inputs[name].to(self.dtype)
        if "pixel_values_videos" in inputs:  # one tensor [1, tokens, hidden]
            return self._model.model.get_video_features(**inputs, return_dict=True).pooler_output[0]
        # A list of [tokens, hidden]; for tiled pictures with the rows' newline features among them.
        features = self._model.model.get_image_features(**inputs, return_dict=True).pooler_output
        return torch.cat(tuple(features), dim=0)

    @torch.inference_mode()
    def forward(self, segments: list[Segment]) -> torch.Tensor:
        """One packed forward over all segments' new tokens, laid end to end in one row.

        Appends to each segment's KV and returns the logits of the sampled ones, `[rows, vocabulary]`. On an error the
        KV lengths are as before.
        """
        packed = _PackedKV(segments, self._heads, self._tokens)
        ids = [token for s in segments for token in s.token_ids]
        positions = [at for s in segments for at in range(s.kv.length, s.kv.length + len(s.token_ids))]
        embeddings = self._embed(ids, segments)
        hidden = self._text(
            inputs_embeds=embeddings,
            position_ids=self._on_device(positions)[None],
            past_key_values=packed,
            packed=packed,
        ).last_hidden_state[0]
        wanted = [end - 1 for end, segment in zip(packed.ends, segments, strict=True) if segment.sample]
        logits = self._model.lm_head(hidden.index_select(0, self._on_device(wanted)))
        for segment in segments:
            segment.kv.length += len(segment.token_ids)
        return logits

    def _embed(self, ids: list[int], segments: list[Segment]) -> torch.Tensor:
        """Token embeddings `[1, rows, hidden]`, with the pictures' features in place of their image tokens."""
        embeddings = self._text.embed_tokens(self._on_device(ids)[None])
        features, places, start = [], [], 0
        for segment in segments:
            if segment.features is not None:
                features.append(segment.features)
                places += [start + place for place in segment.feature_places]
            start += len(segment.token_ids)
        if features:
            embeddings[0].index_copy_(0, self._on_device(places), torch.cat(features).to(embeddings.dtype))
        return embeddings

    def _on_device(self, numbers: list[int]) -> torch.Tensor:
        """int64 `[len(numbers)]`, without waiting for the device."""
        tensor = torch.tensor(numbers, dtype=torch.int64)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def peak_bytes(self) -> int:
        """The most that torch's allocator held on the device since the last call; 0 on CPU."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def allocated_bytes(self) -> int:
        """What torch's allocator holds on the device; 0 on CPU, where torch keeps no count."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it, else what it computes fastest in."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    found = torch.cpu.get_capabilities()
    return torch.bfloat16 if found.get("avx512_bf16") or found.get("amx_bf16") else torch.float32


def _unsupported(config: PreTrainedConfig) -> str | None:
    """Why a checkpoint can't be served: what was found, and what is supported. None when it can."""
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        return f"model_type is {config.model_type!r}; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
    text = config.get_text_config()
    if text.model_type not in SUPPORTED_TEXT_TYPES:
        found = f"{config.model_type} around a text model of type {text.model_type!r}"
        return f"{found}; supported: {', '.join(SUPPORTED_TEXT_TYPES)}"
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _ROPE_BY_LENGTH:
        return f"{text.model_type} text with rope_type {rope!r}, whose positions depend on the longest of a batch"
    wanted = "supported: full causal attention in every layer"
    layers = set(getattr(text, "layer_types", None) or ())
    others = layers - {"full_attention", "sliding_attention"}
    if others:
        return f"{text.model_type} text with layers of type {', '.join(sorted(others))}; {wanted}"
    return None


def _context_tokens(text: PreTrainedConfig) -> int:
    """How long a conversation may get: within a sliding window, attention to the window is attention to everything."""
    layers = set(getattr(text, "layer_types", None) or ())
    # Mistral's has no layer types: its window, where there is one, holds for every layer.
    slides = "sliding_attention" in layers or not layers
    window = getattr(text, "sliding_window", None) if slides else None
    return min(text.max_position_embeddings, window or text.max_position_embeddings)


def _drop_unused_vision_layers(config: PreTrainedConfig) -> None:
    """Have no layer loaded behind the last one whose output is used: LLaVA takes the last but one.

    The output of layer n is `hidden_states[n]`, that of the embeddings `hidden_states[0]`.
    """
    layers, chosen = config.vision_config.num_hidden_layers, config.vision_feature_layer
    counted = [n if n >= 0 else layers + 1 + n for n in (chosen if isinstance(chosen, list) else [chosen])]
    config.vision_config.num_hidden_layers = max(counted)
    config.vision_feature_layer = counted if isinstance(chosen, list) else counted[0]


def _eos(model: torch.nn.Module) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])
