"""Work that is too long for the pump's thread: loading pictures, making prompts, reading journals.

Results are plain values. Thread-safe. What a request may not do is rejected first, then by the pictures' headers, and
only then is one picture after another decoded, prepared for the engine and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from ..chat.transcript import Transcript
from ..config import MediaLimits
from ..journal.journal import Journal, Recovered
from ..media.fetch import Fetcher
from ..protocol.openai import Chat
from ..protocol.requests import Ask, Open
from ..text.chat_template import ChatTemplate
from .pictures import PictureLoader
from .prompts import PreparedChat, PreparedOpen, PreparedQuestion, PromptBuilder, QuestionedSession, Rebuild
from .sources import MediaSources, all_sources

_DECODING_THREADS = 4
_FETCHING_THREADS = 16
# More than the files that are decoded at once (media/clips.py): a request whose clips are known needs no decoding.
_CLIP_THREADS = 16
_RESTORING_THREADS = 8
# Apart from the others: most sessions that are looked up may be unknown.
_ADOPTING_THREADS = 8
# A longer question is tokenized off the pump's thread: 32,768 characters take up to 0.1 s, 1,024 up to 5 ms.
INLINE_PROMPT_CHARS = 1024


class Preparer:
    """Runs preparations in thread pools: media that arrived with a request, remote media, and stored sessions.

    Requests with the file of a clip have pools of their own. So a slow host or a long clip delays neither pictures nor
    the next turn of another session.
    """

    def __init__(
        self,
        template: ChatTemplate,
        limits: MediaLimits,
        journal: Journal,
        clock: Callable[[], float],
        executor: Executor | None = None,
        fetch: Callable[[str, MediaLimits], bytes] | None = None,
        share_pictures: bool = True,
        *,
        adopts: bool = False,
    ) -> None:
        """`clock`: seconds since the epoch. `executor` and `fetch` replace the thread pools and HTTP, for tests.

        `share_pictures`: as in `PromptBuilder`.
        """
        self.template = template
        self._journal = journal
        self._clock = clock
        self._adopts = adopts
        loader = PictureLoader(template.pictures, limits, journal.blobs, fetch or Fetcher())
        self.prompts = PromptBuilder(template, loader, share_pictures)
        self._decoding = executor or ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode")
        self._clip_files = executor or ThreadPoolExecutor(_CLIP_THREADS, thread_name_prefix="clip")
        self._fetching = executor or ThreadPoolExecutor(_FETCHING_THREADS, thread_name_prefix="fetch")
        self._fetching_files = executor or ThreadPoolExecutor(_FETCHING_THREADS, thread_name_prefix="fetch-clip")
        self._restoring = executor or ThreadPoolExecutor(_RESTORING_THREADS, thread_name_prefix="restore")
        self._adopting = executor or ThreadPoolExecutor(_ADOPTING_THREADS, thread_name_prefix="adopt")

    def open(self, request: Open, session_id: str, token_digest: str | None) -> Future[PreparedOpen]:
        """Prepare a new session."""
        executor = self._executor_of(all_sources(request))
        return executor.submit(self.prompts.opening, request, self.prompts.scope(session_id, token_digest))

    def chat(self, chat: Chat, scope: str | None, with_arrays: bool) -> Future[PreparedChat]:
        """Prepare a conversation without a session header. `scope`, `with_arrays`: as in `PictureLoader.prepare`."""
        return self._executor_of(all_sources(chat)).submit(self.prompts.chat, chat, scope, with_arrays)

    def resume(self, session_id: str, token_digest: str | None, transcript: Transcript | None) -> Future[Rebuild]:
        """Prepare another session's conversation, from its transcript or else from its journal.

        The future fails with `Refused` (session_not_found) or a `JournalError`.
        """
        executor = self._clip_files if _has_file(transcript) else self._restoring
        return executor.submit(self._resume, session_id, token_digest, transcript)

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
        self, ask: Ask | Chat, session: QuestionedSession, with_arrays: bool = False
    ) -> Future[PreparedQuestion]:
        """Prepare a question, and the session before it unless the engine holds it.

        Without a transcript it is read from the journal first. `with_arrays`: as in `PictureLoader.prepare`.
        """
        sources = all_sources(ask)
        executor = self._restoring
        if sources.are_any_remote or (sources and session.transcript is not None and session.in_engine):
            executor = self._executor_of(sources)
        elif sources.have_file or (not session.in_engine and _has_file(session.transcript)):
            executor = self._clip_files
        return executor.submit(self._question, ask, session, with_arrays)

    def _executor_of(self, sources: MediaSources) -> Executor:
        """Return the pool for a request with these pictures and clips."""
        if sources.are_any_remote:
            return self._fetching_files if sources.have_file else self._fetching
        return self._clip_files if sources.have_file else self._decoding

    def _resume(self, session_id: str, token_digest: str | None, transcript: Transcript | None) -> Rebuild:
        return self.prompts.rebuild(transcript or self._journal.claim(session_id, self._clock(), token_digest))

    def _claim(self, session_id: str, token_digest: str | None) -> Transcript:
        return self._journal.claim(session_id, self._clock(), token_digest, waits=self._adopts)

    def _question(self, ask: Ask | Chat, session: QuestionedSession, with_arrays: bool) -> PreparedQuestion:
        transcript = session.transcript or self._claim(session.id, session.token_digest)
        if isinstance(ask, Chat):
            return self.prompts.rewriting_question(ask, session, transcript, with_arrays)
        return self.prompts.question(ask, session, transcript, with_arrays)


def _has_file(transcript: Transcript | None) -> bool:
    """Return whether a session shows the file of a clip. False if only the journal knows that."""
    return transcript is not None and any(clip.frames for message in transcript.media for clip in message.clips)
