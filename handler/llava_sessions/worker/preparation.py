"""Owns the work that must not hold up the pump: pictures are loaded, prompts made and journals read beside it.

Must not know rows, the session table or the engine. Thread-safe: its results are plain values.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..chat.transcript import Blob, Conversation, OpenRecord, Transcript, TurnRecord
from ..config import MediaLimits
from ..ipc.messages import OpenSession, PreparedPicture
from ..journal.journal import Journal
from ..media.decoder import load_bytes
from ..media.fetch import Fetcher
from ..media.sources import is_remote, read_base64, read_path
from ..protocol.requests import Ask, Open, PictureSource
from ..text.chat_template import ChatTemplate, Opening
from .sessions import not_found

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chat:
    """All that a session starts from, or is rebuilt from: what it was opened on, and its finished turns.

    `pictures` are those of the opening and of all turns, in order, ready for the engine.
    """

    opening: Opening
    blobs: tuple[Blob, ...]
    pictures: tuple[PreparedPicture, ...]
    turns: tuple[TurnRecord, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        """Of the whole conversation."""
        return [*self.opening.token_ids, *(token for turn in self.turns for token in turn.prompt_ids + turn.answer_ids)]

    def conversation(self) -> Conversation:
        """The conversation up to its last finished turn, without pictures' arrays."""
        conversation = Conversation(self.opening.without_arrays())
        for turn in self.turns:
            conversation.commit(turn.prompt_ids, turn.answer_ids)
        return conversation

    def command(self, session_id: str) -> OpenSession:
        """What makes an engine hold the session."""
        spans, end = [], len(self.opening.token_ids)
        for turn in self.turns:
            start = end + len(turn.prompt_ids)
            end = start + len(turn.answer_ids)
            spans.append((start, end))
        return OpenSession(session_id, self.token_ids, self.pictures, tuple(spans))

    def story(self, record: OpenRecord) -> Transcript:
        """The session's journal, under the record of its open."""
        return Transcript(record, list(self.turns))


@dataclass(frozen=True)
class Question:
    """One turn's new tokens and pictures; `chat` is what to rebuild its session from, where that is not at hand.

    `story`: the session's journal, where it had to be read.
    """

    prompt_ids: list[int]
    pictures: tuple[PreparedPicture, ...] = ()
    blobs: tuple[Blob, ...] = ()
    chat: Chat | None = None
    story: Transcript | None = None


@dataclass(frozen=True)
class _Loaded:
    blobs: tuple[Blob, ...] = ()
    keyed: list[tuple[str, Image.Image]] = field(default_factory=list)


class Preparer:
    """Runs what may take long: decoding in a few threads, and in others what waits for strangers' hosts."""

    def __init__(self, tokens: ChatTemplate, limits: MediaLimits, journal: Journal, clock: Callable[[], float]) -> None:
        """`clock`: seconds since the epoch."""
        self._tokens = tokens
        self._limits = limits
        self._journal = journal
        self._clock = clock
        self._fetch = Fetcher()
        self._decoding = ThreadPoolExecutor(max_workers=4, thread_name_prefix="decode")
        self._fetching = ThreadPoolExecutor(max_workers=16, thread_name_prefix="fetch")

    def open(self, request: Open) -> Future[Chat]:
        """The chat that a new session starts from."""
        return self._beside(request.pictures, self._open, request)

    def resume(self, session_id: str, token_digest: str | None, story: Transcript | None) -> Future[Chat]:
        """The chat of another session, by its `story` or else by its journal. Fails as one that is not there does."""
        return self._fetching.submit(self._resume, session_id, token_digest, story)

    def read(self, session_id: str) -> Future[Transcript]:
        """A session's journal. Fails as a session that is not there does."""
        return self._fetching.submit(self._read, session_id)

    def ask(self, ask: Ask, conversation: Conversation | None, story: Transcript | None = None) -> Future[Question]:
        """A question. With a `story`, also the chat that it continues; with no `conversation` either, that is read from
        the session's journal first.
        """
        if conversation is None:
            return self._fetching.submit(self._ask, ask, None, None)
        return self._beside(ask.pictures, self._ask, ask, conversation, story)

    def prompt(self, conversation: Conversation, text: str) -> list[int]:
        """A question's tokens, at once."""
        return self._tokens.prompt(conversation.opened_on, text)

    def _beside(self, sources: tuple[PictureSource, ...], work: Callable, *arguments: Any) -> Future:
        """Pictures behind slow hosts never hold up those that are at hand."""
        remote = any(source.path is not None and is_remote(source.path) for source in sources)
        return (self._fetching if remote else self._decoding).submit(work, *arguments)

    def _open(self, request: Open) -> Chat:
        loaded = self._load(request.frames or request.pictures)
        opening = self._opening("video" if request.frames else "image", loaded)
        return Chat(opening, loaded.blobs, opening.pictures)

    def _opening(self, kind: str, loaded: _Loaded) -> Opening:
        if kind == "video":
            key = hashlib.sha256(" ".join(key for key, _ in loaded.keyed).encode()).hexdigest()
            return self._tokens.clip_opening(key, [frame for _, frame in loaded.keyed])
        return self._tokens.opening(loaded.keyed)

    def _resume(self, session_id: str, token_digest: str | None, story: Transcript | None) -> Chat:
        story = story or self._read(session_id)
        if story.open.token_digest != token_digest:
            raise not_found()
        return self._rebuild(story)

    def _ask(self, ask: Ask, conversation: Conversation | None, story: Transcript | None) -> Question:
        read = self._read(ask.session_id) if conversation is None else None
        chat = self._rebuild(story or read) if story or read else None
        loaded = self._load(ask.pictures)
        prepared = self._tokens.prepare(loaded.keyed)
        prompt_ids = self._tokens.prompt((conversation or chat.conversation()).opened_on, ask.prompt_text, prepared)
        return Question(prompt_ids, prepared.pictures, loaded.blobs, chat, read)

    def _read(self, session_id: str) -> Transcript:
        story = self._journal.read(session_id, self._clock())
        if story is None:
            raise not_found()
        return story

    def _rebuild(self, story: Transcript) -> Chat:
        """The chat of a journal. Raises `Refused` (session_not_found) where another model wrote it."""
        opening = self._opening(story.open.kind, self._decode(story.open.pictures))
        if opening.token_ids != story.open.token_ids:
            log.error("journal_unfit reason=its prompt is not the one that this checkpoint makes of it")
            raise not_found()
        pictures = list(opening.pictures)
        for turn in story.turns:
            pictures += self._tokens.prepare(self._decode(turn.pictures).keyed).pictures
        return Chat(opening, story.open.pictures, tuple(pictures), tuple(story.turns))

    def _load(self, sources: Iterable[PictureSource]) -> _Loaded:
        return self._decode(tuple(self._journal.blobs.of(self._bytes(source)) for source in sources))

    def _bytes(self, source: PictureSource) -> bytes:
        if source.image is not None:
            return read_base64(source.image, self._limits)
        return read_path(source.path, self._limits, self._fetch)

    def _decode(self, blobs: tuple[Blob, ...]) -> _Loaded:
        pictures = [load_bytes(blob.data, self._limits) for blob in blobs]
        return _Loaded(blobs, [(picture.sha256, picture.image) for picture in pictures])
