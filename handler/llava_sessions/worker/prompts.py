"""Prompts of opens, of questions and of whole conversations: token IDs and pictures. Blocking.

Requests that the template has no place for are rejected before any picture is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..chat.media import MessageMedia, RecordMedia, flattened
from ..chat.transcript import Transcript
from ..ipc.messages import OpenSession, PreparedPicture
from ..journal.journal import NotFound
from ..protocol.openai import Chat, ChatMessage
from ..protocol.requests import Ask, Open
from ..text.chat_template import ChatTemplate, Message, OpenedOn, Opening, PicturesPrecedeOpening
from ..text.pictures import Prepared
from .pictures import ClipChanged, LoadedMedia, PictureLoader, RequestClips
from .prefixes import PictureSpan, Prompt, Rewrite, common_prefix, links_of, root_of
from .sources import MediaSources, joined_sources, sources_of

log = logging.getLogger(__name__)

_OTHER_FRAMES = "a clip's file gives other frames than before"


@dataclass(frozen=True)
class PreparedOpen:
    """The pictures and clips of a new session, as they are stored and as the engine takes them.

    `history_turns`: as in `OpenRecord`.
    """

    opening: Opening
    media: RecordMedia = field(default_factory=RecordMedia)
    history_turns: int = 0


@dataclass(frozen=True)
class Rebuild:
    """A session's transcript, and its pictures and clips as the engine takes them. `scope`: as in `picture_key`."""

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

    `prompt_ids`, `media`: as in the turn's record. `pictures`: pictures and clips that the engine is sent. `rebuild`:
    the session to restore first; None if the engine holds it. `rewrite`: how the question of a whole conversation
    continues the session; None for a question that follows all turns. `picture_keys`: of the whole conversation, with
    `rewrite`; else of `pictures`.
    """

    prompt_ids: list[int]
    pictures: tuple[PreparedPicture, ...] = ()
    media: RecordMedia = field(default_factory=RecordMedia)
    rebuild: Rebuild | None = None
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
        sources = sources_of(request)
        if not sources:
            return PreparedOpen(Opening([], (), 0))
        kind = "video" if sources.clips else "image"
        self.template.check_opening(kind, len(sources.pictures) or 1)
        opening, media = self._opening(kind, self._loader.load(sources), scope)
        return PreparedOpen(opening, _record_of_opening(media))

    def _open_with_history(self, request: Open, scope: str | None) -> PreparedOpen:
        """Prepare a session that begins with a conversation."""
        messages: list[ChatMessage] = []
        for number, turn in enumerate(request.history):
            sources = sources_of(turn) if number else joined_sources(sources_of(request), sources_of(turn))
            messages.append(ChatMessage("user", turn.prompt_text, sources.pictures, sources.clips))
            messages.append(ChatMessage("assistant", turn.response_text))
        conversation = self._conversation(messages, scope, with_arrays=True)
        spans = self._spans(conversation)
        feature_ids = self.template.media_token_ids
        places = [conversation.token_ids[span.start : span.end] for span in spans]
        image_tokens = sum(token in feature_ids for place in places for token in place)
        opening = Opening(conversation.token_ids, conversation.pictures, image_tokens)
        return PreparedOpen(opening, flattened(conversation.media), len(request.history))

    def _opening(self, kind: str, media: MessageMedia, scope: str | None) -> tuple[Opening, MessageMedia]:
        """Return the opening on pictures or on a clip, and its media as they are stored."""
        loaded = self._loader.prepare(media, scope)
        return self.template.opening_on(loaded.prepared, kind), loaded.media

    def chat(self, chat: Chat, scope: str | None, with_arrays: bool) -> PreparedChat:
        """Return a conversation without a session header. `with_arrays`: as in `PictureLoader.prepare`."""
        conversation = self._unread(chat.messages, scope) if not with_arrays else None
        conversation = conversation or self._conversation(chat.messages, scope, with_arrays)
        spans = self._spans(conversation)
        links = links_of(root_of(chat.label, scope), conversation.token_ids, spans)
        return PreparedChat(Prompt(np.asarray(conversation.token_ids), spans, links), conversation.pictures)

    def _unread(self, messages: Sequence[ChatMessage], scope: str | None) -> _Conversation | None:
        """Return a conversation whose pictures and clips are all known, without reading them; else None."""
        known = []
        for sources in _media_sources(messages):
            prepared = self._loader.known(sources, scope)
            if prepared is None:
                return None
            known.append(LoadedMedia(prepared, MessageMedia()))
        token_ids = self.template.conversation(_rendered(messages), [one.prepared for one in known])
        return _Conversation(token_ids, tuple(known))

    def _conversation(
        self,
        messages: Sequence[ChatMessage],
        scope: str | None,
        with_arrays: bool,
        opened_on: OpenedOn | None = None,
        clips: RequestClips | None = None,
    ) -> _Conversation:
        rendered = _rendered(messages)
        self.template.check_conversation(rendered, opened_on)  # before any picture is read
        media = self._loader.load_conversation(_media_sources(messages), scope)
        clips = {} if clips is None else clips
        loaded = [self._loader.prepare(one, scope, with_arrays, clips) for one in media]
        token_ids = self.template.conversation(rendered, [one.prepared for one in loaded], opened_on)
        return _Conversation(token_ids, tuple(loaded))

    def _spans(self, conversation: _Conversation, before: Sequence[int] = ()) -> tuple[PictureSpan, ...]:
        """Return where the pictures and clips of a conversation are, behind the tokens `before` it."""
        token_ids = [*before, *conversation.token_ids]
        places = self.template.spans(token_ids, conversation.prepared, len(before))
        pictures = conversation.pictures
        return tuple(PictureSpan(*place, picture.key) for place, picture in zip(places, pictures, strict=True))

    def question(
        self, ask: Ask, session: QuestionedSession, transcript: Transcript, with_arrays: bool = False
    ) -> PreparedQuestion:
        """Return a question that follows all turns, and the session before it unless the engine holds it.

        `with_arrays`: as in `PictureLoader.prepare`, for a clip of the opening that the question shows again.
        """
        sources = sources_of(ask)
        if sources:
            try:
                self.template.check_question(transcript.opened_on, len(sources.pictures), len(sources.clips))
            except PicturesPrecedeOpening:
                return self._question_before_opening(ask, session, transcript, with_arrays)
        media = self._loader.load(sources)
        clips: RequestClips = {}
        rebuild = None if session.in_engine else self.rebuild(transcript, clips)
        loaded = self._loader.prepare(media, self.scope(ask.session_id, session.token_digest), clips=clips)
        pictures = loaded.prepared.pictures
        prompt_ids = self.template.prompt(transcript.opened_on, ask.prompt_text, loaded.prepared)
        record = flattened([loaded.media])
        return PreparedQuestion(prompt_ids, pictures, record, rebuild, picture_keys=keys_of(pictures))

    def rewriting_question(
        self, chat: Chat, session: QuestionedSession, transcript: Transcript, with_arrays: bool
    ) -> PreparedQuestion:
        """Prepare a question of a whole conversation in a session that was opened by name."""
        scope = self.scope(session.id, session.token_digest)
        clips: RequestClips = {}
        rebuild = None if session.in_engine else self.rebuild(transcript, clips)
        held_keys = session.picture_keys if rebuild is None else rebuild.picture_keys
        opened_on = self._opened_on(chat.messages, transcript)
        conversation = self._conversation(chat.messages, scope, with_arrays or rebuild is not None, opened_on, clips)
        opening_ids = transcript.opening.token_ids if opened_on is not None else []
        opening_keys = held_keys[: opened_on.pictures] if opened_on is not None else ()
        return self._rewriting(conversation, transcript, rebuild, held_keys, opening_ids, opening_keys)

    def _question_before_opening(
        self, ask: Ask, session: QuestionedSession, transcript: Transcript, with_arrays: bool
    ) -> PreparedQuestion:
        """Prepare a first question whose pictures the template writes before the clip that the session was opened on.

        The question shows the clip too, after its own pictures, and replaces the opening.
        """
        sources = sources_of(ask)
        message = Message("user", ask.prompt_text, len(sources.pictures), 1 + len(sources.clips))
        self.template.check_conversation([message])
        media = self._loader.load(sources)
        clips: RequestClips = {}
        rebuild = None if session.in_engine else self.rebuild(transcript, clips)
        shown = replace(media, clips=(*transcript.media[0].clips, *media.clips))
        scope = self.scope(session.id, session.token_digest)
        try:
            loaded = self._loader.prepare(shown, scope, with_arrays or rebuild is not None, clips)
        except ClipChanged:
            raise _unfit(_OTHER_FRAMES) from None
        conversation = _Conversation(self.template.conversation([message], [loaded.prepared]), (loaded,))
        held_keys = session.picture_keys if rebuild is None else rebuild.picture_keys
        return self._rewriting(conversation, transcript, rebuild, held_keys)

    def _rewriting(
        self,
        conversation: _Conversation,
        transcript: Transcript,
        rebuild: Rebuild | None,
        held_keys: Sequence[str],
        opening_ids: Sequence[int] = (),
        opening_keys: Sequence[str] = (),
    ) -> PreparedQuestion:
        """Return a conversation as a question that continues the longest prefix that the session has in common with it.

        `opening_ids`, `opening_keys`: of the opening that the conversation follows.
        """
        token_ids = [*opening_ids, *conversation.token_ids]
        spans = self._spans(conversation, opening_ids)
        prompt = Prompt(np.asarray(token_ids), spans)
        kept = common_prefix(np.asarray(transcript.token_ids), held_keys[len(opening_keys) :], prompt)
        base_turns, base_end = transcript.base_of(kept)
        sent = conversation.pictures[prompt.pictures_before(kept) :]
        first = prompt.pictures_before(base_end)
        return PreparedQuestion(
            prompt_ids=token_ids[base_end:],
            pictures=sent,
            media=flattened(conversation.media_from(first)),
            rebuild=rebuild,
            rewrite=Rewrite(base_turns, kept, token_ids[kept:]),
            picture_keys=(*opening_keys, *(span.key for span in spans)),
        )

    @staticmethod
    def _opened_on(messages: tuple[ChatMessage, ...], transcript: Transcript) -> OpenedOn | None:
        """Return the opening that a conversation follows; None for a conversation that begins with its own tokens.

        A first question without media is about those of the opening. One with pictures or clips shows all of its own.
        """
        record = transcript.opening
        question = next((message for message in messages if message.role == "user"), None)
        if not transcript.opening_ids or record.history_turns or question is None or sources_of(question):
            return None
        return record.opened_on

    def rebuild(self, transcript: Transcript, clips: RequestClips | None = None) -> Rebuild:
        """Prepare the pictures and clips of a transcript. `clips`: as in `PictureLoader.prepare`.

        Raise `NotFound` if another model wrote the transcript, or if the file of a clip gives other frames than before.
        """
        record = transcript.opening
        scope = self.scope(record.session_id, record.token_digest)
        has_opening = bool(transcript.opening_ids and record.pictures and not record.history_turns)
        media = transcript.media
        if has_opening:
            self.template.check_opening(record.kind, record.opened_on.pictures)
        if any(message.clips for message in media):
            self.template.check_opening("video", 1)
        clips = {} if clips is None else clips
        try:
            loaded = [self._loader.prepare(message, scope, clips=clips) for message in media]
        except ClipChanged:
            raise _unfit(_OTHER_FRAMES) from None
        if has_opening and self.template.opening_on(loaded[0].prepared, record.kind).token_ids != record.token_ids:
            raise _unfit("the checkpoint makes another prompt of the stored pictures")
        return Rebuild(transcript, tuple(picture for one in loaded for picture in one.prepared.pictures), scope)


@dataclass(frozen=True)
class _Conversation:
    """A conversation as token IDs, and the media of each message that has some."""

    token_ids: list[int]
    loaded: tuple[LoadedMedia, ...]

    @property
    def prepared(self) -> list[Prepared]:
        return [one.prepared for one in self.loaded]

    @property
    def pictures(self) -> tuple[PreparedPicture, ...]:
        return tuple(picture for one in self.prepared for picture in one.pictures)

    @property
    def media(self) -> tuple[MessageMedia, ...]:
        return tuple(one.media for one in self.loaded)

    def media_from(self, first: int) -> tuple[MessageMedia, ...]:
        """Return the media of the messages from picture or clip `first` on, which is the first one of a message."""
        messages = list(self.loaded)
        while first and messages:
            first -= len(messages.pop(0).prepared.pictures)
        return tuple(one.media for one in messages)


def _rendered(messages: Sequence[ChatMessage]) -> list[Message]:
    return [Message(one.role, one.text, len(one.pictures), len(one.clips)) for one in messages]


def _media_sources(messages: Sequence[ChatMessage]) -> list[MediaSources]:
    """Return the media of each message that has some."""
    return [sources for message in messages if (sources := sources_of(message))]


def _record_of_opening(media: MessageMedia) -> RecordMedia:
    """Return the media of an opening as its record has them: frames alone are as in earlier versions."""
    record = flattened([media])
    return record if any(clip.frames for clip in media.clips) else replace(record, clips=())


def _unfit(reason: str) -> NotFound:
    """Return the error for a transcript that cannot be rebuilt. `reason` has no content of the session."""
    log.error("journal_unfit reason=%s", reason)
    return NotFound(damaged=True)


def keys_of(pictures: Iterable[PreparedPicture]) -> tuple[str, ...]:
    """Return the keys of pictures, in order."""
    return tuple(picture.key for picture in pictures)
