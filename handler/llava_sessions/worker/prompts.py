"""Prompts of opens, of questions and of whole conversations: token IDs and pictures. Blocking.

Requests that the template has no place for are rejected before any picture is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..chat.transcript import Blob, Transcript
from ..ipc.messages import OpenSession, PreparedPicture
from ..journal.journal import NotFound
from ..protocol.openai import Chat, ChatMessage
from ..protocol.requests import Ask, Open
from ..text.chat_template import ChatTemplate, Message, OpenedOn, Opening
from ..text.pictures import NOTHING, Prepared
from .pictures import PictureLoader
from .prefixes import PictureSpan, Prompt, Rewrite, common_prefix, links_of, root_of

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class QuestionedSession:
    """What a preparation needs of a session. `transcript`: None if only the journal holds it."""

    id: str
    transcript: Transcript | None
    token_digest: str | None
    in_engine: bool
    picture_keys: tuple[str, ...]


class PromptBuilder:
    """Makes the prompts of opens, of questions and of whole conversations. Its methods block. Thread-safe."""

    def __init__(self, template: ChatTemplate, loader: PictureLoader, share_pictures: bool = True) -> None:
        """`share_pictures`: sessions share features and prefixes."""
        self.template = template
        self.shares = share_pictures
        self._loader = loader

    def scope(self, session_id: str, token_digest: str | None) -> str | None:
        """Return the scope within which a session shares features and prefixes, see `picture_key`. None: with all."""
        return token_digest if self.shares else session_id

    def opening(self, request: Open, scope: str | None) -> PreparedOpen:
        """Return the beginning of a new session."""
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

    def chat(self, chat: Chat, scope: str | None, with_arrays: bool) -> PreparedChat:
        """Return a conversation without a session header. `with_arrays`: as in `PictureLoader.prepare`."""
        conversation = self._unread(chat.messages, scope) if not with_arrays else None
        conversation = conversation or self._conversation(chat.messages, scope, with_arrays)
        spans = self._spans(conversation.token_ids, conversation.prepared)
        links = links_of(root_of(chat.label, scope), conversation.token_ids, spans)
        return PreparedChat(Prompt(np.asarray(conversation.token_ids), spans, links), conversation.pictures)

    def _unread(self, messages: Sequence[ChatMessage], scope: str | None) -> _Conversation | None:
        """Return a conversation whose pictures are all known, without reading them; None if one is not known."""
        prepared = []
        for message in messages:
            known = self._loader.known(message.pictures, scope) if message.pictures else NOTHING
            if known is None:
                return None
            prepared += [known] if message.pictures else []
        rendered = [Message(one.role, one.text, len(one.pictures)) for one in messages]
        return _Conversation(self.template.conversation(rendered, prepared), tuple(prepared), ())

    def _conversation(
        self, messages: Sequence[ChatMessage], scope: str | None, with_arrays: bool, opened_on: OpenedOn | None = None
    ) -> _Conversation:
        rendered = [Message(one.role, one.text, len(one.pictures)) for one in messages]
        self.template.check_conversation(rendered, opened_on)  # before any picture is read
        sources = [one.pictures for one in messages if one.pictures]
        groups = self._loader.load_conversation(sources, scope)
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

    def question(self, ask: Ask, session: QuestionedSession, transcript: Transcript) -> PreparedQuestion:
        """Return a question that follows all turns, and the session before it unless the engine holds it."""
        if ask.pictures:
            self.template.check_question(transcript.opened_on, len(ask.pictures))
        blobs = self._loader.load(ask.pictures)
        rebuild = None if session.in_engine else self.rebuild(transcript)
        prepared = self._loader.prepare(blobs, self.scope(ask.session_id, session.token_digest))
        prompt_ids = self.template.prompt(transcript.opened_on, ask.prompt_text, prepared)
        keys = keys_of(prepared.pictures)
        return PreparedQuestion(prompt_ids, prepared.pictures, blobs, rebuild, picture_keys=keys)

    def rewriting_question(
        self, chat: Chat, session: QuestionedSession, transcript: Transcript, with_arrays: bool
    ) -> PreparedQuestion:
        """Prepare a question of a whole conversation in a session that was opened by name."""
        scope = self.scope(session.id, session.token_digest)
        rebuild = None if session.in_engine else self.rebuild(transcript)
        held_keys = session.picture_keys if rebuild is None else rebuild.picture_keys
        opened_on = self._opened_on(chat.messages, transcript)
        conversation = self._conversation(chat.messages, scope, with_arrays or rebuild is not None, opened_on)
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

    @staticmethod
    def _opened_on(messages: tuple[ChatMessage, ...], transcript: Transcript) -> OpenedOn | None:
        """Return the opening that a conversation follows; None for a conversation that begins with its own tokens.

        A first question without pictures is about those of the opening. One with pictures shows all of its own.
        """
        record = transcript.opening
        question = next((message for message in messages if message.role == "user"), None)
        if not transcript.opening_ids or record.history_turns or question is None or question.pictures:
            return None
        return OpenedOn(record.kind, _opening_pictures(transcript))

    def rebuild(self, transcript: Transcript) -> Rebuild:
        """Prepare a transcript's pictures. Raise `NotFound` if another model wrote the transcript."""
        record = transcript.opening
        scope = self.scope(record.session_id, record.token_digest)
        groups = transcript.media
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
