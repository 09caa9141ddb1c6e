"""Work that is too long for the pump's thread: loading pictures, making prompts, reading journals.

Results are plain values. Thread-safe. What a request may not do is rejected first, then by the pictures' headers, and
only then is one picture after another decoded, prepared for the engine and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

from ..chat.transcript import Blob, Transcript
from ..config import MediaLimits
from ..ipc.messages import OpenSession, PreparedPicture
from ..journal.journal import Journal, NotFound, Recovered
from ..media.fetch import Fetcher
from ..media.sources import is_remote
from ..protocol.requests import Ask, Open, PictureSource
from ..text.chat_template import ChatTemplate, Opening
from .pictures import PictureLoader

log = logging.getLogger(__name__)

_DECODING_THREADS = 4
_FETCHING_THREADS = 16
_RESTORING_THREADS = 8
# Apart from the others: most sessions that are looked up may be unknown.
_ADOPTING_THREADS = 8
# A longer question is tokenized off the pump's thread: 32,768 characters take up to 0.1 s, 1,024 up to 5 ms.
INLINE_PROMPT_CHARS = 1024


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
    """Runs preparations in thread pools: pictures that arrived with a request, remote pictures, and stored sessions.

    The pools are apart, so that a slow host delays neither pictures that need no host nor a session's next turn.
    """

    def __init__(
        self,
        template: ChatTemplate,
        limits: MediaLimits,
        journal: Journal,
        clock: Callable[[], float],
        executor: Executor | None = None,
        fetch: Callable[[str, MediaLimits], bytes] | None = None,
        *,
        adopts: bool = False,
    ) -> None:
        """`clock`: seconds since the epoch. `executor` and `fetch` replace the thread pools and HTTP, for tests."""
        self.template = template
        self._journal = journal
        self._clock = clock
        self._adopts = adopts
        self._loader = PictureLoader(template.pictures, limits, journal.blobs, fetch or Fetcher())
        self._decoding = executor or ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode")
        self._fetching = executor or ThreadPoolExecutor(_FETCHING_THREADS, thread_name_prefix="fetch")
        self._restoring = executor or ThreadPoolExecutor(_RESTORING_THREADS, thread_name_prefix="restore")
        self._adopting = executor or ThreadPoolExecutor(_ADOPTING_THREADS, thread_name_prefix="adopt")

    def open(self, request: Open, token_digest: str | None) -> Future[PreparedOpen]:
        """Prepare a new session."""
        executor = self._fetching if _is_any_remote(request.pictures) else self._decoding
        return executor.submit(self._open, request, token_digest)

    def resume(self, session_id: str, token_digest: str | None, transcript: Transcript | None) -> Future[Rebuild]:
        """Prepare another session's conversation, from its transcript or else from its journal.

        The future fails with `Refused` (session_not_found) or a `JournalError`.
        """
        return self._restoring.submit(self._resume, session_id, token_digest, transcript)

    def claim(self, session_id: str, token_digest: str | None) -> Future[Transcript]:
        """Read a session's journal and become its owner. The future fails with a `JournalError`."""
        return self._restoring.submit(self._claim, session_id, token_digest)

    def adopt(self, session_id: str, token_digest: str | None) -> Future[Transcript]:
        """Do as `claim`, for a session that this instance does not know."""
        return self._adopting.submit(self._claim, session_id, token_digest)

    def verify(self, session_id: str, token_digest: str | None) -> Future[None]:
        """Look for a session without a claim. The future fails with a `JournalError`."""
        return self._adopting.submit(lambda: self._journal.verify(session_id, self._clock(), token_digest))

    def recover(self) -> Future[Recovered]:
        """Read the sessions of the journal."""
        return self._restoring.submit(lambda: self._journal.recover(self._clock()))

    def question(
        self, ask: Ask, transcript: Transcript | None, token_digest: str | None, in_engine: bool
    ) -> Future[PreparedQuestion]:
        """Prepare a question, and the session before it unless the engine holds it (`in_engine`).

        Without a `transcript` it is read from the journal first.
        """
        executor = self._restoring
        if _is_any_remote(ask.pictures):
            executor = self._fetching
        elif ask.pictures and transcript is not None and in_engine:
            executor = self._decoding
        return executor.submit(self._question, ask, transcript, token_digest, in_engine)

    def _open(self, request: Open, token_digest: str | None) -> PreparedOpen:
        kind = "video" if request.frames else "image"
        sources = request.frames or request.pictures
        self.template.check_opening(kind, len(sources))
        blobs = self._loader.load(sources)
        return PreparedOpen(self._opening(kind, blobs, token_digest), blobs)

    def _opening(self, kind: str, blobs: tuple[Blob, ...], token_digest: str | None) -> Opening:
        prepare = self._loader.prepare if kind == "image" else self._loader.prepare_clip
        return self.template.opening_on(prepare(blobs, token_digest), kind)

    def _resume(self, session_id: str, token_digest: str | None, transcript: Transcript | None) -> Rebuild:
        return self._rebuild(transcript or self._journal.claim(session_id, self._clock(), token_digest))

    def _claim(self, session_id: str, token_digest: str | None) -> Transcript:
        return self._journal.claim(session_id, self._clock(), token_digest, waits=self._adopts)

    def _question(
        self, ask: Ask, transcript: Transcript | None, token_digest: str | None, in_engine: bool
    ) -> PreparedQuestion:
        transcript = transcript or self._claim(ask.session_id, token_digest)
        if ask.pictures:
            self.template.check_question(transcript.opened_on, len(ask.pictures))
        blobs = self._loader.load(ask.pictures)
        rebuild = None if in_engine else self._rebuild(transcript)
        prepared = self._loader.prepare(blobs, token_digest)
        prompt_ids = self.template.prompt(transcript.opened_on, ask.prompt_text, prepared)
        return PreparedQuestion(prompt_ids, prepared.pictures, blobs, rebuild)

    def _rebuild(self, transcript: Transcript) -> Rebuild:
        """Prepare a transcript's pictures. Raise `NotFound` if another model wrote the transcript."""
        record = transcript.opening
        self.template.check_opening(record.kind, len(record.pictures))
        opening = self._opening(record.kind, record.pictures, record.token_digest)
        if opening.token_ids != record.token_ids:
            log.error("journal_unfit reason=the checkpoint makes another prompt of the stored pictures")
            raise NotFound(damaged=True)
        pictures = list(opening.pictures)
        for turn in transcript.turns:
            pictures += self._loader.prepare(turn.pictures, record.token_digest).pictures
        return Rebuild(transcript, tuple(pictures))


def _is_any_remote(sources: Iterable[PictureSource]) -> bool:
    return any(source.path is not None and is_remote(source.path) for source in sources)
