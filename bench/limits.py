"""Owns what the linears of a model can reach on this machine at best: a ratio that they rule out is no fault of the
engine. Taken with the layers that the engine computes with, on the spot.
"""

from __future__ import annotations

import time

import torch

from llava_sessions.engine.cpu.linears import PackedLinear, pack, packable

from .machine import synchronize
from .reference import Reference


def picture_flops(reference: Reference) -> float:
    """Of the linears of one encode: the vision layers up to the last whose output is used, and the projector."""
    model, config = reference.model.model, reference.model.config
    vision = config.vision_config
    layers = next(part for name, part in model.vision_tower.named_modules() if name.endswith("layers"))
    used = config.vision_feature_layer + (len(layers) + 1 if config.vision_feature_layer < 0 else 0)
    patches = (vision.image_size // vision.patch_size) ** 2
    return 2.0 * patches * (_weights(*layers[:used]) + _weights(model.multi_modal_projector))


def token_flops(reference: Reference) -> float:
    """Of the linears that every token of a prompt runs through; the head runs for the last one alone."""
    return 2.0 * _weights(reference.model.model.language_model)


def _weights(*modules: torch.nn.Module) -> int:
    return sum(linear.weight.numel() for linear in _linears(*modules))


def _linears(*modules: torch.nn.Module) -> list[torch.nn.Linear]:
    return [part for module in modules for part in module.modules() if isinstance(part, torch.nn.Linear)]


class Linears:
    """The language model's linears and its head, each weight in the layout that the engine computes in."""

    def __init__(self, reference: Reference) -> None:
        found = _linears(reference.model.model.language_model, reference.model.lm_head)
        with torch.inference_mode():
            self._layers = [pack(one) if packable(one) else one for one in found]
        # What a decode step reads of them.
        self.weight_bytes: int = sum(
            one.weight_bytes if isinstance(one, PackedLinear) else one.weight.nbytes for one in self._layers
        )
        self._weights = sum(one.weight.numel() for one in found)
        self._device, self._dtype = reference.device, reference.model.dtype
        self.row_bytes_s = 0.0
        self.flops_s = 0.0

    def measure_row(self, repeats: int = 3) -> None:
        """Look again: bytes of weights a second with one row; the best seen stays."""
        for _ in range(repeats):
            self.row_bytes_s = max(self.row_bytes_s, self.weight_bytes / self._time(1))

    def measure_rows(self, repeats: int = 2, rows: int = 256) -> None:
        """Look again: operations a second with many rows; the best seen stays."""
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
