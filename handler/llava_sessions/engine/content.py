"""The content of a conversation: token IDs, pictures and their features; and the content that two sessions share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

from ..ipc.messages import PreparedPicture


@dataclass(eq=False)
class Features:
    """Features of one picture, `[image tokens, hidden]` on the device. Shared by all sessions that show the picture."""

    rows: torch.Tensor


class FeatureStore:
    """The features of all open sessions by picture key. An entry exists as long as a session shows the picture."""

    def __init__(self) -> None:
        self._by_key: WeakValueDictionary[str, Features] = WeakValueDictionary()
        self.hits = 0  # pictures of requests for which `get` returned features
        self.encoded = 0  # pictures that `add` received

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    @property
    def device_bytes(self) -> int:
        """Bytes of all features on the device."""
        return sum(features.rows.nbytes for features in self._by_key.values())

    def get(self, key: str) -> Features | None:
        """Return the features of a picture, or None if no open session shows it encoded."""
        features = self._by_key.get(key)
        self.hits += features is not None
        return features

    def add(self, key: str, features: Features) -> None:
        """Make features available to other sessions."""
        self.encoded += 1
        self._by_key[key] = features


@dataclass
class SessionPicture:
    """A picture of a session: `prepared` until it is encoded, `features` from then on.

    `pieces`: the rest of a clip's encoding between two steps of the engine, see `vision.clip_pieces`.
    """

    key: str
    prepared: PreparedPicture | None
    features: Features | None = None
    pieces: Iterator[torch.Tensor | None] | None = None

    @property
    def image_tokens(self) -> int:
        """Image tokens of an encoded picture; 0 before."""
        return 0 if self.features is None else len(self.features.rows)

    def attach(self, store: FeatureStore) -> None:
        """Take the features if another session has them; release the prepared arrays of an encoded picture."""
        if self.features is None:
            self.features = store.get(self.key)
        if self.features is not None:
            self.prepared = None
            self.pieces = None


@dataclass(eq=False)
class SessionContent:
    """Token IDs and pictures of a session.

    `image_positions`: sorted indices in `token_ids` whose embeddings are features, those of the first of `pictures`
    first.
    """

    token_ids: list[int]
    image_positions: list[int]
    pictures: list[SessionPicture]

    @property
    def encoded(self) -> bool:
        """Whether all pictures have features."""
        return all(picture.features is not None for picture in self.pictures)

    @property
    def unencoded_tokens(self) -> int:
        """Image tokens of the pictures without features."""
        return len(self.image_positions) - sum(picture.image_tokens for picture in self.pictures)

    def pictures_within(self, tokens: int) -> int | None:
        """Return the number of pictures in the first `tokens` tokens.

        None if it is unknown until more pictures are encoded. Raises ValueError if the tokens end inside a picture.
        """
        if tokens == len(self.token_ids):
            return len(self.pictures)
        places = bisect_left(self.image_positions, tokens)
        passed = 0
        for index, picture in enumerate(self.pictures):
            if passed >= places:
                return _checked(index, passed, places)
            if picture.features is None:
                return None
            passed += picture.image_tokens
        return _checked(len(self.pictures), passed, places)

    def truncate(self, tokens: int, pictures: int) -> None:
        """Discard all but the first `tokens` tokens and their `pictures` pictures."""
        del self.token_ids[tokens:]
        del self.pictures[pictures:]
        del self.image_positions[bisect_left(self.image_positions, tokens) :]

    def rows(self, first: int, last: int) -> torch.Tensor | None:
        """Return rows `first` to `last` of the concatenated features of all pictures, or None if there are none."""
        if first == last:
            return None
        parts = []
        offset = 0
        for picture in self.pictures:
            if picture.features is None:
                raise RuntimeError("a session runs before its pictures are encoded")
            rows = picture.features.rows
            part = rows[max(first - offset, 0) : max(last - offset, 0)]
            offset += len(rows)
            if len(part):
                parts.append(part)
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _checked(pictures: int, passed: int, places: int) -> int:
    if passed != places:
        raise ValueError("the kept tokens end inside a picture")
    return pictures


def check_feature_count(pictures: Sequence[SessionPicture], image_tokens: int) -> None:
    """Raise ValueError if all pictures are encoded and do not have one feature per image token."""
    features = sum(picture.image_tokens for picture in pictures)
    if features != image_tokens and all(picture.features is not None for picture in pictures):
        found = f"{features} features for {image_tokens} image tokens"
        raise ValueError(f"the checkpoint's processor and vision tower disagree: {found}")


def unencoded_keys(content: SessionContent) -> tuple[str, ...]:
    """Return the keys of the pictures without features, in order."""
    return tuple(picture.key for picture in content.pictures if picture.features is None)


def opening_key(content: SessionContent, salt: str) -> Hashable:
    """Return a key that is equal for equal content and equal `salt`."""
    keys = tuple(picture.key for picture in content.pictures)
    return salt, tuple(content.token_ids), keys, tuple(content.image_positions)


def shared_tokens(one: SessionContent, other: SessionContent, most: int) -> int:
    """Return the length of the longest common prefix of two contents, of at most `most` tokens.

    Token IDs, places of image tokens and picture keys are equal in the prefix. It does not end inside a picture. The
    pictures of `other` in its first `most` tokens are encoded.
    """
    length = _common(one.token_ids[:most], other.token_ids[:most])
    equal_places = _common(one.image_positions, other.image_positions)
    for content in (one, other):
        length = min([length, *content.image_positions[equal_places : equal_places + 1]])
    places = bisect_left(one.image_positions, length)
    passed = 0
    for mine, theirs in zip(one.pictures, other.pictures, strict=False):
        if mine.key != theirs.key or not theirs.image_tokens or passed + theirs.image_tokens > places:
            break
        passed += theirs.image_tokens
    return length if passed == places else one.image_positions[passed]


def _common(one: list[int], other: list[int]) -> int:
    """Return the length of the common prefix of two lists."""
    if one == other:
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def released_bytes(removed: Iterable[SessionPicture], kept: Iterable[SessionPicture]) -> int:
    """Return the bytes of the features that only the `removed` pictures use. `kept`: all other pictures."""
    features = {id(picture.features): picture.features for picture in removed}
    for picture in kept:
        features.pop(id(picture.features), None)
    return sum(each.rows.nbytes for each in features.values() if each is not None)
