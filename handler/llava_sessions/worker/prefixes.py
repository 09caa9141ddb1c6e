"""Conversations as token IDs: what two of them have in common. Pure.

A conversation is compared by its token IDs and by the keys of its pictures. Image tokens are equal for all pictures.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

# Prefixes are found by hashes of so many tokens each.
LINK_TOKENS = 16


@dataclass(frozen=True)
class PictureSpan:
    """A picture of a conversation: its image tokens are `token_ids[start:end]`. `key` identifies the features."""

    start: int
    end: int
    key: str


@dataclass(frozen=True, eq=False)
class Prompt:
    """A whole conversation up to the new answer, `[tokens]`. `links`: see `links_of`."""

    token_ids: np.ndarray
    spans: tuple[PictureSpan, ...]
    links: list[int] = field(default_factory=list)

    def pictures_before(self, token: int) -> int:
        """Return how many pictures begin before a token."""
        return bisect_left(self.spans, token, key=lambda span: span.start)


@dataclass(frozen=True)
class Rewrite:
    """How a question of a named session continues it: behind its first `kept_tokens` tokens, in the engine.

    `base_turns`: as in `TurnRecord`. `sent_ids`: the tokens that follow the kept ones; the record of the turn begins at
    the end of a whole turn, so it may have more.
    """

    base_turns: int
    kept_tokens: int
    sent_ids: list[int]


@dataclass(eq=False)
class HeldConversation:
    """What the engine holds for an implicit session: `token_ids`, `[tokens]`, and pictures that begin at `starts`.

    `root`: see `root_of`. `links`: see `links_of`. `fork_base`: the session is an attempt at a turn that another
    session has answered, and shares so many tokens with it; None otherwise. `first_prompt_tokens`,
    `last_prompt_tokens`: tokens before the first and before the latest answer.
    """

    root: int
    fork_base: int | None = None
    token_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    starts: tuple[int, ...] = ()
    links: list[int] = field(default_factory=list)
    turns: int = 0
    first_prompt_tokens: int = 0
    last_prompt_tokens: int = 0


def common_prefix(held_ids: np.ndarray, held_keys: Sequence[str], prompt: Prompt) -> int:
    """Return how many tokens of a prompt are held already: fewer than all, and never a part of a picture.

    `held_ids`: `[tokens]`. `held_keys`: keys of the pictures that are held, in order.
    """
    most = min(len(held_ids), len(prompt.token_ids) - 1)
    differing = np.flatnonzero(held_ids[:most] != prompt.token_ids[:most])
    common = int(differing[0]) if differing.size else most
    for index, span in enumerate(prompt.spans):
        if span.start >= common:
            break
        if span.end > common or index >= len(held_keys) or held_keys[index] != span.key:
            return span.start
    return common


def links_of(root: int, token_ids: Sequence[int], spans: Iterable[PictureSpan], known: Sequence[int] = ()) -> list[int]:
    """Return one hash for each `LINK_TOKENS` tokens, of these tokens, their pictures and all before them.

    Equal links mean equal prefixes, up to collisions. `known`: the first links of the result.
    """
    keys: dict[int, list[str]] = {}
    for span in spans:
        keys.setdefault(span.start // LINK_TOKENS, []).append(span.key)
    links = list(known)
    previous = links[-1] if links else root
    for number in range(len(links), len(token_ids) // LINK_TOKENS):
        start = number * LINK_TOKENS
        previous = hash((previous, *token_ids[start : start + LINK_TOKENS], *keys.get(number, ())))
        links.append(previous)
    return links


def root_of(label: str | None, scope: str | None) -> int:
    """Return the start of the links of conversations. Only conversations of equal label and scope have equal links."""
    return hash((label, scope))
