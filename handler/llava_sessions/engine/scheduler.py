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


def plan(sessions: Iterable[S], chunk_tokens: int, whole_tokens: int = 0) -> list[tuple[S, int]]:
    """Return the sessions of the next step, each with the number of its pending tokens to run.

    Every session with one pending token runs (decode). Longer prompts share `chunk_tokens` in order of arrival, so a
    long prefill delays running answers by at most one chunk per step.

    With `whole_tokens`, chunks are for steps with decodes only. Without a decode the first prompt runs whole, or its
    next `whole_tokens` tokens. Other prompts join it if all of them together have at most `chunk_tokens` tokens.
    """
    waiting = sorted((s for s in sessions if s.pending_tokens), key=lambda s: s.ticket)
    steps = [(s, 1) for s in waiting if s.pending_tokens == 1]
    prompts = [s for s in waiting if s.pending_tokens > 1]
    is_whole = bool(whole_tokens) and not steps
    for session in prompts:
        if is_whole and not steps:
            tokens = min(session.pending_tokens, whole_tokens)
        elif is_whole and session.pending_tokens > chunk_tokens:
            break
        else:
            tokens = min(session.pending_tokens, chunk_tokens)
        chunk_tokens = max(chunk_tokens - tokens, 0)
        if tokens:
            steps.append((session, tokens))
    return steps
