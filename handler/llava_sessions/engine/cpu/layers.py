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
from torch.nn.functional import scaled_dot_product_attention, silu

from . import attention, linears
from .operations import Activation, RowNorm, is_rms_norm

if TYPE_CHECKING:
    from .token_attention import TokenAttention  # importing it needs Numba

log = logging.getLogger(__name__)

# Names of the children that a layer, its attention and its MLP must have, and no others.
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Inputs on which an activation is compared with SiLU.
_SAMPLE = torch.linspace(-4, 4, 33)


class Batch(Protocol):
    """The sessions of one forward, as a fused layer uses them.

    `tasks`: those of compiled attention, see `CompiledLayers`, or None if the attention of some rows is not compiled.
    """

    tasks: Any

    def attend(self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate queries and keys, store keys and values, and return attention `[rows, heads * head_dim]`.

        `qkv`: `[rows, (heads + 2 * kv_heads) * head_dim]`, contiguous; rotated in place. `cos`, `sin`: `[rows,
        head_dim]`.
        """


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

    @property
    def parts(self) -> tuple[linears.PackedLinear, ...]:
        """The linears in the order of their use."""
        return (self.qkv, self.output, self.gate_up, self.down)

    @property
    def norms(self) -> tuple[RowNorm, RowNorm]:
        """The norms before attention and before the MLP."""
        return (self._input_norm, self._mlp_norm)

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
def compile_token_attention(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> TokenAttention | None:
    """Return compiled attention of single tokens.

    Returns None, with a warning in the log, if compilation fails or if the result differs from torch's numbers.
    """
    try:
        from .token_attention import TokenAttention

        compiled = TokenAttention(heads, kv_heads, head_dim, dtype)
        if _matches_torch(compiled, heads, kv_heads, head_dim, dtype):
            return compiled
        log.warning("token_attention_wrong heads=%d kv_heads=%d head_dim=%d", heads, kv_heads, head_dim)
    except Exception:  # any error of the compiler: torch's own attention is used instead
        log.warning("token_attention_missing", exc_info=True)
    return None


def _matches_torch(compiled: TokenAttention, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Return whether the compiled attention computes torch's numbers on a small example."""
    stored = 6
    capacity = 8
    width = heads + 2 * kv_heads
    allowed = 0.03 if dtype == torch.bfloat16 else 1e-4
    kv = torch.linspace(-9, 9, 2 * kv_heads * capacity * head_dim).sin().to(dtype)
    kv = kv.view(1, 2, kv_heads, capacity, head_dim)
    qkv = torch.linspace(-5, 5, 2 * width * head_dim).cos().to(dtype).view(2, -1)
    angles = torch.linspace(0, 3, head_dim // 2).repeat(2, 2)
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)
    out = torch.empty(2, heads * head_dim, dtype=dtype)
    compiled(compiled.task([(1, kv.data_ptr(), capacity, stored)]), 0, qkv, cos, sin, out)
    numbers = qkv.view(2, width, head_dim)
    attention.rotate(numbers[:, : heads + kv_heads], cos, sin)
    query, key, value = numbers[1].split((heads, kv_heads, kv_heads))
    if not torch.allclose(kv[0, 0, :, stored], key, atol=allowed, rtol=allowed):
        return False
    if not torch.allclose(kv[0, 1, :, stored], value, atol=allowed, rtol=allowed):
        return False
    keys, values = kv[0, :, :, : stored + 1].float()
    expected = scaled_dot_product_attention(query[None, :, None].float(), keys[None], values[None], enable_gqa=True)
    return torch.allclose(out[1].float(), expected.flatten(), atol=allowed, rtol=allowed)


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
