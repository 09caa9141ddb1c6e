"""Pictures and clips in a rendered chat template and in token IDs. Pure, so thread-safe.

A chat template writes one *place* token for each picture or clip. The processor replaces it by an *expansion*: text
with one *feature token* for each feature of the vision tower. In LLaVA's families the expansion of a picture is its
place token, repeated. In InternVL it also has text before, after and between the feature tokens, and the feature token
of a clip is that of a picture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from .pictures import Prepared


@dataclass(frozen=True)
class MediaToken:
    """The tokens of one kind of media. `place`: what the template writes for one picture or clip.

    `feature`, `feature_id`: the token of each feature, and its ID. `tail`: the text of every expansion after its last
    feature token, such as InternVL's `</img>`.
    """

    place: str
    feature: str
    feature_id: int
    tail: str


class MediaTokens:
    """The tokens of all kinds of media that a checkpoint takes."""

    def __init__(self, by_kind: Mapping[str, MediaToken]) -> None:
        """`by_kind`: of "image", and of "video" if the checkpoint takes clips."""
        self._by_kind = by_kind
        self._kinds = {token.place: kind for kind, token in by_kind.items()}
        self._places = re.compile("(" + "|".join(map(re.escape, self._kinds)) + ")")
        self.feature_ids = frozenset(token.feature_id for token in by_kind.values())

    def __getitem__(self, kind: str) -> MediaToken:
        return self._by_kind[kind]

    def __contains__(self, kind: str) -> bool:
        return kind in self._by_kind

    def kinds(self, rendered: str) -> list[str]:
        """Return the kinds of the media that rendered text has places for, in order."""
        return [self._kinds[place] for place in self._places.findall(rendered)]

    def split(self, rendered: str, places: int) -> tuple[str, str]:
        """Return rendered text up to and including its first `places` places, and the text after them."""
        if not places:
            return "", rendered
        parts = self._places.split(rendered, places)
        return "".join(parts[:-1]), parts[-1]

    def expand(self, rendered: str, prepared: Prepared) -> str | None:
        """Return rendered text with the expansions of pictures and clips; None unless its places are exactly theirs."""
        if self.kinds(rendered) != list(prepared.kinds):
            return None
        texts = self._places.split(rendered)[::2]
        return "".join(chain.from_iterable(zip(texts, (*prepared.tokens, ""), strict=True)))

    def spans(self, token_ids: Sequence[int], prepared: Sequence[Prepared], start: int) -> tuple[tuple[int, int], ...]:
        """Return the positions of the first feature token, and one after the last one, of each picture and clip.

        `token_ids`: of a conversation that shows `prepared`, in order, from token `start` on.
        """
        ids = np.asarray(token_ids[start:], np.int64)
        positions = start + np.flatnonzero(np.isin(ids, list(self.feature_ids)))
        spans = []
        first = 0
        for one in prepared:
            for kind, tokens in zip(one.kinds, one.tokens, strict=True):
                last = first + tokens.count(self._by_kind[kind].feature) - 1
                spans.append((int(positions[first]), int(positions[last]) + 1))
                first = last + 1
        return tuple(spans)
