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

# Prompt tokens of one step with answers, if nothing else is configured or measured.
DEFAULT_CHUNK_TOKENS = 256
# The longest piece of a prompt on a GPU, unless a longer chunk is configured. It bounds the memory of a forward.
LONGEST_GPU_PIECE = 2048
# In a step without answers a prompt runs in pieces of so many chunks: each piece reads all weights and attends to the
# pieces before it. The longest piece bounds the memory of a forward, and the time that a command waits for its end.
_WHOLE_CHUNKS = 4
# A step takes no commands. A piece of a prompt is not to take longer than this.
_LONGEST_PIECE_S = 2.0
# Forwards of fewer tokens say little about the time of a token.
_LEAST_TOKENS = 64


class PieceSize:
    """The largest pieces of prompts, in tokens.

    `chunk_tokens`: in a step with answers. `tokens`: in a step without; at most `most_tokens`, fewer on a slow machine.
    """

    def __init__(self, chunk_tokens: int, *, on_gpu: bool) -> None:
        """A piece has four chunks; on a GPU at most 2,048 tokens, or one chunk if that is longer."""
        self.chunk_tokens = chunk_tokens
        whole_tokens = _WHOLE_CHUNKS * chunk_tokens
        self.most_tokens = max(min(whole_tokens, LONGEST_GPU_PIECE), chunk_tokens) if on_gpu else whole_tokens
        self.tokens = self.most_tokens

    def note(self, tokens: int, taken_s: float) -> None:
        """Note the time of a forward of `tokens` tokens."""
        if tokens >= _LEAST_TOKENS:
            fitting = int(_LONGEST_PIECE_S * tokens / max(taken_s, 1e-9))
            self.tokens = min(self.most_tokens, max(self.chunk_tokens, fitting))

    def limit(self, tokens: int) -> None:
        """Use no longer pieces than `tokens` from now on, but at least a chunk."""
        self.most_tokens = max(min(tokens, self.most_tokens), self.chunk_tokens)
        self.tokens = min(self.tokens, self.most_tokens)


def plan(sessions: Iterable[S], chunk_tokens: int, whole_tokens: int) -> list[tuple[S, int]]:
    """Return the sessions of the next step, each with the number of its pending tokens to run.

    Every session with one pending token runs (decode). Longer prompts share `chunk_tokens` in order of arrival, so a
    long prefill delays running answers by at most one chunk per step.

    Without a decode the first prompt runs whole, or its next `whole_tokens` tokens. Other prompts join it if all of
    them together have at most `chunk_tokens` tokens.
    """
    waiting = sorted((s for s in sessions if s.pending_tokens), key=lambda s: s.ticket)
    steps = [(s, 1) for s in waiting if s.pending_tokens == 1]
    prompts = [s for s in waiting if s.pending_tokens > 1]
    is_whole = not steps
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
