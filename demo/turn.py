"""The result of one turn of the demo, from the server or from the stateless baseline."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TurnResult:
    """The answer and the times of one turn. `engine_ms` is the engine's part of the TTFT; 0 for a stateless turn."""

    text: str
    ttft_ms: float
    total_ms: float
    engine_ms: float = 0.0
