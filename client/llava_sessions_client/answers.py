"""Answers and turns: what the client returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .clips import Clip
from .pictures import Picture

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer. `cached_tokens` of the `prompt_tokens` were in the session's KV cache."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that the model had to compute."""
        return self.prompt_tokens - self.cached_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class Timings:
    """Milliseconds on the server, since the question arrived at the engine."""

    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True)
class Answer:
    """An answer. `str(answer)` is its text.

    `finish_reason`: "stop", "length", "deadline", "cancelled" or "shutdown". `ttft_s` and `total_s`: seconds on the
    client's clock from the call to the first piece and to the end, with retries; without a stream both are equal.
    `replayed`: whether the session was lost and opened again for this answer. `durable`: whether the journal has the
    turn; None without a journal. `token_ids`: with `return_token_ids`.
    """

    text: str
    finish_reason: str = STOP
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    ttft_s: float = 0.0
    total_s: float = 0.0
    request_id: str = ""
    replayed: bool = False
    durable: bool | None = None
    token_ids: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def is_kept(self) -> bool:
        """Whether the session has the turn. Cancelled turns, and turns that ended before a token, are rolled back."""
        if self.finish_reason in (STOP, LENGTH):
            return True
        return self.finish_reason != CANCELLED and self.usage.completion_tokens > 0


@dataclass(frozen=True)
class Turn:
    """A question with its pictures and its clip, and its answer."""

    text: str
    answer: Answer
    pictures: tuple[Picture, ...] = ()
    clip: Clip | None = None


HistoryTurn = Turn | tuple[str, str]


def to_turns(history: Sequence[HistoryTurn]) -> tuple[Turn, ...]:
    """Return a history as turns. A pair is a question and its answer."""
    return tuple(turn if isinstance(turn, Turn) else Turn(turn[0], Answer(turn[1])) for turn in history)


def usage_of(facts: Mapping[str, Any]) -> Usage:
    """Return the token counts of a reply in the native form or in OpenAI's."""
    usage = facts.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    cached = usage.get("cached_tokens", details.get("cached_tokens", 0))
    return Usage(usage.get("prompt_tokens", 0), cached, usage.get("completion_tokens", 0))


def timings_of(facts: Mapping[str, Any]) -> Timings:
    """Return the server's times of a reply."""
    timings = facts.get("timings") or {}
    return Timings(timings.get("queue_ms", 0.0), timings.get("ttft_ms", 0.0), timings.get("total_ms", 0.0))
