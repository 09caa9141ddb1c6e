"""All fused layers of a model as one module, which runs them in one call of compiled loops where that is possible."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from ..fused.head_norms import HeadNorms
from ..fused.layer import Batch, FusedLayer
from . import linears
from .example_cache import ExampleCache

if TYPE_CHECKING:
    from .amx_layers import CompiledLayers  # importing them needs Numba
    from .amx_sessions import SessionAttention
    from .token_attention import TokenAttention

log = logging.getLogger(__name__)


class Heads(Protocol):
    """Dimensions and precision of KV caches, see `KVShape`."""

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer."""

    @property
    def head_dim(self) -> int:
        """Numbers of a key."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of keys and values."""

    @property
    def kv_dtype(self) -> torch.dtype | None:
        """Precision in which they are stored."""


class LayerStack(torch.nn.Module):
    """Successive layers with the call signature of one of transformers' layers."""

    def __init__(self, layers: Sequence[FusedLayer], compiled: CompiledLayers) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self.hidden = layers[0].parts[0].in_features
        self._compiled = compiled

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        packed: Batch,
        **_: object,
    ) -> torch.Tensor:
        """Map hidden states `[1, rows, hidden]` to hidden states of the same shape."""
        if packed.tasks is None:
            return self.run_parts(hidden_states, position_embeddings, packed)
        cos, sin = position_embeddings
        return self._compiled(hidden_states[0], packed.tasks, cos[0], sin[0])[None]

    def run_parts(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], packed: Batch
    ) -> torch.Tensor:
        """As `forward`, one layer after the other."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings, packed)
        return hidden_states


@torch.inference_mode()
def stack_layers(
    layers: torch.nn.ModuleList, tokens: TokenAttention, sessions: SessionAttention | None, heads: Heads
) -> torch.nn.ModuleList:
    """Return a list of one `LayerStack` of all `layers`, or `layers` if they can't be compiled.

    `tokens`, `sessions`: see `CompiledLayers`. `heads`: dimensions of the KV caches. The stack is tried on an example;
    a failure is a warning in the log.
    """
    fused = [layer for layer in layers if isinstance(layer, FusedLayer)]
    parts = [[part for part in layer.parts if isinstance(part, linears.TileLinear)] for layer in fused]
    if len(fused) < len(layers) or not _are_alike(parts):
        return layers
    try:
        from .amx_layers import CompiledLayers  # it needs Numba

        norms = [layer.norms for layer in fused]
        compiled = CompiledLayers(parts, norms, [layer.head_norms for layer in fused], tokens, sessions)
        stack = LayerStack(fused, compiled)
        if _whole_matches_parts(stack, tokens, heads):
            return torch.nn.ModuleList([stack])
        log.warning("compiled_layers_wrong")
    except Exception:  # any error of the compiler
        log.warning("compiled_layers_missing", exc_info=True)
    return layers


def _are_alike(parts: Sequence[Sequence[linears.TileLinear]]) -> bool:
    """Return whether each layer has four linears of tiles, of one kind, with the sizes of the other layers."""
    sizes = {tuple((part.in_features, part.out_features) for part in layer) for layer in parts}
    kinds = {type(part) for layer in parts for part in layer}
    return len(sizes) == 1 and len(kinds) == 1 and len(parts[0]) == 4


class _Example:
    """Two sessions with one new token each, as a `Batch`, on KV caches of their own."""

    def __init__(self, layers: int, tokens: TokenAttention, heads: Heads) -> None:
        stored = 5
        size = (layers, heads.kv_heads, stored + 1, heads.head_dim)
        self._caches = [ExampleCache(*size, heads.dtype, heads.kv_dtype) for _ in range(2)]
        task = tokens.task([(row, cache.address, stored + 1, stored) for row, cache in enumerate(self._caches)])
        self._kv_width = 2 * heads.kv_heads * heads.head_dim
        self._tokens = tokens
        self.tasks = (task, None)

    def attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: HeadNorms | None = None
    ) -> torch.Tensor:
        """As `Batch.attend`."""
        out = qkv.new_empty(len(qkv), qkv.shape[1] - self._kv_width)
        self._tokens(self.tasks[0], layer, qkv, cos, sin, out, norms)
        return out


def _whole_matches_parts(stack: LayerStack, tokens: TokenAttention, heads: Heads) -> bool:
    """Return whether the layers give the same numbers in one call and part by part."""
    count = len(stack.layers)
    rows = torch.linspace(-9, 9, 2 * stack.hidden).cos().view(1, 2, -1).to(heads.dtype)
    angles = torch.linspace(0, 3, heads.head_dim // 2).repeat(1, 2, 2)
    position = (angles.cos().to(heads.dtype), angles.sin().to(heads.dtype))
    whole = stack(rows, position, _Example(count, tokens, heads))
    parts = stack.run_parts(rows, position, _Example(count, tokens, heads))
    return torch.equal(whole, parts)
