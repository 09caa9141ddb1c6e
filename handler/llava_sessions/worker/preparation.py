"""Work that is too long for the pump's thread: loading pictures, making prompts, reading journals.

Results are plain values. Thread-safe. What a request may not do is rejected first, then by the pictures' headers, and
only then is one picture after another decoded, prepared for the engine and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from ..chat.transcript import Blob, Transcript
from ..config import MediaLimits
from ..ipc.messages import OpenSession, PreparedPicture
from ..journal.journal import Journal, NotFound, Recovered
from ..media.fetch import Fetcher
from ..media.sources import is_remote
from ..protocol.openai import Chat, ChatMessage
from ..protocol.requests import Ask, Open, PictureSource
from ..text.chat_template import ChatTemplate, Message, OpenedOn, Opening
from ..text.pictures import Prepared
from .pictures import PictureLoader
from .prefixes import PictureSpan, Prompt, Rewrite, common_prefix, links_of, root_of

log = logging.getLogger(__name__)

_DECODING_THREADS = 4
_FETCHING_THREADS = 16
_RESTORING_THREADS = 8
# A longer question is tokenized off the pump's thread: 32,768 characters take up to 0.1 s, 1,024 up to 5 ms.
INLINE_PROMPT_CHARS = 1024


@dataclass(frozen=True)
class PreparedOpen:
    """The pictures of a new session, as they were sent and as the engine takes them.

    `history_turns`, `groups`: as in `OpenRecord`.
    """

    opening: Opening
    blobs: tuple[Blob, ...]
    history_turns: int = 0
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rebuild:
    """A session's transcript, and all its pictures as the engine takes them. `scope`: as in `picture_key`."""

    transcript: Transcript
    pictures: tuple[PreparedPicture, ...]
    scope: str | None = None

    def command(self, session_id: str) -> OpenSession:
        """Return the command that makes an engine hold the conversation."""
        transcript = self.transcript
        salt = self.scope or ""
        return OpenSession(session_id, transcript.token_ids, self.pictures, transcript.answer_spans, salt)

    @property
    def picture_keys(self) -> tuple[str, ...]:
        """The keys of the pictures, in order."""
        return keys_of(self.pictures)


@dataclass(frozen=True)
class PreparedQuestion:
    """The new tokens and pictures of a turn.

    `prompt_ids`, `blobs`, `groups`: as in the turn's record. `pictures`: those that the engine is sent. `rebuild`: the
    session to restore first; None if the engine holds it. `rewrite`: how the question of a whole conversation
    continues the session; None for a question that follows all turns. `picture_keys`: of the whole conversation, with
    `rewrite`; else of `pictures`.
    """

    prompt_ids: list[int]
    pictures: tuple[PreparedPicture, ...] = ()
    blobs: tuple[Blob, ...] = ()
    rebuild: Rebuild | None = None
    groups: tuple[int, ...] = ()
    rewrite: Rewrite | None = None
    picture_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreparedChat:
    """A whole conversation: its tokens, and one picture for each of the prompt's spans."""

    prompt: Prompt
    pictures: tuple[PreparedPicture, ...]


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
        share_pictures: bool = True,
    ) -> None:
        """`clock`: seconds since the epoch. `executor` and `fetch` replace the thread pools and HTTP, for tests.

        `share_pictures`: sessions share features and prefixes.
        """
        self._share_pictures = share_pictures
        self.template = template
        self._journal = journal
        self._clock = clock
        self._loader = PictureLoader(template.pictures, limits, journal.blobs, fetch or Fetcher())
        self._decoding = executor or ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode")
        self._fetching = executor or ThreadPoolExecutor(_FETCHING_THREADS, thread_name_prefix="fetch")
        self._restoring = executor or ThreadPoolExecutor(_RESTORING_THREADS, thread_name_prefix="restore")

    def scope(self, session_id: str, token_digest: str | None) -> str | None:
        """Return the scope within which a session shares features and prefixes, see `picture_key`. None: with all."""
        return token_digest if self._share_pictures else session_id

    def open(self, request: Open, session_id: str, token_digest: str | None) -> Future[PreparedOpen]:
        """Prepare a new session."""
        pictures = (*request.pictures, *(picture for turn in request.history for picture in turn.pictures))
        executor = self._fetching if _is_any_remote(pictures) else self._decoding
        return executor.submit(self._open, request, self.scope(session_id, token_digest))

    def chat(self, chat: Chat, session_id: str, with_arrays: bool) -> Future[PreparedChat]:
        """Prepare a conversation without a session header. `with_arrays`: as in `PictureLoader.prepare`."""
        executor = self._fetching if _is_any_remote(chat.pictures) else self._decoding
        return executor.submit(self._chat, chat, self.scope(session_id, None), with_arrays)

    def resume(self, session_id: str, token_digest: str | None, transcript: Transcript | None) -> Future[Rebuild]:
        """Prepare another session's conversation, from its transcript or else from its journal.

        The future fails with `Refused` (session_not_found) or a `JournalError`.
        """
        return self._restoring.submit(self._resume, session_id, token_digest, transcript)

    def claim(self, session_id: str, token_digest: str | None) -> Future[Transcript]:
        """Read a session's journal and become its owner. The future fails with a `JournalError`."""
        return self._restoring.submit(self._claim, session_id, token_digest)

    def recover(self) -> Future[Recovered]:
        """Read the sessions of the journal."""
        return self._restoring.submit(lambda: self._journal.recover(self._clock()))

    def question(
        self, ask: Ask | Chat, session: QuestionedSession, with_arrays: bool = False
    ) -> Future[PreparedQuestion]:
        """Prepare a question, and the session before it unless the engine holds it.

        Without a transcript it is read from the journal first. `with_arrays`: as in `PictureLoader.prepare`.
        """
        executor = self._restoring
        if _is_any_remote(ask.pictures):
            executor = self._fetching
        elif ask.pictures and session.transcript is not None and session.in_engine:
            executor = self._decoding
        if isinstance(ask, Chat):
            return executor.submit(self._rewriting_question, ask, session, with_arrays)
        return executor.submit(self._question, ask, session)

    def _open(self, request: Open, scope: str | None) -> PreparedOpen:
        if request.history:
            return self._open_with_history(request, scope)
        kind = "video" if request.frames else "image"
        sources = request.frames or request.pictures
        if not sources:
            return PreparedOpen(Opening([], (), 0), ())
        self.template.check_opening(kind, len(sources))
        blobs = self._loader.load(sources)
        return PreparedOpen(self._opening(kind, blobs, scope), blobs)

    def _open_with_history(self, request: Open, scope: str | None) -> PreparedOpen:
        """Prepare a session that begins with a conversation."""
        messages: list[ChatMessage] = []
        for number, turn in enumerate(request.history):
            pictures = turn.pictures if number else (*request.pictures, *turn.pictures)
            messages.append(ChatMessage("user", turn.prompt_text, pictures))
            messages.append(ChatMessage("assistant", turn.response_text))
        conversation = self._conversation(messages, scope, with_arrays=True)
        spans = self._spans(conversation.token_ids, conversation.prepared)
        image_tokens = sum(span.end - span.start for span in spans)
        opening = Opening(conversation.token_ids, conversation.pictures, image_tokens)
        return PreparedOpen(opening, conversation.blobs, len(request.history), conversation.groups)

    def _opening(self, kind: str, blobs: tuple[Blob, ...], scope: str | None) -> Opening:
        prepare = self._loader.prepare if kind == "image" else self._loader.prepare_clip
        return self.template.opening_on(prepare(blobs, scope), kind)

    def _chat(self, chat: Chat, scope: str | None, with_arrays: bool) -> PreparedChat:
        conversation = self._conversation(chat.messages, scope, with_arrays)
        spans = self._spans(conversation.token_ids, conversation.prepared)
        links = links_of(root_of(chat.label), conversation.token_ids, spans)
        return PreparedChat(Prompt(np.asarray(conversation.token_ids), spans, links), conversation.pictures)

    def _conversation(
        self, messages: Sequence[ChatMessage], scope: str | None, with_arrays: bool, opened_on: OpenedOn | None = None
    ) -> _Conversation:
        rendered = [Message(one.role, one.text, len(one.pictures)) for one in messages]
        self.template.check_conversation(rendered, opened_on)  # before any picture is read
        groups = self._loader.load_conversation([one.pictures for one in messages if one.pictures], scope)
        prepared = [self._loader.prepare(group, scope, with_arrays) for group in groups]
        return _Conversation(self.template.conversation(rendered, prepared, opened_on), tuple(prepared), groups)

    def _spans(self, token_ids: list[int], prepared: Sequence[Prepared], start: int = 0) -> tuple[PictureSpan, ...]:
        """Return where the pictures are in a conversation. `start`: the token from which on they are searched."""
        image_id = self.template.image_token_id
        positions = [at for at in range(start, len(token_ids)) if token_ids[at] == image_id]
        spans = []
        for one in prepared:
            for picture, tokens in zip(one.pictures, one.tokens, strict=True):
                count = tokens.count(self.template.processor.image_token)
                spans.append(PictureSpan(positions[0], positions[count - 1] + 1, picture.key))
                del positions[:count]
        return tuple(spans)

    def _resume(self, session_id: str, token_digest: str | None, transcript: Transcript | None) -> Rebuild:
        return self._rebuild(transcript or self._claim(session_id, token_digest))

    def _claim(self, session_id: str, token_digest: str | None) -> Transcript:
        return self._journal.claim(session_id, self._clock(), token_digest)

    def _question(self, ask: Ask, session: QuestionedSession) -> PreparedQuestion:
        transcript = session.transcript or self._claim(ask.session_id, session.token_digest)
        if ask.pictures:
            self.template.check_question(transcript.opened_on, len(ask.pictures))
        blobs = self._loader.load(ask.pictures)
        rebuild = None if session.in_engine else self._rebuild(transcript)
        prepared = self._loader.prepare(blobs, self.scope(ask.session_id, session.token_digest))
        prompt_ids = self.template.prompt(transcript.opened_on, ask.prompt_text, prepared)
        keys = keys_of(prepared.pictures)
        return PreparedQuestion(prompt_ids, prepared.pictures, blobs, rebuild, picture_keys=keys)

    def _rewriting_question(self, chat: Chat, session: QuestionedSession, with_arrays: bool) -> PreparedQuestion:
        """Prepare a question of a whole conversation in a session that was opened by name."""
        transcript = session.transcript or self._claim(session.id, session.token_digest)
        scope = self.scope(session.id, session.token_digest)
        rebuild = None if session.in_engine else self._rebuild(transcript)
        held_keys = session.picture_keys if rebuild is None else rebuild.picture_keys
        messages, opened_on = self._behind_opening(chat.messages, transcript)
        conversation = self._conversation(messages, scope, with_arrays or rebuild is not None, opened_on)
        opening_ids = transcript.opening.token_ids if opened_on is not None else []
        opening_keys = held_keys[: _opening_pictures(transcript)] if opened_on is not None else ()
        token_ids = [*opening_ids, *conversation.token_ids]
        spans = self._spans(token_ids, conversation.prepared, len(opening_ids))
        prompt = Prompt(np.asarray(token_ids), spans)
        kept = common_prefix(np.asarray(transcript.token_ids), held_keys[len(opening_keys) :], prompt)
        base_turns, base_end = transcript.base_of(kept)
        sent = conversation.pictures[prompt.pictures_before(kept) :]
        first = prompt.pictures_before(base_end)
        return PreparedQuestion(
            prompt_ids=token_ids[base_end:],
            pictures=sent,
            blobs=conversation.blobs[first:],
            rebuild=rebuild,
            groups=conversation.groups_from(first),
            rewrite=Rewrite(base_turns, kept, token_ids[kept:]),
            picture_keys=(*opening_keys, *(span.key for span in spans)),
        )

    def _behind_opening(
        self, messages: tuple[ChatMessage, ...], transcript: Transcript
    ) -> tuple[tuple[ChatMessage, ...], OpenedOn | None]:
        """Return the messages without the pictures that the session was opened on, and what they follow.

        The conversation follows the opening if its first user message has no pictures, or begins with those of the
        opening. Otherwise it replaces the opening.
        """
        record = transcript.opening
        opening_counts = len(transcript.opening_ids) > 0 and not record.history_turns
        first = next((at for at, message in enumerate(messages) if message.role == "user"), None)
        if not opening_counts or first is None:
            return messages, None
        opened_on = OpenedOn(record.kind, _opening_pictures(transcript))
        pictures = messages[first].pictures
        if not pictures:
            return messages, opened_on
        blobs = self._loader.load_conversation([pictures], None)[0][: len(record.pictures)]
        if record.kind == "video" or [one.sha256 for one in blobs] != [one.sha256 for one in record.pictures]:
            return messages, None
        rest = replace(messages[first], pictures=pictures[len(blobs) :])
        return (*messages[:first], rest, *messages[first + 1 :]), opened_on

    def _rebuild(self, transcript: Transcript) -> Rebuild:
        """Prepare a transcript's pictures. Raise `NotFound` if another model wrote the transcript."""
        record = transcript.opening
        scope = self.scope(record.session_id, record.token_digest)
        groups = transcript.pictures
        pictures: list[PreparedPicture] = []
        if transcript.opening_ids and record.pictures and not record.history_turns:
            self.template.check_opening(record.kind, len(record.pictures))
            opening = self._opening(record.kind, record.pictures, scope)
            if opening.token_ids != record.token_ids:
                log.error("journal_unfit reason=the checkpoint makes another prompt of the stored pictures")
                raise NotFound(damaged=True)
            pictures += opening.pictures
            groups = groups[1:]
        for group in groups:
            pictures += self._loader.prepare(group, scope).pictures
        return Rebuild(transcript, tuple(pictures), scope)


@dataclass(frozen=True)
class QuestionedSession:
    """What a preparation needs of a session. `transcript`: None if only the journal holds it."""

    id: str
    transcript: Transcript | None
    token_digest: str | None
    in_engine: bool
    picture_keys: tuple[str, ...]


@dataclass(frozen=True)
class _Conversation:
    """A conversation as token IDs, and its pictures by message."""

    token_ids: list[int]
    prepared: tuple[Prepared, ...]
    blobs_by_message: tuple[tuple[Blob, ...], ...]

    @property
    def pictures(self) -> tuple[PreparedPicture, ...]:
        return tuple(picture for one in self.prepared for picture in one.pictures)

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return tuple(blob for group in self.blobs_by_message for blob in group)

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(len(group) for group in self.blobs_by_message)

    def groups_from(self, first: int) -> tuple[int, ...]:
        """Return the pictures per message from picture `first` on, which is the first one of a message."""
        counts = list(self.groups)
        while first and counts:
            first -= counts.pop(0)
        return tuple(counts)


def _opening_pictures(transcript: Transcript) -> int:
    """Return the number of pictures that the engine holds for the opening: a clip is one."""
    record = transcript.opening
    return 1 if record.kind == "video" else len(record.pictures)


def keys_of(pictures: Iterable[PreparedPicture]) -> tuple[str, ...]:
    """Return the keys of pictures, in order."""
    return tuple(picture.key for picture in pictures)


def _is_any_remote(sources: Iterable[PictureSource]) -> bool:
    return any(source.path is not None and is_remote(source.path) for source in sources)
