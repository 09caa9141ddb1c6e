"""Fused layer of a vision tower for the CPU: four packed linears and attention.

`fuse_layers` replaces any layer that has the structure and the numbers of CLIP's and SigLIP's, or of InternVL's, which
scales the numbers before both residual additions. Other layers stay unchanged. Queries, keys and values are one linear;
both norms, the activation and, without scales, both residual additions are part of linears. Measurements:
bench/README.md, "The CPU's fast paths one by one".
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch

from ..fused.layer import all_or_none_have_bias, child_names, side_by_side
from ..fused.linear import PackedLinear
from ..fused.operations import Activation, RowNorm, same_activation
from . import attention, linears

log = logging.getLogger(__name__)

_ACTIVATIONS = (Activation.QUICK_GELU, Activation.GELU_TANH, Activation.GELU)
# Rows of the example on which a fused layer is compared with the plain one.
_SAMPLE_ROWS = 20
_LEAST_ERROR = 1e-5  # relative, in float32: sums of products in another order, more of them in a larger layer


@dataclass(frozen=True)
class _Names:
    """Names of the parts of a layer. A layer and its attention must have these children, and no others.

    `ignored`, `attention_ignored`: children that must do nothing, such as the norms of queries and keys in a tower
    without them. `scales`: of the layer's own parameters, `[hidden]`. `more`: arguments after the hidden states.
    """

    attention: str
    output: str
    norms: tuple[str, str]
    ignored: frozenset[str] = frozenset()
    attention_ignored: frozenset[str] = frozenset()
    scales: tuple[str, ...] = ()
    more: tuple[None, ...] = ()

    @property
    def layer(self) -> frozenset[str]:
        """All children of a layer."""
        return self.ignored | {self.attention, "mlp", *self.norms}

    @property
    def projections(self) -> frozenset[str]:
        """All children of the attention."""
        return self.attention_ignored | {"q_proj", "k_proj", "v_proj", self.output}


# CLIP's and SigLIP's layers, which take a mask, and InternVL's.
_KINDS = (
    _Names("self_attn", "out_proj", ("layer_norm1", "layer_norm2"), more=(None,)),
    _Names(
        "attention",
        "projection_layer",
        ("layernorm_before", "layernorm_after"),
        ignored=frozenset({"dropout"}),
        attention_ignored=frozenset({"projection_dropout", "q_norm", "k_norm"}),
        scales=("lambda_1", "lambda_2"),
    ),
)
_MLP = {"activation_fn", "fc1", "fc2"}


@dataclass(frozen=True)
class _Parts:
    """The parts of a plain layer. `scales`: of attention and MLP, `[hidden]`, or None."""

    names: _Names
    attention: Any
    output: Any
    attention_norm: Any
    mlp_norm: Any
    mlp: Any
    activation: Activation
    scales: tuple[torch.Tensor | None, torch.Tensor | None]


class FusedPictureLayer(torch.nn.Module):
    """A layer of a vision tower with the call signature of transformers' own layers."""

    def __init__(self, parts: _Parts) -> None:
        """Pack the weights of a plain layer, given by its parts."""
        # Not `super().__init__()`: in the classes of `_fused_class`, that makes the plain layer's parameters.
        torch.nn.Module.__init__(self)
        projections = parts.attention
        self._heads: int = projections.num_heads
        self._scaling: float = projections.scale
        self._attention_norm = RowNorm(parts.attention_norm)
        self._mlp_norm = RowNorm(parts.mlp_norm)
        self._attention_scale, self._mlp_scale = parts.scales
        self.qkv = linears.pack(side_by_side(projections.q_proj, projections.k_proj, projections.v_proj))
        self.output = linears.pack(parts.output)
        self.up = linears.pack(parts.mlp.fc1, parts.activation)
        self.down = linears.pack(parts.mlp.fc2)

    def forward(self, hidden_states: torch.Tensor, attention_mask: None = None, **_: object) -> torch.Tensor:
        """Map hidden states `[pictures, patches, hidden]` to hidden states of the same shape.

        Every patch attends to all patches of its picture: `attention_mask` must be None.
        """
        pictures, patches, _hidden = hidden_states.shape
        qkv = self.qkv(hidden_states, norm=self._attention_norm).view(pictures, patches, 3, self._heads, -1)
        query, keys, values = qkv.permute(2, 0, 3, 1, 4)
        attended = attention.full_attention(query, keys, values, self._scaling).transpose(1, 2).flatten(2)
        rows = _added(self.output, attended, hidden_states, self._attention_scale)
        return _added(self.down, self.up(rows, norm=self._mlp_norm), rows, self._mlp_scale)


def _added(linear: PackedLinear, rows: torch.Tensor, added: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Return `added` plus the linear of the rows, times `scale` if there is one."""
    if scale is None:
        out: torch.Tensor = linear(rows, added)
        return out
    return torch.addcmul(added, linear(rows), scale)


@torch.inference_mode()
def fuse_layers(tower: torch.nn.Module) -> int:
    """Replace the layers of a vision tower by fused ones where they fit, and return the number of fused layers.

    A fused layer is tried on a small example. If it fails or the plain layer's numbers differ, the plain layer stays,
    with a warning in the log.
    """
    found = [
        (parent, name, child, parts)
        for parent in tower.modules()
        for name, child in parent.named_children()
        if (parts := _parts_of(child)) is not None
    ]
    count = 0
    for parent, name, plain, parts in found:
        try:
            kind: Any = type(plain)
            fused = _fused_class(kind)(parts)
            matches = _matches(fused, plain, parts)
        except Exception:  # a class of layers whose attention or arguments are others than CLIP's
            log.warning("picture_layer_failed name=%s class=%s", name, type(plain).__name__, exc_info=True)
            continue
        if matches:
            setattr(parent, name, fused)
            count += 1
        else:
            log.warning("picture_layer_wrong name=%s class=%s", name, type(plain).__name__)
    return count


@functools.cache
def _fused_class(plain: type[torch.nn.Module]) -> Any:
    """Return a class of fused layers that is a subclass of the plain layer's class.

    transformers records hidden states by hooks on instances of that class (`transformers/utils/output_capturing.py`).
    """
    return type(f"Fused{plain.__name__}", (FusedPictureLayer, plain), {})


def _parts_of(layer: Any) -> _Parts | None:
    """Return the parts of a layer that `FusedPictureLayer` can replace, or None for any other module.

    All weights have one precision that can be packed.
    """
    names = next((kind for kind in _KINDS if child_names(layer) == kind.layer), None)
    if names is None:
        return None
    projections = getattr(layer, names.attention)
    own = {name for name, _ in layer.named_parameters(recurse=False)}
    if child_names(projections) != names.projections or child_names(layer.mlp) != _MLP or own != set(names.scales):
        return None
    ignored = [getattr(layer, name) for name in names.ignored]
    ignored += [getattr(projections, name) for name in names.attention_ignored]
    output = getattr(projections, names.output)
    norms = [getattr(layer, name) for name in names.norms]
    qkv = [projections.q_proj, projections.k_proj, projections.v_proj]
    fits = (
        all(map(linears.packable, [*qkv, output, layer.mlp.fc1, layer.mlp.fc2]))
        and len({parameter.dtype for parameter in layer.parameters()}) == 1
        and all_or_none_have_bias(qkv)
        and all(linear.out_features == output.in_features for linear in qkv)
        and all(map(_is_layer_norm, norms))
        and all(isinstance(module, (torch.nn.Identity, torch.nn.Dropout)) for module in ignored)
    )
    activation = next((one for one in _ACTIVATIONS if same_activation(layer.mlp.activation_fn, one)), None)
    if not fits or activation is None:
        return None
    scales = [getattr(layer, name).detach() for name in names.scales] or [None, None]
    return _Parts(names, projections, output, norms[0], norms[1], layer.mlp, activation, (scales[0], scales[1]))


def _is_layer_norm(norm: Any) -> bool:
    """Return whether the module is a layer norm of the last dimension, with weight and bias."""
    if type(norm) is not torch.nn.LayerNorm or len(norm.normalized_shape) != 1:
        return False
    return norm.weight is not None and norm.bias is not None


def _matches(fused: torch.nn.Module, plain: Any, parts: _Parts) -> bool:
    """Return whether both layers compute the same numbers on a small example, up to the rounding of the precision."""
    weight: torch.Tensor = parts.attention_norm.weight
    rows = torch.linspace(-9, 9, _SAMPLE_ROWS * len(weight)).sin().view(1, _SAMPLE_ROWS, -1).to(weight.dtype)
    expected = plain(rows, *parts.names.more).float()
    rounding = torch.finfo(weight.dtype).eps
    allowed = rounding * expected.norm() + max(_LEAST_ERROR, 8 * rounding) * (expected - rows).norm()
    return bool((fused(rows, *parts.names.more).float() - expected).norm() <= allowed)
