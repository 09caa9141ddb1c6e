"""The order of work: the tokens of each session that run in the next step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Schedulable(Protocol):
    """A session with work. `ticket` is the order of arrival of its latest request."""

    ticket: int

    @property
    def pending_tokens(self) -> int:
        """Known tokens that are not in the KV cache yet."""


S = TypeVar("S", bound=Schedulable)


def plan(sessions: Iterable[S], chunk_tokens: int) -> list[tuple[S, int]]:
    """Return the sessions of the next step, each with the number of its pending tokens to run.

    Every session with one pending token runs (decode). Longer prompts share `chunk_tokens` in order of arrival, so a
    long prefill delays running answers by at most one chunk per step.
    """
    waiting = sorted((s for s in sessions if s.pending_tokens), key=lambda s: s.ticket)
    steps = [(s, 1) for s in waiting if s.pending_tokens == 1]
    for session in waiting:
        if chunk_tokens and session.pending_tokens > 1:
            tokens = min(session.pending_tokens, chunk_tokens)
            chunk_tokens -= tokens
            steps.append((session, tokens))
    return steps
