"""The variants of a model's layers that a decode step is measured with, on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_sessions.engine.model import Model
from llava_sessions.text.chat_template import ChatTemplate

from .day import Day, Findings
from .engines import load
from .models import Shape

PLAIN = "transformers' layers"
FUSED = "fused layers"
GRAPHS = "fused layers, graphs"


def of(day: Day, shape: Shape, found: Findings) -> Iterator[tuple[str, Model, ChatTemplate]]:
    """Yield each variant that this engine has, with its text side."""
    model, template = load(day, shape)
    yield PLAIN, model, template


def fastest(engine_model: type[Model], made: Any) -> Model:
    """Return the engine's model of a transformers model, in the fastest variant that this engine has."""
    return engine_model(made)
