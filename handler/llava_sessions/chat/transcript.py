"""The record of a session: the pictures or the clip that it was opened on, and each finished turn.

A transcript holds everything that is needed to rebuild the session's KV cache, and everything that a retried request
is answered from. Records are only ever appended. Lengths, positions and counts are derived from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..text.chat_template import OpenedOn, Opening
from .blobs import Blob as Blob
from .blobs import BlobPool as BlobPool
from .media import ClipSpan, MessageMedia, RecordMedia, StoredClip, by_message

_SHORT_ID_CHARS = 8
_ANSWERS_KEPT = 8


@dataclass(frozen=True)
class OpenRecord:
    """How a session began. `opened_at_s` and `expires_at_s` are seconds since the epoch.

    `token_digest` is the sha256 (hex) of the caller's session token, if one was given. `retry_key` identifies a retry
    of the open. `kind` is "image" or "video". `pictures` are the blobs in the order of the prompt, and `token_ids` is
    the prompt up to and including the last image token; empty for a session without pictures. `history_turns`: turns of
    a history that the session was opened with; `token_ids` then ends with the last answer. `groups`, `clips`: as in
    `RecordMedia`. A session of kind "video" without `clips` was opened on one clip, whose frames are `pictures`.
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
    history_turns: int = 0
    groups: tuple[int, ...] = ()
    clips: tuple[ClipSpan, ...] = ()

    @property
    def opened_on(self) -> OpenedOn:
        """The pictures of the opening, or its clip, which is one however many frames it has."""
        return OpenedOn(self.kind, 1 if self.kind == "video" else len(self.pictures))

    @property
    def media(self) -> tuple[MessageMedia, ...]:
        """The media of the opening, or of each message of its history that has some."""
        if self.kind == "video" and not self.clips:
            return (MessageMedia(clips=(StoredClip(self.pictures),)),)
        return by_message(RecordMedia(self.pictures, self.groups, self.clips))


@dataclass(frozen=True)
class TurnRecord:
    """One finished turn: the tokens that it added, and the reply that a retry receives (`text`, `facts`).

    `answer_ids` are without the end-of-sequence token. `base_turns`: the turn follows the first so many turns, and
    replaces all later ones; `BEFORE_OPENING`: it replaces the opening too, and `prompt_ids` is the whole conversation.
    None: it follows all turns. `pictures`, `groups`, `clips`: as in `RecordMedia`.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    pictures: tuple[Blob, ...]
    retry_key: str | None
    text: str
    facts: dict[str, Any]
    base_turns: int | None = None
    groups: tuple[int, ...] = ()
    clips: tuple[ClipSpan, ...] = ()

    @property
    def media(self) -> tuple[MessageMedia, ...]:
        """The media of each message that has some."""
        return by_message(RecordMedia(self.pictures, self.groups, self.clips))


# `TurnRecord.base_turns` of a turn that replaces the session's opening.
BEFORE_OPENING = -1


class Transcript:
    """All records of one session. Not thread-safe; `records()` returns a snapshot that may cross threads.

    A turn may replace earlier ones. Its record is appended all the same: `turns` are those that count, `log` has all.
    """

    def __init__(self, opening: OpenRecord, log: Iterable[TurnRecord] = ()) -> None:
        """`log`: the records of all turns, in the order of writing."""
        self.opening = opening
        self._log: list[TurnRecord] = []
        self._turns: list[TurnRecord] = []
        self._opening_counts = True
        self.replaced_bytes = 0  # of the pictures of turns that later ones have replaced
        for turn in log:
            self.append(turn)

    @property
    def turns(self) -> tuple[TurnRecord, ...]:
        """The turns of the conversation, oldest first."""
        return tuple(self._turns)

    @property
    def log(self) -> tuple[TurnRecord, ...]:
        """All turns, also replaced ones without their tokens and pictures, in the order of writing."""
        return tuple(self._log)

    @property
    def replaced_turns(self) -> int:
        """Number of turns that later ones have replaced."""
        return len(self._log) - len(self._turns)

    def append(self, turn: TurnRecord) -> None:
        """Add a finished turn, and drop the tokens and pictures of those that it replaces."""
        base = turn.base_turns
        if base is not None:
            replaced = {id(one): one for one in self._turns[max(base, 0) :]}
            self.replaced_bytes += sum(len(picture.data) for one in replaced.values() for picture in one.pictures)
            del self._turns[max(base, 0) :]
            self._log = [_without_tokens(one) if id(one) in replaced else one for one in self._log]
            if base <= 0:
                self._opening_counts = base != BEFORE_OPENING
        self._turns.append(turn)
        self._log.append(turn)

    def records(self) -> tuple[OpenRecord | TurnRecord, ...]:
        """Return all records, in the order of writing."""
        return (self.opening, *self._log)

    @property
    def opening_ids(self) -> list[int]:
        """Token IDs before the first turn: those of the opening, unless a turn has replaced it."""
        return self.opening.token_ids if self._opening_counts else []

    @property
    def media(self) -> tuple[MessageMedia, ...]:
        """The media of the conversation, of each message that has some."""
        opening = self.opening.media if self._opening_counts else ()
        return (*opening, *(message for turn in self._turns for message in turn.media))

    @property
    def token_ids(self) -> list[int]:
        """Token IDs of the whole conversation, `[tokens]`."""
        turns = (token for turn in self._turns for token in (*turn.prompt_ids, *turn.answer_ids))
        return [*self.opening_ids, *turns]

    @property
    def token_count(self) -> int:
        """Length of `token_ids`."""
        turns = sum(len(turn.prompt_ids) + len(turn.answer_ids) for turn in self._turns)
        return len(self.opening_ids) + turns

    @property
    def answer_spans(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of each answer in `token_ids`. An image token inside an answer is ordinary text."""
        spans = []
        end = len(self.opening_ids)
        for turn in self._turns:
            start = end + len(turn.prompt_ids)
            end = start + len(turn.answer_ids)
            spans.append((start, end))
        return tuple(spans)

    def base_of(self, kept_tokens: int) -> tuple[int, int]:
        """Return `TurnRecord.base_turns` for a turn behind the first tokens, and the token at which its base ends."""
        end = len(self.opening_ids)
        if kept_tokens < end:
            return BEFORE_OPENING, 0
        for turns, (_, answer_end) in enumerate(self.answer_spans):
            if answer_end > kept_tokens:
                return self._base(turns), end
            end = answer_end
        return self._base(len(self._turns)), end

    def _base(self, turns: int) -> int:
        return turns if turns or self._opening_counts else BEFORE_OPENING

    @property
    def opened_on(self) -> OpenedOn | None:
        """The pictures or the clip that the next prompt follows directly; None after the first turn."""
        if self._turns or self.opening.history_turns:
            return None
        return self.opening.opened_on

    def find_answer(self, retry_key: str) -> int | None:
        """Return the index in `log` of the turn with this retry key, among the latest turns with any, or None.

        A question that is repeated much later with the same key is a new turn.
        """
        keyed = [index for index, turn in enumerate(self._log) if turn.retry_key is not None]
        latest = reversed(keyed[-_ANSWERS_KEPT:])
        return next((index for index in latest if self._log[index].retry_key == retry_key), None)


def _without_tokens(turn: TurnRecord) -> TurnRecord:
    return replace(turn, prompt_ids=[], answer_ids=[], pictures=(), groups=(), clips=())


def short_id(identity: str) -> str:
    """Return the beginning of a session or request ID for logs. A whole session ID is a secret."""
    return identity.removeprefix("ts-seq-").removeprefix("implicit-")[:_SHORT_ID_CHARS]


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
