"""Pictures and clips in a rendered chat template and in token IDs. Pure, so thread-safe.

A chat template writes one *place* token for each picture or clip. The processor replaces it by an *expansion*: text
with one *feature token* for each feature of the vision tower. In LLaVA's families the expansion of a picture is its
place token, repeated. In InternVL it also has text before, after and between the feature tokens, and the feature token
of a clip is that of a picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np

from ..errors import Refused
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
        self.places = tuple(self._kinds)
        self._places = re.compile("(" + "|".join(map(re.escape, self.places)) + ")")
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

    def check(self, kinds: Iterable[str]) -> None:
        """Raise `Refused` unless the checkpoint takes media of these kinds."""
        if not all(kind in self._by_kind for kind in kinds):
            raise Refused("unsupported_media", "The media must be pictures for this model, got a clip.")

    def expand(self, rendered: str, prepared: Prepared) -> str:
        """Replace the place of each picture and clip by its expansion, as the processor does.

        Raises `Refused` unless the places of the rendered text are exactly those of `prepared`.
        """
        places = self.kinds(rendered)
        if places != list(prepared.kinds):
            raise no_place(prepared.kinds, places)
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


def no_place(kinds: Sequence[str], places: Sequence[str]) -> Refused:
    """Return the error for media of these kinds where the template has places for media of the kinds `places`."""
    message = (
        f"The pictures and clips must fit the model's chat template: it has places here for {_listed(places)}, "
        f"got {_listed(kinds)}."
    )
    return Refused("invalid_request", message)


def _listed(kinds: Sequence[str]) -> str:
    """Return kinds of media as text, such as "2 pictures, then 1 clip"."""
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
    nouns = {"image": "picture", "video": "clip"}
    return ", then ".join(f"{count} {nouns[kind]}{'s' * (count != 1)}" for kind, count in runs) or "nothing"
