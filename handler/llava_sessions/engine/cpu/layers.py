"""Fused decoder layer for the CPU: four packed linears and few small operations.

`FusedLayer` replaces any decoder layer that has the structure and the numbers of Llama's; other layers stay unchanged.
Queries, keys and values are one linear, gate and up projection another, and each residual addition is part of the
linear in front of it. Measurements: bench/README.md, "The CPU's fast paths one by one".
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import silu

from . import linears
from .operations import Activation, RowNorm, is_rms_norm
from .token_checks import ExampleCache, matches_torch

if TYPE_CHECKING:
    from .amx_layer import CompiledLayer  # importing it needs Numba
    from .amx_sessions import SessionAttention
    from .token_attention import TokenAttention

log = logging.getLogger(__name__)

# Names of the children that a layer, its attention and its MLP must have, and no others.
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Inputs on which an activation is compared with SiLU.
_SAMPLE = torch.linspace(-4, 4, 33)


class Batch(Protocol):
    """The sessions of one forward, as a fused layer uses them.

    `tasks`: those of compiled attention, see `CompiledLayer`, or None if the attention of some rows is not compiled.
    """

    tasks: Any

    def attend(self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate queries and keys, store keys and values, and return attention `[rows, heads * head_dim]`.

        `qkv`: `[rows, (heads + 2 * kv_heads) * head_dim]`, contiguous; rotated in place. `cos`, `sin`: `[rows,
        head_dim]`.
        """


class Heads(Protocol):
    """Dimensions and precision of KV caches, see `KVShape`."""

    @property
    def layers(self) -> int:
        """Layers of a cache."""

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


class FusedLayer(torch.nn.Module):
    """A decoder layer of Llama, Mistral or Qwen2 with the call signature of transformers' own layers."""

    def __init__(self, plain: Any, pack: linears.Pack) -> None:
        """Pack the weights of `plain`, a decoder layer for which `_fits` returns True, by `pack`."""
        super().__init__()
        projections = plain.self_attn
        mlp = plain.mlp
        self.layer: int = projections.layer_idx
        self._input_norm = RowNorm(plain.input_layernorm)
        self._mlp_norm = RowNorm(plain.post_attention_layernorm)
        self.qkv = pack(side_by_side(projections.q_proj, projections.k_proj, projections.v_proj))
        self.output = pack(projections.o_proj)
        self.gate_up = pack(side_by_side(mlp.gate_proj, mlp.up_proj), Activation.GATED_SILU)
        self.down = pack(mlp.down_proj)
        self._compiled: CompiledLayer | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether the layer is one call of compiled loops."""
        return self._compiled is not None

    def use_parts(self) -> None:
        """Run each part by itself."""
        self._compiled = None

    def compile(self, tokens: TokenAttention, sessions: SessionAttention | None) -> None:
        """Compile the layer as a whole, if all its linears are of tiles of one kind.

        `tokens`, `sessions`: see `CompiledLayer`.
        """
        packed = (self.qkv, self.output, self.gate_up, self.down)
        parts = [part for part in packed if isinstance(part, linears.TileLinear)]
        if len(parts) == len(packed) and len({type(part) for part in parts}) == 1:
            from .amx_layer import CompiledLayer  # it needs Numba

            self._compiled = CompiledLayer(self.layer, parts, (self._input_norm, self._mlp_norm), tokens, sessions)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        packed: Batch,
        **_: object,
    ) -> torch.Tensor:
        """Map hidden states `[1, rows, hidden]` to hidden states of the same shape."""
        cos, sin = position_embeddings
        rows = hidden_states[0]
        if self._compiled is not None and packed.tasks is not None:
            return self._compiled(rows, packed.tasks, cos[0], sin[0])[None]
        attended = packed.attend(self.layer, self.qkv(rows, norm=self._input_norm), cos[0], sin[0])
        rows = self.output(attended, rows)
        out: torch.Tensor = self.down(self.gate_up(rows, norm=self._mlp_norm), rows)
        return out[None]


@torch.inference_mode()
def fuse_layers(layers: torch.nn.ModuleList, pack: linears.Pack = linears.pack) -> bool:
    """Replace all decoder layers by fused ones, with linears of `pack`.

    If one of them does not fit, change nothing and return False.
    """
    if not all(map(_fits, layers)):
        return False
    for index, layer in enumerate(layers):
        layers[index] = FusedLayer(layer, pack)
    return True


@torch.inference_mode()
def compile_token_attention(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype | None = None, layers: int = 1
) -> TokenAttention | None:
    """Return compiled attention of single tokens, see `TokenAttention`.

    Returns None, with a warning in the log, if compilation fails or if the result differs from torch's numbers.
    """
    try:
        from .token_attention import TokenAttention

        compiled = TokenAttention(heads, kv_heads, head_dim, dtype, kv_dtype, layers)
        cache = ExampleCache(layers, kv_heads, 8, head_dim, dtype, kv_dtype)
        if matches_torch(compiled, cache, heads):
            return compiled
        log.warning("token_attention_wrong heads=%d kv_heads=%d head_dim=%d", heads, kv_heads, head_dim)
    except Exception:  # any error of the compiler: torch's own attention is used instead
        log.warning("token_attention_missing", exc_info=True)
    return None


@torch.inference_mode()
def compile_layers(
    layers: torch.nn.ModuleList, tokens: TokenAttention, sessions: SessionAttention | None, heads: Heads
) -> None:
    """Compile each fused layer as a whole where that is possible; leave all as they are if it fails.

    `tokens`, `sessions`: see `CompiledLayer`. `heads`: dimensions of the KV caches. The first layer is tried on an
    example; a failure is a warning in the log.
    """
    fused: list[Any] = list(layers)
    try:
        for layer in fused:
            layer.compile(tokens, sessions)
        if all(_whole_matches_parts(layer, tokens, heads) for layer in fused[:1]):
            return
        log.warning("compiled_layer_wrong")
    except Exception:  # any error of the compiler
        log.warning("compiled_layer_missing", exc_info=True)
    for layer in fused:
        layer.use_parts()


class _Example:
    """Two sessions with one new token each, as a `Batch`, on KV caches of their own."""

    def __init__(self, layer: int, tokens: TokenAttention, heads: Heads) -> None:
        stored = 5
        size = (layer + 1 if heads.kv_dtype is None else heads.layers, heads.kv_heads, stored + 1, heads.head_dim)
        self._caches = [ExampleCache(*size, heads.dtype, heads.kv_dtype) for _ in range(2)]
        task = tokens.task([(row, cache.address, stored + 1, stored) for row, cache in enumerate(self._caches)])
        self._kv_width = 2 * heads.kv_heads * heads.head_dim
        self._tokens = tokens
        self.tasks = (task, None)

    def attend(self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """As `Batch.attend`."""
        out = qkv.new_empty(len(qkv), qkv.shape[1] - self._kv_width)
        self._tokens(self.tasks[0], layer, qkv, cos, sin, out)
        return out


def _whole_matches_parts(layer: FusedLayer, tokens: TokenAttention, heads: Heads) -> bool:
    """Return whether a layer gives the same numbers as one call and part by part. It is then as it was before."""
    if not layer.is_compiled:
        return True
    rows = torch.linspace(-9, 9, 2 * layer.qkv.in_features).cos().view(1, 2, -1).to(heads.dtype)
    angles = torch.linspace(0, 3, heads.head_dim // 2).repeat(1, 2, 2)
    position = (angles.cos().to(heads.dtype), angles.sin().to(heads.dtype))
    whole = layer(rows, position, _Example(layer.layer, tokens, heads))
    compiled, layer._compiled = layer._compiled, None
    parts = layer(rows, position, _Example(layer.layer, tokens, heads))
    layer._compiled = compiled
    return torch.equal(whole, parts)


def side_by_side(*parts: torch.nn.Linear) -> torch.nn.Linear:
    """Return one linear whose output is the concatenated outputs of `parts`, in their order."""
    weight = torch.cat([linear.weight.detach() for linear in parts])
    joined = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = torch.nn.Parameter(weight, requires_grad=False)
    if parts[0].bias is not None:
        bias = torch.cat([linear.bias.detach() for linear in parts])
        joined.bias = torch.nn.Parameter(bias, requires_grad=False)
    return joined


def _fits(layer: Any) -> bool:
    """Return whether `FusedLayer` can replace the layer: its parts, its norms and its activation are Llama's, and all
    weights have one precision that can be packed.
    """
    if child_names(layer) != _LAYER:
        return False
    projections = layer.self_attn
    mlp = layer.mlp
    if child_names(projections) != _ATTENTION or child_names(mlp) != _MLP:
        return False
    qkv = [projections.q_proj, projections.k_proj, projections.v_proj]
    gate_up = [mlp.gate_proj, mlp.up_proj]
    return (
        all(map(linears.packable, [*qkv, projections.o_proj, *gate_up, mlp.down_proj]))
        and len({parameter.dtype for parameter in layer.parameters()}) == 1
        and all_or_none_have_bias(qkv)
        and all_or_none_have_bias(gate_up)
        and all(is_rms_norm(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        and torch.equal(mlp.act_fn(_SAMPLE), silu(_SAMPLE))
    )


def all_or_none_have_bias(parts: Iterable[torch.nn.Linear]) -> bool:
    """Return whether either all linears have a bias or none has."""
    return len({linear.bias is None for linear in parts}) == 1


def child_names(module: torch.nn.Module) -> set[str]:
    """Return the names of the module's direct children."""
    return {name for name, _ in module.named_children()}
