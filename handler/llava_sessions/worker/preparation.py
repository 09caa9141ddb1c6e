"""Work that is too long for the pump's thread: loading pictures, making prompts, reading journals.

Results are plain values. Thread-safe.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from ..chat.transcript import Blob, Transcript
from ..config import MediaLimits
from ..ipc.messages import OpenSession, PreparedPicture
from ..journal.journal import Journal, NotFound, Recovered
from ..media.decoder import load_bytes
from ..media.fetch import Fetcher
from ..media.sources import is_remote, read_base64, read_path
from ..protocol.requests import Ask, Open, PictureSource
from ..text.chat_template import ChatTemplate, Opening

log = logging.getLogger(__name__)

T = TypeVar("T")
_DECODING_THREADS = 4
_WAITING_THREADS = 16  # for journal reads and downloads


@dataclass(frozen=True)
class PreparedOpen:
    """The pictures of a new session, as they were sent and as the engine takes them."""

    opening: Opening
    blobs: tuple[Blob, ...]


@dataclass(frozen=True)
class Rebuild:
    """A session's transcript, and all its pictures as the engine takes them."""

    transcript: Transcript
    pictures: tuple[PreparedPicture, ...]

    def command(self, session_id: str) -> OpenSession:
        """Return the command that makes an engine hold the conversation."""
        transcript = self.transcript
        return OpenSession(session_id, transcript.token_ids, self.pictures, transcript.answer_spans)


@dataclass(frozen=True)
class PreparedQuestion:
    """The new tokens and pictures of a turn. `rebuild`: the session to restore first; None if the engine holds it."""

    prompt_ids: list[int]
    pictures: tuple[PreparedPicture, ...] = ()
    blobs: tuple[Blob, ...] = ()
    rebuild: Rebuild | None = None


class Preparer:
    """Runs preparations in two thread pools, so that slow hosts do not delay pictures that arrived with a request."""

    def __init__(
        self,
        template: ChatTemplate,
        limits: MediaLimits,
        journal: Journal,
        clock: Callable[[], float],
        decoding: Executor | None = None,
        waiting: Executor | None = None,
        fetch: Callable[[str, MediaLimits], bytes] | None = None,
    ) -> None:
        """`clock`: seconds since the epoch. `decoding`, `waiting` and `fetch` replace threads and HTTP, for tests."""
        self.template = template
        self._limits = limits
        self._journal = journal
        self._clock = clock
        self._fetch = fetch or Fetcher()
        self._decoding = decoding or ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode")
        self._waiting = waiting or ThreadPoolExecutor(_WAITING_THREADS, thread_name_prefix="fetch")

    def open(self, request: Open, token_digest: str | None) -> Future[PreparedOpen]:
        """Prepare a new session."""
        return self._executor(request.pictures).submit(self._open, request, token_digest)

    def resume(self, session_id: str, token_digest: str | None, transcript: Transcript | None) -> Future[Rebuild]:
        """Prepare another session's conversation, from its transcript or else from its journal.

        The future fails with `Refused` (session_not_found) or a `JournalError`.
        """
        return self._waiting.submit(self._resume, session_id, token_digest, transcript)

    def claim(self, session_id: str, token_digest: str | None) -> Future[Transcript]:
        """Read a session's journal and become its owner. The future fails with a `JournalError`."""
        return self._waiting.submit(self._claim, session_id, token_digest)

    def recover(self) -> Future[Recovered]:
        """Read the sessions of the journal."""
        return self._waiting.submit(lambda: self._journal.recover(self._clock()))

    def question(
        self, ask: Ask, transcript: Transcript | None, token_digest: str | None, in_engine: bool
    ) -> Future[PreparedQuestion]:
        """Prepare a question, and the session before it unless the engine holds it (`in_engine`).

        Without a `transcript` it is read from the journal first.
        """
        executor = self._waiting if transcript is None else self._executor(ask.pictures)
        return executor.submit(self._question, ask, transcript, token_digest, in_engine)

    def _executor(self, sources: tuple[PictureSource, ...]) -> Executor:
        remote = any(source.path is not None and is_remote(source.path) for source in sources)
        return self._waiting if remote else self._decoding

    def _open(self, request: Open, token_digest: str | None) -> PreparedOpen:
        kind = "video" if request.frames else "image"
        blobs = self._load(request.frames or request.pictures)
        return PreparedOpen(self._opening(kind, blobs, token_digest), blobs)

    def _opening(self, kind: str, blobs: tuple[Blob, ...], token_digest: str | None) -> Opening:
        pictures = self._decode(blobs, token_digest)
        if kind == "image":
            return self.template.opening(pictures)
        clip_key = hashlib.sha256(" ".join(key for key, _ in pictures).encode()).hexdigest()
        return self.template.clip_opening(clip_key, [frame for _, frame in pictures])

    def _resume(self, session_id: str, token_digest: str | None, transcript: Transcript | None) -> Rebuild:
        return self._rebuild(transcript or self._claim(session_id, token_digest))

    def _claim(self, session_id: str, token_digest: str | None) -> Transcript:
        return self._journal.claim(session_id, self._clock(), token_digest)

    def _question(
        self, ask: Ask, transcript: Transcript | None, token_digest: str | None, in_engine: bool
    ) -> PreparedQuestion:
        transcript = transcript or self._claim(ask.session_id, token_digest)
        rebuild = None if in_engine else self._rebuild(transcript)
        blobs = self._load(ask.pictures)
        prepared = self.template.prepare(self._decode(blobs, token_digest))
        prompt_ids = self.template.prompt(transcript.opened_on, ask.prompt_text, prepared)
        return PreparedQuestion(prompt_ids, prepared.pictures, blobs, rebuild)

    def _rebuild(self, transcript: Transcript) -> Rebuild:
        """Prepare a transcript's pictures. Raise `NotFound` if another model wrote the transcript."""
        record = transcript.opening
        opening = self._opening(record.kind, record.pictures, record.token_digest)
        if opening.token_ids != record.token_ids:
            log.error("journal_unfit reason=the checkpoint makes another prompt of the stored pictures")
            raise NotFound(damaged=True)
        pictures = list(opening.pictures)
        for turn in transcript.turns:
            pictures += self.template.prepare(self._decode(turn.pictures, record.token_digest)).pictures
        return Rebuild(transcript, tuple(pictures))

    def _load(self, sources: Iterable[PictureSource]) -> tuple[Blob, ...]:
        return tuple(self._journal.blobs.get(_read(source, self._limits, self._fetch)) for source in sources)

    def _decode(self, blobs: tuple[Blob, ...], token_digest: str | None) -> list[tuple[str, Image.Image]]:
        pictures = (load_bytes(blob.data, self._limits) for blob in blobs)
        return [(picture_key(picture.sha256, token_digest), picture.image) for picture in pictures]


def picture_key(sha256: str, token_digest: str | None) -> str:
    """Return the key by which sessions share a picture's features and prefix: only sessions of the same token do.

    Otherwise the time of an open would tell a caller whether another caller has shown the same picture.
    """
    return sha256 if token_digest is None else hashlib.sha256(f"{token_digest} {sha256}".encode()).hexdigest()


def _read(source: PictureSource, limits: MediaLimits, fetch: Callable[[str, MediaLimits], bytes]) -> bytes:
    if source.image is not None:
        return read_base64(source.image, limits)
    return read_path(source.path or "", limits, fetch)
