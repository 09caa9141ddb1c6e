"""Questions of conversations without a session header: each runs in an implicit session.

All methods run on the pump's thread, under its lock.
"""

from __future__ import annotations

import uuid
from concurrent.futures import Future
from functools import partial

from ..ipc.messages import AskSession, OpenSession
from ..protocol.openai import Chat, OpenAIForm
from .context import WorkerContext
from .conversations import Conversations, Place, implicit_session, lacks_features
from .openings import check_context, digest_of
from .pending import PendingRequest
from .prefixes import root_of
from .prompts import PreparedChat, keys_of
from .questions import Questions, ms_left, sampling_of
from .sessions import Session, Turn
from .states import TurnState
from .turns import Turns


class Chats:
    """Starts the turns of conversations that clients send whole."""

    def __init__(
        self, context: WorkerContext, turns: Turns, conversations: Conversations, questions: Questions
    ) -> None:
        """`questions` runs the turns of sessions that were opened by name."""
        self._context = context
        self._turns = turns
        self._conversations = conversations
        self._questions = questions

    def start(self, pending: PendingRequest, chat: Chat) -> None:
        """Start a turn, in the session of the request's header if it has one. Raise `Refused`.

        An implicit session is known only when the conversation is prepared. Until then the turn has a session that is
        not in the table.
        """
        if not pending.was_placed_again:  # `chat` is that of the turn's first request, which may have another form
            served = self._context.served
            completion_id = f"chatcmpl-{uuid.uuid4().hex}"
            pending.form = OpenAIForm.of(chat, completion_id, self._context.clock(), served.name, served.fingerprint)
            pending.streamed = chat.stream
        if chat.session_id is not None:
            self._questions.start(pending, chat)
            return
        self._context.engines.check()
        turn = Turn(implicit_session(self._context.table, digest_of(chat.session_token)), chat, pending)
        self._turns.add(turn)
        try:
            self._prepare(turn, chat, with_arrays=False)
        except Exception:
            self._turns.end(turn)
            raise

    def _prepare(self, turn: Turn, chat: Chat, with_arrays: bool) -> None:
        prepared = self._context.preparer.chat(chat, self._scope(turn.session), with_arrays)
        turn.prepared = prepared
        self._context.inbox.when_done(prepared, partial(self._prepared, turn, chat))

    def _prepared(self, turn: Turn, chat: Chat, prepared: Future[PreparedChat]) -> None:
        """Submit a question that is prepared, or reject it."""
        if not turn.is_in(TurnState.PREPARING):
            return  # its client has left, or its deadline has passed
        turn.prepared = None  # it refers to the prepared pictures
        try:
            self._submit(turn, chat, prepared.result())
        except Exception as error:
            self._turns.fail(turn, error)

    def _submit(self, turn: Turn, chat: Chat, prepared: PreparedChat) -> None:
        """Send a turn to the engine, in the session that makes the least work."""
        context = self._context
        context.engines.check()
        deadline_ms = ms_left(context, turn)
        if deadline_ms is not None and deadline_ms <= 0:
            self._turns.cancelled(turn, "deadline")
            return
        prompt = prepared.prompt
        check_context(len(prompt.token_ids) + 1, context.context_tokens)
        # A turn that an engine has rejected shares nothing with the sessions of that engine.
        place = self._conversations.place(prompt) if turn.avoids is None else Place(None)
        first = prompt.pictures_before(place.kept)
        needed = prepared.pictures if place.session is None else prepared.pictures[first:]
        engine = self._engine_for(place, prepared, turn.avoids)
        if lacks_features(context.table, needed, engine, closing=self._conversations.evicted_by(place)):
            self._prepare(turn, chat, with_arrays=True)
            return
        if place.session is None:
            self._conversations.add(turn.session, root_of(chat.label, self._scope(turn.session)), place)
            self._open(turn.session, place, prepared, engine)
        else:
            self._move(turn, place.session)
        session = turn.session
        turn.prompt = prompt
        turn.picture_keys = keys_of(prepared.pictures)
        turn.kept_tokens = place.kept
        session.picture_keys = turn.picture_keys[:first]  # the engine drops all others
        sent_ids = prompt.token_ids[place.kept :].tolist()
        sampling = sampling_of(chat, deadline_ms)
        asked = AskSession(session.id, turn.id, sent_ids, sampling, prepared.pictures[first:], kept_tokens=place.kept)
        context.engines.submit(session, asked)
        turn.ask = chat if context.placement.are_several else chat.without_pictures()
        turn.submitted_s = context.monotonic()
        turn.advance(TurnState.RUNNING)

    def _engine_for(self, place: Place, prepared: PreparedChat, avoid: int | None) -> int:
        """Return the engine of the session that continues or of the donor, else one for a new session."""
        holder = place.session or place.donor
        if holder is not None and holder.engine is not None:
            return holder.engine
        return self._context.placement.place(keys_of(prepared.pictures), avoid)

    def _open(self, session: Session, place: Place, prepared: PreparedChat, engine: int) -> None:
        """Open a new session in an engine, with the beginning that it shares with its donor."""
        token_ids = prepared.prompt.token_ids[: place.kept].tolist()
        pictures = prepared.pictures[: prepared.prompt.pictures_before(place.kept)]
        salt = self._scope(session) or ""
        donor = None if place.donor is None else place.donor.id
        command = OpenSession(session.id, token_ids, pictures, salt=salt, fork_from=donor)
        self._context.engines.load(session, command, engine)

    def _scope(self, session: Session) -> str | None:
        return self._context.preparer.prompts.scope(session.id, session.token_digest)

    def _move(self, turn: Turn, session: Session) -> None:
        """Run a turn in another session."""
        turn.session.turn = None
        turn.session = session
        session.turn = turn
