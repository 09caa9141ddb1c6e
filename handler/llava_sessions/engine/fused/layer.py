"""Fused decoder layer: four linears and few small operations, on a CPU and on CUDA.

`FusedLayer` replaces any decoder layer that has the structure and the numbers of Llama's, or of Qwen3's with its norms
of query and key heads. Other layers stay unchanged. Queries, keys and values are one linear, gate and up projection
another, and each residual addition is part of the linear in front of it. The kind of linears depends on the device, see
`Pack`. Measurements on a CPU: bench/README.md, "The CPU's fast paths one by one".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.nn.functional import silu

from . import head_norms
from .head_norms import HeadNorms
from .linear import Pack, PackedLinear
from .operations import Activation, RowNorm, is_rms_norm

# Names of the children that a layer, its attention and its MLP must have, and no others. Attention may have head norms.
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Inputs on which an activation is compared with SiLU.
_SAMPLE = torch.linspace(-4, 4, 33)


class Batch(Protocol):
    """The sessions of one forward, as a fused layer uses them.

    `tasks`: those of compiled attention, see `cpu.amx_layers.CompiledLayers`, or None if the attention of some rows is
    not compiled.
    """

    tasks: Any

    def attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: HeadNorms | None = None
    ) -> torch.Tensor:
        """Norm and rotate queries and keys, store keys and values, and return attention `[rows, heads * head_dim]`.

        `qkv`: `[rows, (heads + 2 * kv_heads) * head_dim]`, contiguous; may be changed. `cos`, `sin`: `[rows,
        head_dim]`. `norms`: of the query and key heads, before the rotation; None for a model without them.
        """


class FusedLayer(torch.nn.Module):
    """A decoder layer of Llama, Mistral, Qwen2 or Qwen3 with the call signature of transformers' own layers.

    `head_norms`: of Qwen3's queries and keys, else None. The batch computes them, see `Batch.attend`.
    """

    def __init__(self, plain: Any, pack: Pack) -> None:
        """Pack the weights of `plain`, a decoder layer for which `fits` returns True, by `pack`."""
        super().__init__()
        projections = plain.self_attn
        mlp = plain.mlp
        self.layer: int = projections.layer_idx
        self.input_norm = RowNorm(plain.input_layernorm)
        self.mlp_norm = RowNorm(plain.post_attention_layernorm)
        self.head_norms: HeadNorms | None = head_norms.of_attention(projections)
        self.qkv = pack(side_by_side(projections.q_proj, projections.k_proj, projections.v_proj))
        self.output = pack(projections.o_proj)
        self.gate_up = pack(side_by_side(mlp.gate_proj, mlp.up_proj), Activation.GATED_SILU)
        self.down = pack(mlp.down_proj)

    @property
    def parts(self) -> tuple[PackedLinear, ...]:
        """The linears in the order of their use."""
        return (self.qkv, self.output, self.gate_up, self.down)

    @property
    def norms(self) -> tuple[RowNorm, RowNorm]:
        """The norms before attention and before the MLP."""
        return (self.input_norm, self.mlp_norm)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        packed: Batch,
        **_: object,
    ) -> torch.Tensor:
        """Map hidden states `[1, rows, hidden]` to hidden states of the same shape. May change `hidden_states`."""
        cos, sin = position_embeddings
        rows = hidden_states[0]
        # Without a name, queries, keys and values are freed before the next product.
        attended = packed.attend(self.layer, self.qkv(rows, norm=self.input_norm), cos[0], sin[0], self.head_norms)
        rows = self.output(attended, rows)
        out: torch.Tensor = self.down(self.gate_up(rows, norm=self.mlp_norm), rows)
        return out[None]


@torch.inference_mode()
def fuse_layers(layers: torch.nn.ModuleList, pack: Pack, packable: Callable[[Any], bool]) -> bool:
    """Replace all decoder layers by fused ones, with linears of `pack`. The plain weights are freed layer by layer.

    `packable`: whether `pack` takes a module. If one of the layers does not fit, or if some layers have head norms and
    others have none, change nothing and return False.
    """
    if not all(fits(layer, packable) for layer in layers):
        return False
    if len({frozenset(child_names(layer.get_submodule("self_attn"))) for layer in layers}) > 1:
        return False
    for index, layer in enumerate(layers):
        layers[index] = FusedLayer(layer, pack)
    return True


def side_by_side(*parts: torch.nn.Linear) -> torch.nn.Linear:
    """Return one linear whose output is the concatenated outputs of `parts`, in their order."""
    weight = torch.cat([linear.weight.detach() for linear in parts])
    joined = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = torch.nn.Parameter(weight, requires_grad=False)
    if parts[0].bias is not None:
        bias = torch.cat([linear.bias.detach() for linear in parts])
        joined.bias = torch.nn.Parameter(bias, requires_grad=False)
    return joined


@torch.inference_mode()
def fits(layer: Any, packable: Callable[[Any], bool]) -> bool:
    """Return whether `FusedLayer` can replace the layer.

    Its parts, its norms and its activation must be Llama's or Qwen3's, and all weights must have one precision that can
    be packed. `heads * head_dim` may differ from the hidden size.
    """
    if child_names(layer) != _LAYER:
        return False
    projections = layer.self_attn
    mlp = layer.mlp
    children = child_names(projections)
    if children not in (_ATTENTION, _ATTENTION | head_norms.NAMES) or child_names(mlp) != _MLP:
        return False
    qkv = [projections.q_proj, projections.k_proj, projections.v_proj]
    gate_up = [mlp.gate_proj, mlp.up_proj]
    return (
        all(map(packable, [*qkv, projections.o_proj, *gate_up, mlp.down_proj]))
        and len({parameter.dtype for parameter in layer.parameters()}) == 1
        and all_or_none_have_bias(qkv)
        and all_or_none_have_bias(gate_up)
        and all(is_rms_norm(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        and (children == _ATTENTION or head_norms.are_head_norms(projections))
        and torch.equal(mlp.act_fn(_SAMPLE), silu(_SAMPLE))
    )


def all_or_none_have_bias(parts: Iterable[torch.nn.Linear]) -> bool:
    """Return whether either all linears have a bias or none has."""
    return len({linear.bias is None for linear in parts}) == 1


def child_names(module: torch.nn.Module) -> set[str]:
    """Return the names of the module's direct children."""
    return {name for name, _ in module.named_children()}
