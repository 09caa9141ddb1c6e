"""A loaded checkpoint of the LLaVA family: picture encoding and the packed forward.

Uses transformers' extension points only: `get_image_features`, `get_video_features`, `AttentionInterface.register` and
the `past_key_values` protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from ..ipc.messages import PreparedPicture
from . import cuda_path, vision
from .attention import TEXT_ATTENTION, VISION_ATTENTION, PackedKV, Segment, TokenAttention
from .cpu import attention as cpu_attention
from .cpu import int8_linears, layer_stack, layers, linears, picture_layers
from .cuda import int8_linear
from .cuda import layers as cuda_layers
from .cuda.graphs import CUDAGraphs, Graph
from .cuda.ragged import RaggedAttention
from .decode_graphs import DecodeGraphs, Predictions
from .device import native_dtype, on_device, prepare
from .fused.layer import Batch, FusedLayer
from .fused.linear import Pack
from .kv import KVShape
from .loading import load_weights
from .weight_files import check_memory

if TYPE_CHECKING:
    from .cpu.amx_sessions import SessionAttention  # importing it needs Numba

# Smallest KV of a token, in bytes, for which token attention is compiled. For less, the time that compiled attention
# saves does not justify the compiler's time at each start of the engine.
COMPILE_FROM_BYTES = 16 * 2**10


class Model:
    """A loaded checkpoint on one device. Not thread-safe."""

    def __init__(
        self,
        model: Any,
        end_token_ids: frozenset[int] | None = None,
        kv_dtype: torch.dtype | None = None,
        cuda_pack: Pack | None = None,
    ) -> None:
        """Take a transformers model for image-text-to-text and register the engine's attention with it.

        `end_token_ids` end an answer; None: those of its generation config, as in `generate`. `kv_dtype`: as in
        `KVShape`. `cuda_pack`: for the linears of the language model on CUDA, which may still be on the host; None:
        they stay as they are.
        """
        text = model.config.get_text_config()
        self._model = model.eval()
        self.text: Any = model.model.language_model
        self.vision: Any = model.model  # what the functions of `vision` take
        self.text.set_attn_implementation(TEXT_ATTENTION)
        model.model.vision_tower.set_attn_implementation(VISION_ATTENTION)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.context_tokens = _context_tokens(text)
        media = (getattr(model.config, name, None) for name in ("image_token_id", "video_token_id"))
        self.media_token_ids: frozenset[int] = frozenset(token for token in media if token is not None)
        self.eos_token_ids = _eos_token_ids(model) if end_token_ids is None else end_token_ids
        self._heads: int = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // self._heads
        self.kv_shape = KVShape(
            text.num_hidden_layers, text.num_key_value_heads, head_dim, self.dtype, self.device, kv_dtype
        )
        self.feature_bytes: int = text.hidden_size * self.dtype.itemsize
        # Compiled attention of single tokens, or None: then torch's own attention handles them.
        self.token_attention: TokenAttention | None = None
        # Compiled attention of several tokens of a session, or None: then torch's.
        self.session_attention: SessionAttention | None = None
        # Steps that only decode as graphs, or None: then each step is launched kernel by kernel.
        self.graphs: DecodeGraphs | None = None
        cpu_attention.prepare_picture_attention(model.config.vision_config, self.dtype, self.device)
        if self.device.type == "cuda":
            self.use_cuda_layers(cuda_pack)
        elif isinstance(self.text.layers[0], FusedLayer) and self.kv_shape.token_bytes >= COMPILE_FROM_BYTES:
            self._compile_attention()

    def use_cuda_layers(self, pack: Pack | None = None) -> None:
        """Use fused layers with ragged attention, as on CUDA, if they pass their trial.

        `pack`: see `cuda_pack` of `__init__`. With Triton's interpreter (TRITON_INTERPRET=1) this works on a CPU too,
        for a model whose linears are not packed.
        """
        self.token_attention = cuda_path.use_fused_layers(
            self.text, self._heads, self.kv_shape, pack or cuda_layers.pack
        )
        if pack is not None:
            int8_linear.pack_all(self._model, pack)
        if self.device.type == "cuda":
            self.use_graphs(CUDAGraphs())

    def use_graphs(self, make_graph: Callable[[], Graph]) -> None:
        """Run steps that only decode as graphs of `make_graph`, if the layers are those of `use_cuda_layers`."""
        if isinstance(self.token_attention, RaggedAttention):
            self.graphs = DecodeGraphs(self.decode, self.token_attention, self._heads, self.kv_shape, make_graph)

    def _compile_attention(self) -> None:
        """Compile attention for the CPU, and where possible whole layers."""
        shape = self.kv_shape
        sizes = (self._heads, shape.kv_heads, shape.head_dim, shape.dtype, shape.kv_dtype, shape.layers)
        with_norms = self.text.layers[0].head_norms is not None
        tokens = layers.compile_token_attention(*sizes, with_norms)
        if tokens is None:
            return
        self.token_attention = tokens
        self.session_attention = cpu_attention.session_attention(*sizes, with_norms)
        self.text.layers = layer_stack.stack_layers(self.text.layers, tokens, self.session_attention, shape)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        dtype: torch.dtype | str = "auto",
        device: str = "auto",
        end_token_ids: frozenset[int] | None = None,
        weights: str = "auto",
        kv_dtype: str = "auto",
    ) -> Model:
        """Load a folder or hub ID through accelerate's device map.

        `device` "auto": CUDA if available, else CPU. `dtype` "auto": see `native_dtype`. `end_token_ids`: as in
        `__init__`. `weights`: "auto", or "int8" for the linears of the language model: on a GPU in float16 or bfloat16,
        or on a CPU with bfloat16. `kv_dtype`: "auto", or "int8" for the KV caches. Raises `UnsupportedCheckpoint`,
        `InsufficientMemory` if the weights do not fit the GPU, OSError if the checkpoint can't be found, and ValueError
        if weights in int8 are not possible.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        prepare(torch.device(device))
        config = AutoConfig.from_pretrained(checkpoint)
        if dtype == "auto":
            dtype = native_dtype(torch.device(device), config.dtype or config.get_text_config().dtype)
        elif isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        assert isinstance(dtype, torch.dtype)
        if torch.device(device).type == "cuda" and Path(checkpoint).is_dir():
            check_memory(Path(checkpoint), dtype, torch.device(device), weights)
        cache_dtype = torch.int8 if kv_dtype == "int8" else None
        if weights == "int8" and torch.device(device).type == "cuda":
            int8_linear.check(dtype)
            model = load_weights(checkpoint, dtype, "cpu")
            int8_linear.move_others(model, torch.device(device))
            return cls(model, end_token_ids, cache_dtype, int8_linear.pack_for(model.device, dtype))
        if weights == "int8":
            int8_linears.check(dtype)
        model = load_weights(checkpoint, dtype, device)
        _pack(model, int8_linears.pack if weights == "int8" else linears.pack)
        return cls(model, end_token_ids, cache_dtype)

    def media_positions(self, token_ids: list[int]) -> list[int]:
        """Return the indices of image and video tokens."""
        return [at for at, token in enumerate(token_ids) if token in self.media_token_ids]

    def encode(self, picture: PreparedPicture) -> torch.Tensor:
        """Run vision tower and projector on one picture or clip; return features `[image tokens, hidden]`."""
        return self.encode_batch([picture])[0]

    def encode_batch(self, pictures: Sequence[PreparedPicture]) -> list[torch.Tensor]:
        """Run vision tower and projector on one clip, or on pictures whose arrays have the same shapes.

        Returns the features of each, `[image tokens, hidden]` in memory of its own. On CUDA the work is only launched.
        """
        return vision.encode(self.vision, pictures, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, segments: list[Segment]) -> Predictions:
        """Run one packed forward over the new tokens of all segments.

        Appends to each segment's KV cache. The rows of the result are the segments to sample, in their order. The
        result is valid until the next forward. After an error all KV lengths are unchanged.
        """
        predictions = None if self.graphs is None else self.graphs.step(segments)
        if predictions is None:
            packed = PackedKV(segments, self._heads, self.token_attention, self.session_attention)
            ids = [token for s in segments for token in s.token_ids]
            positions = [at for s in segments for at in range(s.kv.length, s.kv.length + len(s.token_ids))]
            hidden = self._run_layers(self._embed(ids, segments), _on_device(positions, self.device), packed)
            sampled = [end - 1 for end, segment in zip(packed.ends, segments, strict=True) if segment.sample]
            logits = self._model.lm_head(hidden.index_select(0, _on_device(sampled, self.device)))
            predictions = Predictions(logits, None)
        for segment in segments:
            segment.kv.length += len(segment.token_ids)
        return predictions

    @torch.inference_mode()
    def decode(self, ids: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the logits `[rows, vocabulary]` of one new token of each row's session.

        `ids`, `positions`: int64 `[rows]` on the device. `batch`: the attention of these rows. Needs the fused layers
        of `use_cuda_layers`. Copies nothing between host and device and does not wait for the device, so that a step
        can be captured. The caller reserves room in the caches and raises their lengths.
        """
        hidden = self._run_layers(self.text.embed_tokens(ids[None]), positions, batch)
        logits: torch.Tensor = self._model.lm_head(hidden)
        return logits

    def _run_layers(self, embeddings: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the hidden states `[rows, hidden]` after the last norm.

        `embeddings`: `[1, rows, hidden]`, may be changed. `positions`: int64 `[rows]`.
        """
        out = self.text(
            inputs_embeds=embeddings, position_ids=positions[None], past_key_values=batch, packed=batch
        ).last_hidden_state
        hidden: torch.Tensor = out[0]
        return hidden

    def _embed(self, ids: list[int], segments: list[Segment]) -> torch.Tensor:
        """Return embeddings `[1, rows, hidden]`: features at the pictures' image tokens, else token embeddings."""
        embeddings: torch.Tensor = self.text.embed_tokens(_on_device(ids, self.device)[None])
        features: list[torch.Tensor] = []
        places: list[int] = []
        start = 0
        for segment in segments:
            if segment.features is not None:
                features.append(segment.features)
                places += [start + place for place in segment.feature_places]
            start += len(segment.token_ids)
        if features:
            embeddings[0].index_copy_(0, _on_device(places, self.device), torch.cat(features).to(embeddings.dtype))
        return embeddings

    def peak_bytes(self) -> int:
        """Return the peak of torch's allocator on the device since the last call, and reset it. 0 on CPU."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    @property
    def int8_frees_bytes(self) -> int:
        """Bytes that `weights: int8` would free on a GPU; 0 if it is set."""
        return int8_linear.freed_bytes(self._model) if self.device.type == "cuda" else 0

    def allocated_bytes(self) -> int:
        """Return the bytes that torch's allocator holds on the device. 0 on CPU, where torch does not count them."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def _on_device(numbers: list[int], device: torch.device) -> torch.Tensor:
    """Return an int64 tensor `[len(numbers)]`. On CUDA the copy is asynchronous."""
    return on_device(torch.tensor(numbers, dtype=torch.int64), device)


def _pack(model: Any, pack: Pack) -> None:
    """Pack the linears of a transformers model on a CPU, those of the language model by `pack`."""
    text = model.model.language_model
    layers.fuse_layers(text.layers, pack)
    picture_layers.fuse_layers(model.model.vision_tower)
    linears.pack_all(text, pack)
    if linears.pack_all(model.model) and linears.packable(model.lm_head):
        model.lm_head = pack(model.lm_head)


def _context_tokens(text: Any) -> int:
    """Return the longest conversation in tokens.

    A sliding window bounds it: up to the window's width, attention to the window is attention to all tokens.
    """
    layer_types = set(getattr(text, "layer_types", None) or ())
    # Mistral's config has no layer types: its window, if any, applies to every layer.
    slides = "sliding_attention" in layer_types or not layer_types
    window = getattr(text, "sliding_window", None) if slides else None
    longest: int = min(text.max_position_embeddings, window or text.max_position_embeddings)
    return longest


def _eos_token_ids(model: Any) -> frozenset[int]:
    """Return the token IDs that end an answer: the generation config's, else the text config's."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])
