"""Fused layer of a vision tower for the CPU: four packed linears and attention.

`fuse_layers` replaces any layer that has the structure and the numbers of CLIP's and SigLIP's; other layers stay
unchanged. Queries, keys and values are one linear; both norms, the activation and both residual additions are part of
linears. Measurements: bench/README.md, "The CPU's fast paths one by one".
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from ..fused.layer import all_or_none_have_bias, child_names, side_by_side
from ..fused.operations import Activation, RowNorm, same_activation
from . import attention, linears

log = logging.getLogger(__name__)

# Names of the children that a layer, its attention and its MLP must have, and no others.
_LAYER = {"self_attn", "layer_norm1", "mlp", "layer_norm2"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "out_proj"}
_MLP = {"activation_fn", "fc1", "fc2"}
_ACTIVATIONS = (Activation.QUICK_GELU, Activation.GELU_TANH)
# Rows of the example on which a fused layer is compared with the plain one.
_SAMPLE_ROWS = 20


class FusedPictureLayer(torch.nn.Module):
    """A layer of a vision tower with the call signature of transformers' own layers."""

    def __init__(self, plain: Any, activation: Activation) -> None:
        """Pack the weights of `plain`, a layer for which `_activation_of` returns `activation`."""
        # Not `super().__init__()`: in the classes of `_fused_class`, that makes the plain layer's parameters.
        torch.nn.Module.__init__(self)
        projections = plain.self_attn
        self._heads: int = projections.num_heads
        self._scaling: float = projections.scale
        self._attention_norm = RowNorm(plain.layer_norm1)
        self._mlp_norm = RowNorm(plain.layer_norm2)
        self.qkv = linears.pack(side_by_side(projections.q_proj, projections.k_proj, projections.v_proj))
        self.output = linears.pack(projections.out_proj)
        self.up = linears.pack(plain.mlp.fc1, activation)
        self.down = linears.pack(plain.mlp.fc2)

    def forward(self, hidden_states: torch.Tensor, attention_mask: None = None, **_: object) -> torch.Tensor:
        """Map hidden states `[pictures, patches, hidden]` to hidden states of the same shape.

        Every patch attends to all patches of its picture: `attention_mask` must be None.
        """
        pictures, patches, _hidden = hidden_states.shape
        qkv = self.qkv(hidden_states, norm=self._attention_norm).view(pictures, patches, 3, self._heads, -1)
        query, keys, values = qkv.permute(2, 0, 3, 1, 4)
        attended = attention.full_attention(query, keys, values, self._scaling).transpose(1, 2).flatten(2)
        rows = self.output(attended, hidden_states)
        out: torch.Tensor = self.down(self.up(rows, norm=self._mlp_norm), rows)
        return out


@torch.inference_mode()
def fuse_layers(tower: torch.nn.Module) -> int:
    """Replace the layers of a vision tower by fused ones where they fit, and return the number of fused layers.

    A fused layer is tried on a small example. If it fails or the plain layer's numbers differ, the plain layer stays,
    with a warning in the log.
    """
    found = [
        (parent, name, child, activation)
        for parent in tower.modules()
        for name, child in parent.named_children()
        if (activation := _activation_of(child)) is not None
    ]
    count = 0
    for parent, name, plain, activation in found:
        try:
            kind: Any = type(plain)
            fused = _fused_class(kind)(plain, activation)
            matches = _matches(fused, plain)
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


def _activation_of(layer: Any) -> Activation | None:
    """Return the activation of a layer that `FusedPictureLayer` can replace, or None for any other module.

    The layer's parts are those of CLIP and SigLIP, and all weights have one precision that can be packed.
    """
    if child_names(layer) != _LAYER:
        return None
    projections = layer.self_attn
    mlp = layer.mlp
    if child_names(projections) != _ATTENTION or child_names(mlp) != _MLP:
        return None
    qkv = [projections.q_proj, projections.k_proj, projections.v_proj]
    fits = (
        all(map(linears.packable, [*qkv, projections.out_proj, mlp.fc1, mlp.fc2]))
        and len({parameter.dtype for parameter in layer.parameters()}) == 1
        and all_or_none_have_bias(qkv)
        and all(linear.out_features == projections.out_proj.in_features for linear in qkv)
        and all(map(_is_layer_norm, (layer.layer_norm1, layer.layer_norm2)))
    )
    if not fits:
        return None
    return next((one for one in _ACTIVATIONS if same_activation(mlp.activation_fn, one)), None)


def _is_layer_norm(norm: Any) -> bool:
    """Return whether the module is a layer norm of the last dimension, with weight and bias."""
    if type(norm) is not torch.nn.LayerNorm or len(norm.normalized_shape) != 1:
        return False
    return norm.weight is not None and norm.bias is not None


def _matches(fused: torch.nn.Module, plain: Any) -> bool:
    """Return whether both layers compute the same numbers on a small example, up to the rounding of the precision."""
    weight: Any = plain.layer_norm1.weight
    rows = torch.linspace(-9, 9, _SAMPLE_ROWS * len(weight)).sin().view(1, _SAMPLE_ROWS, -1).to(weight.dtype)
    expected = plain(rows, None).float()
    rounding = torch.finfo(weight.dtype).eps
    allowed = rounding * expected.norm() + 8 * rounding * (expected - rows).norm()
    return bool((fused(rows, None).float() - expected).norm() <= allowed)
