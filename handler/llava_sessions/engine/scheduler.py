"""Owns the order of work: which tokens of which session go into this step.

Must not know the model, or what a token means.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler sees of a working session. `ticket` is the order of arrival of what it works on."""

    ticket: int

    @property
    def pending_tokens(self) -> int:
        """Tokens that are known but not yet in the KV cache."""


S = TypeVar("S", bound=Schedulable)


def plan(sessions: Iterable[S], chunk_tokens: int) -> list[tuple[S, int]]:
    """The sessions of this step and how many of their pending tokens run in it.

    Every session with one pending token runs (decode); longer prompts share `chunk_tokens`, first come, first served,
    so that a long prefill never stalls the running answers for longer than one chunk.
    """
    waiting = sorted((s for s in sessions if s.pending_tokens), key=lambda s: s.ticket)
    steps = [(s, 1) for s in waiting if s.pending_tokens == 1]
    for session in waiting:
        if chunk_tokens and session.pending_tokens > 1:
            tokens = min(session.pending_tokens, chunk_tokens)
            chunk_tokens -= tokens
            steps.append((session, tokens))
    return steps
