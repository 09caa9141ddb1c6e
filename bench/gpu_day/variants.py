"""The variants of a model's layers that a decode step is measured with, on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from llava_sessions.engine.device import prepare
from llava_sessions.engine.model import Model
from llava_sessions.text.chat_template import ChatTemplate

from .attention import is_interpreted
from .day import Day, Findings
from .models import Shape, make

PLAIN = "transformers' layers"
FUSED = "fused layers"
GRAPHS = "fused layers, graphs"


class PlainModel(Model):
    """A model that keeps transformers' layers on a GPU."""

    def use_cuda_layers(self, *_: Any) -> None:
        """Change nothing."""


class FusedModel(Model):
    """A model with the fused layers of a GPU, whose steps run launch by launch until `start_graphs`."""

    def __init__(self, model: Any) -> None:
        """Take a transformers model on a GPU, or on a CPU with Triton's interpreter."""
        self._make_graph: Callable[..., Any] | None = None
        super().__init__(model)
        if self.device.type == "cpu" and is_interpreted():
            self.use_cuda_layers()

    def use_graphs(self, make_graph: Callable[..., Any]) -> None:
        """Keep the maker of graphs for later."""
        self._make_graph = make_graph

    def start_graphs(self) -> bool:
        """Run steps that only decode as graphs from now on. Return False if this engine has none here."""
        if self._make_graph is None:
            return False
        super().use_graphs(self._make_graph)
        return self.graphs is not None


def of(day: Day, shape: Shape, found: Findings) -> Iterator[tuple[str, Model, ChatTemplate]]:
    """Yield each variant that this engine has on the device, with its text side. Each one ends the one before."""
    made, template = make(shape, day.pick(torch.bfloat16, torch.float32), day.device)
    prepare(day.device)
    yield PLAIN, PlainModel(made), template
    fused = FusedModel(made)
    if fused.token_attention is None:
        found.notes.append(f"{shape.name}: the fused layers are not used here")
        found.check("the fused layers pass their trial", not (day.on_cuda or is_interpreted()))
        return
    yield FUSED, fused, template
    if fused.start_graphs():
        yield GRAPHS, fused, template
    else:
        found.notes.append(f"{shape.name}: no graphs here")
        found.check("graphs are used", not day.on_cuda)


def fastest(model: Any) -> Model:
    """Return the engine's model of a transformers model, in the fastest variant that this engine has."""
    fused = FusedModel(model)
    fused.start_graphs()
    return fused
