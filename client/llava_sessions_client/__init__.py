"""Python client of LLaVA Sessions: open a session on a picture, ask questions, close it."""

from .chat import (
    CLOSED_HEADER,
    SESSION_HEADER,
    Answer,
    Chat,
    WireError,
    checked,
    gauges,
    png,
    settled_gauges,
)

__all__ = [
    "CLOSED_HEADER",
    "SESSION_HEADER",
    "Answer",
    "Chat",
    "WireError",
    "checked",
    "gauges",
    "png",
    "settled_gauges",
]
