"""The rates that the linears of a model reach on this machine, which bound the ratios of `chats` and `decode`.

Measured in the same run, with the packed linears that the engine uses.
"""

from __future__ import annotations

import time

import torch

from llava_sessions.engine.cpu.linears import PackedLinear, pack, packable

from .machine import synchronize
from .reference import Reference


def picture_flops(reference: Reference) -> float:
    """Return the operations of one encode's linears: the vision layers whose output is used, and the projector."""
    model = reference.model.model
    config = reference.model.config
    vision = config.vision_config
    layers = next(part for name, part in model.vision_tower.named_modules() if name.endswith("layers"))
    used = config.vision_feature_layer + (len(layers) + 1 if config.vision_feature_layer < 0 else 0)
    patches = (vision.image_size // vision.patch_size) ** 2
    return 2.0 * patches * (_weights(*layers[:used]) + _weights(model.multi_modal_projector))


def token_flops(reference: Reference) -> float:
    """Return the operations of one prompt token's linears, without the head, which runs for the last token only."""
    return 2.0 * _weights(reference.model.model.language_model)


def _weights(*modules: torch.nn.Module) -> int:
    return sum(linear.weight.numel() for linear in _linears(*modules))


def _linears(*modules: torch.nn.Module) -> list[torch.nn.Linear]:
    return [part for module in modules for part in module.modules() if isinstance(part, torch.nn.Linear)]


def language_linears(reference: Reference) -> list[torch.nn.Linear]:
    """Return the linears of the language model and its head, in the order of a forward."""
    return _linears(reference.model.model.language_model, reference.model.lm_head)


class Linears:
    """The linears of the language model and its head, each packed as in the engine."""

    def __init__(self, reference: Reference) -> None:
        found = language_linears(reference)
        with torch.inference_mode():
            self._layers = [pack(one) if packable(one) else one for one in found]
        # Bytes of weights that a decode step reads.
        self.weight_bytes: int = sum(
            one.weight_bytes if isinstance(one, PackedLinear) else one.weight.nbytes for one in self._layers
        )
        self._weights = sum(one.weight.numel() for one in found)
        self._device = reference.device
        self._dtype = reference.model.dtype
        self.row_bytes_s = 0.0
        self.flops_s = 0.0

    def measure_row(self, repeats: int = 3) -> None:
        """Measure bytes of weights per second with one row, and keep the best value."""
        for _ in range(repeats):
            self.row_bytes_s = max(self.row_bytes_s, self.weight_bytes / self._time(1))

    def measure_rows(self, repeats: int = 2, rows: int = 256) -> None:
        """Measure operations per second with many rows, and keep the best value."""
        for _ in range(repeats):
            self.flops_s = max(self.flops_s, 2.0 * rows * self._weights / self._time(rows))

    @torch.inference_mode()
    def _time(self, rows: int) -> float:
        inputs = {
            one.in_features: torch.randn(1, rows, one.in_features, dtype=self._dtype, device=self._device)
            for one in self._layers
        }
        synchronize(self._device)
        began = time.perf_counter()
        for one in self._layers:
            one(inputs[one.in_features])
        synchronize(self._device)
        return time.perf_counter() - began
