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
        if _whole_matches_parts(stack, tokens, sessions, heads):
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
    """Sessions as a `Batch`, on KV caches of their own: two with one new token each, and one with several new tokens.

    The latter only with compiled attention for it. `rows`: new tokens of all sessions.
    """

    def __init__(self, layers: int, tokens: TokenAttention, sessions: SessionAttention | None, heads: Heads) -> None:
        stored, more = 5, 3
        size = (layers, heads.kv_heads, stored + more, heads.head_dim)
        self._caches = [ExampleCache(*size, heads.dtype, heads.kv_dtype) for _ in range(3)]
        first, second, third = (cache.address for cache in self._caches)
        task = tokens.task([(0, first, stored + more, stored), (1, second, stored + more, stored)])
        longer = None if sessions is None else sessions.task([(2, more, third, stored + more, stored)])
        self.rows = 2 if sessions is None else 2 + more
        self._kv_width = 2 * heads.kv_heads * heads.head_dim
        self._tokens = tokens
        self._sessions = sessions
        self.tasks = (task, longer)

    def attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: HeadNorms | None = None
    ) -> torch.Tensor:
        """As `Batch.attend`."""
        out = qkv.new_empty(len(qkv), qkv.shape[1] - self._kv_width)
        self._tokens(self.tasks[0], layer, qkv, cos, sin, out, norms)
        if self._sessions is not None and self.tasks[1] is not None:
            self._sessions(self.tasks[1], layer, qkv, cos, sin, out, norms)
        return out


def _whole_matches_parts(
    stack: LayerStack, tokens: TokenAttention, sessions: SessionAttention | None, heads: Heads
) -> bool:
    """Return whether the layers give the same numbers in one call and part by part."""
    first, second = (_Example(len(stack.layers), tokens, sessions, heads) for _ in range(2))
    rows = torch.linspace(-9, 9, first.rows * stack.hidden).cos().view(1, first.rows, -1).to(heads.dtype)
    angles = torch.linspace(0, 3, heads.head_dim // 2).repeat(1, first.rows, 2)
    position = (angles.cos().to(heads.dtype), angles.sin().to(heads.dtype))
    return torch.equal(stack(rows, position, first), stack.run_parts(rows, position, second))
