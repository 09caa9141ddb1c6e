"""Owns the decoder layer as a CPU computes it fast: few large packed linears and few small operations.

Must not know sessions or transformers' classes: it takes the place of any decoder layer that looks and computes like
Llama's, and leaves the others. Queries, keys and values come of one linear, gate and up projection of another, and the
residual additions are part of the linears behind them.

What it gains together with `decode.py` (bench model, 2 cores of an AMD EPYC with avx512_bf16, on a busy machine, best
of alternating steps; packed linears in plain layers, fused layers, compiled attention of single tokens too): decode of
1 chat 70, 67, 55 ms; of 4 chats 218, 186, 88 ms; of 16 chats 339, 328, 111 ms; a follow-up of 45 tokens 221, 219, 192.
In float32 (2 cores without AVX-512), tokens a second over those of separate forwards of `transformers`, each in one run
(plain layers and linears, all of this with float32 weights, and with float16 ones): 1 chat 1.0, 1.3, 2.3; 4 chats 1.6,
3.5, 6.7; 8 chats 2.6, 4.8, 6.5; 16 chats 3.8, 6.8, 8.5.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from ...engine import attention
from . import linears

if TYPE_CHECKING:
    from .token_attention import TokenAttention

log = logging.getLogger(__name__)

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_SAMPLE = torch.linspace(-4, 4, 33)


class Batch(Protocol):
    """The sessions of a forward, as a layer sees them."""

    def attend(self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotates and stores keys and values, `[rows, (heads + 2 * kv_heads) * head_dim]` together with the queries;
        returns what the rows attend to, `[rows, heads * head_dim]`.
        """


class FusedLayer(torch.nn.Module):
    """A decoder layer of Llama, Mistral or Qwen2; its forward takes what transformers' text model hands to a layer."""

    def __init__(self, plain: torch.nn.Module) -> None:
        super().__init__()
        attention, mlp = plain.self_attn, plain.mlp
        self.layer = attention.layer_idx
        self.input_norm, self.mlp_norm = plain.input_layernorm, plain.post_attention_layernorm
        self.qkv = linears.pack(side_by_side(attention.q_proj, attention.k_proj, attention.v_proj))
        self.output = linears.pack(attention.o_proj)
        self.gate_up = linears.pack(side_by_side(mlp.gate_proj, mlp.up_proj))
        self.down = linears.pack(mlp.down_proj)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        packed: Batch,
        **_: object,
    ) -> torch.Tensor:
        """`[1, rows, hidden]` -> the same."""
        cos, sin = position_embeddings
        rows = hidden_states[0]
        attended = packed.attend(self.layer, self.qkv(_normed(self.input_norm, rows)), cos[0], sin[0])
        rows = self.output(attended, rows)
        gate, up = self.gate_up(_normed(self.mlp_norm, rows)).chunk(2, -1)
        return self.down(silu(gate).mul_(up), rows)[None]


@torch.inference_mode()
def fuse_layers(layers: torch.nn.ModuleList) -> bool:
    """Replace decoder layers by fused ones, where every one of them can be; False and nothing changed else."""
    if not all(map(_fits, layers)):
        return False
    for index, layer in enumerate(layers):
        layers[index] = FusedLayer(layer)
    return True


@torch.inference_mode()
def token_attention(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> TokenAttention | None:
    """Attention of single tokens as machine code; None where that can't be made or computes something else."""
    try:
        from .token_attention import TokenAttention

        found = TokenAttention(heads, kv_heads, head_dim, dtype)
        if _is_attention(found, heads, kv_heads, head_dim, dtype):
            return found
        log.warning("token_attention_wrong heads=%d kv_heads=%d head_dim=%d", heads, kv_heads, head_dim)
    except Exception:  # whatever is in the way, torch's own calls remain
        log.warning("token_attention_missing", exc_info=True)
    return None


def _is_attention(found: TokenAttention, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether it gives torch's numbers on a small example."""
    stored, width, allowed = 6, heads + 2 * kv_heads, 0.03 if dtype == torch.bfloat16 else 1e-4
    numbers = torch.linspace(-9, 9, 2 * kv_heads * 8 * head_dim).sin().to(dtype)
    kv = numbers.view(1, 2, kv_heads, 8, head_dim)
    qkv = torch.linspace(-5, 5, 2 * width * head_dim).cos().to(dtype).view(2, -1)
    angles = torch.linspace(0, 3, head_dim // 2).repeat(2, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    out = torch.empty(2, heads * head_dim, dtype=dtype)
    found(found.task([(1, kv.data_ptr(), 8, stored)]), 0, qkv, cos, sin, out)
    numbers = qkv.view(2, width, head_dim)
    attention.rotate(numbers[:, : heads + kv_heads], cos, sin)
    query, *new = numbers[1].split((heads, kv_heads, kv_heads))
    if not all(torch.allclose(kv[0, at, :, stored], one, atol=allowed, rtol=allowed) for at, one in enumerate(new)):
        return False
    keys, values = kv[0, :, :, : stored + 1].float()
    wanted = scaled_dot_product_attention(query[None, :, None].float(), keys[None], values[None], enable_gqa=True)
    return torch.allclose(out[1].float(), wanted.flatten(), atol=allowed, rtol=allowed)


def side_by_side(*parts: torch.nn.Linear) -> torch.nn.Linear:
    """One linear that gives the outputs of several, one after the other."""
    weight = torch.cat([linear.weight.detach() for linear in parts])
    joined = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = torch.nn.Parameter(weight, requires_grad=False)
    if parts[0].bias is not None:
        bias = torch.cat([linear.bias.detach() for linear in parts])
        joined.bias = torch.nn.Parameter(bias, requires_grad=False)
    return joined


def _normed(norm: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return rms_norm(rows, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _fits(layer: torch.nn.Module) -> bool:
    """Whether a layer is made of what `FusedLayer` knows and nothing else, in one precision that can be packed."""
    if _names(layer) != _LAYER or _names(layer.self_attn) != _ATTENTION or _names(layer.mlp) != _MLP:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    found = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    found += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    biases = {linear.bias is None for linear in found[:3]}, {linear.bias is None for linear in found[4:6]}
    return (
        all(map(linears.packable, found))
        and len({parameter.dtype for parameter in layer.parameters()}) == 1
        and all(len(kinds) == 1 for kinds in biases)
        and all(_is_rms(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        and torch.equal(mlp.act_fn(_SAMPLE), silu(_SAMPLE))
    )


def _is_rms(norm: torch.nn.Module) -> bool:
    if {name for name, _ in norm.named_parameters()} != {"weight"} or not hasattr(norm, "variance_epsilon"):
        return False
    rows = torch.linspace(-1, 1, 2 * norm.weight.numel(), dtype=norm.weight.dtype).view(2, -1)
    allowed = 0.02 if rows.dtype == torch.bfloat16 else 1e-5
    return torch.allclose(norm(rows), _normed(norm, rows), atol=allowed, rtol=allowed)


def _names(module: torch.nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
