"""Owns the order of work: which picture is encoded next, and which tokens of which session go into this step.

Must not know the model, or what a token means.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler sees of a session. `ticket` is the order of arrival of what it waits for."""

    ticket: int

    @property
    def pending_tokens(self) -> int:
        """Tokens that are known but not yet in the KV cache."""

    @property
    def encoded(self) -> bool:
        """Whether the picture's features are there."""


S = TypeVar("S", bound=Schedulable)


def next_to_encode(sessions: Iterable[S]) -> S | None:
    """The session that has waited longest for its picture to be encoded."""
    return min((s for s in sessions if not s.encoded), key=lambda s: s.ticket, default=None)


def plan(sessions: Iterable[S], chunk_tokens: int) -> list[tuple[S, int]]:
    """The sessions of this step and how many of their pending tokens run in it.

    Every session with one pending token runs (decode); longer prompts share `chunk_tokens`, first come, first served,
    so that a long prefill never stalls the running answers for longer than one chunk.
    """
    waiting = sorted((s for s in sessions if s.encoded and s.pending_tokens), key=lambda s: s.ticket)
    steps = [(s, 1) for s in waiting if s.pending_tokens == 1]
    for session in waiting:
        if chunk_tokens and session.pending_tokens > 1:
            tokens = min(session.pending_tokens, chunk_tokens)
            chunk_tokens -= tokens
            steps.append((session, tokens))
    return steps
