"""The record of a session."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from ..text.chat_template import OpenedOn, Opening


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Blob:
    """The encoded bytes of a picture as they came; `sha256` (hex) names them."""

    sha256: str
    data: bytes = field(repr=False, compare=False)


class Blobs:
    """Equal pictures are one object for as long as anybody holds it. Thread-safe."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[str, Blob] = WeakValueDictionary()
        self._lock = threading.Lock()

    def of(self, data: bytes) -> Blob:
        """The blob of these bytes."""
        made = Blob(hashlib.sha256(data).hexdigest(), data)
        with self._lock:
            return self._held.setdefault(made.sha256, made)


@dataclass(frozen=True)
class OpenRecord:
    """How a session began. `opened_at_s` and `expires_at_s` are seconds since the epoch.

    `token_digest` is the sha256 (hex) of the caller's session token, where one was given, `retry_key` what a repetition
    of the open is known by; `kind` is "image" or "video", `pictures` are in the order in which they were shown, and
    `token_ids` is the prompt up to the last image token.
    """

    session_id: str
    opened_at_s: float
    expires_at_s: float
    token_digest: str | None
    kind: str
    pictures: tuple[Blob, ...]
    token_ids: list[int]
    image_tokens: int
    retry_key: str | None = None


@dataclass(frozen=True)
class TurnRecord:
    """One finished turn: what it added to the conversation, and what a retry of it is told (`text`, `facts`)."""

    prompt_ids: list[int]
    answer_ids: list[int]
    pictures: tuple[Blob, ...]
    retry_key: str | None
    text: str
    facts: dict[str, Any]


@dataclass
class Transcript:
    """All that rebuilds a session. Turns are only ever added."""

    open: OpenRecord
    turns: list[TurnRecord] = field(default_factory=list)

    def records(self) -> tuple[OpenRecord | TurnRecord, ...]:
        """The story as it is now, in the order of writing."""
        return (self.open, *self.turns)


def short_id(identity: str) -> str:
    """Ids are secrets: a log shows enough to tell two apart."""
    return identity.removeprefix("ts-seq-")[:8]


@dataclass
class Conversation:
    """The committed token ids of one chat: prompts and answers of every finished turn."""

    opening: Opening
    token_ids: list[int] = field(init=False)
    turns: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.opening.token_ids)

    @property
    def opened_on(self) -> OpenedOn | None:
        """The pictures that the next prompt follows; None once a turn has finished."""
        return self.opening.opened_on if self.turns == 0 else None

    def commit(self, prompt_ids: list[int], answer_ids: list[int]) -> None:
        """Add a finished turn; `answer_ids` without the end-of-sequence token."""
        self.token_ids += prompt_ids
        self.token_ids += answer_ids
        self.turns += 1
