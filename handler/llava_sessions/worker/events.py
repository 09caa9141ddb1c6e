"""Events of the engine, applied to sessions and turns.

An error in one event fails one session. All methods run on the pump's thread, under its lock.
"""

from __future__ import annotations

import logging

from ..chat.transcript import short_id
from ..errors import Refused
from ..ipc.messages import (
    Admitted,
    Cancelled,
    Closed,
    Delta,
    Described,
    Event,
    Finished,
    OpenFailed,
    OutOfCapacity,
    Prefilled,
    TurnAdmitted,
    TurnFailed,
)
from .answers import Answers
from .closes import Closes
from .context import WorkerContext
from .conversations import Conversations
from .descriptions import Descriptions
from .openings import Openings, unload
from .sessions import Session, Turn
from .states import Residency, SessionState, TurnState
from .turns import Turns

log = logging.getLogger(__name__)


class EngineEvents:
    """Applies events. An acknowledged session that an engine loses stays open, and its next turn rebuilds it.

    The session may be rebuilt on another engine: then later events of the first one do not concern it any more.
    """

    def __init__(
        self,
        context: WorkerContext,
        *,
        openings: Openings,
        turns: Turns,
        answers: Answers,
        closes: Closes,
        conversations: Conversations,
        descriptions: Descriptions,
    ) -> None:
        self._context = context
        self._openings = openings
        self._turns = turns
        self._answers = answers
        self._closes = closes
        self._conversations = conversations
        self._descriptions = descriptions

    def apply(self, engine: int, event: Event) -> None:
        """Apply one event of an engine. Never raises."""
        try:
            if self._is_current(engine, event):
                self._dispatch(event)
        except Exception as error:
            log.exception("event_failed event=%s", type(event).__name__)
            self._contain(event, error)

    def engine_lost(self, engine: int) -> None:
        """Make the engine's sessions COLD. Fail its turns, and its opens that no other engine takes."""
        lost = {session for session in self._context.table if session.engine == engine}
        for session in lost:
            session.unload()
        self._descriptions.engine_lost(engine)
        self._openings.engine_lost(lost)
        self._turns.engine_lost(lost)
        for session in lost:
            self._closes.freed(session)
        self._conversations.drop_cold()

    def _contain(self, event: Event, error: Exception) -> None:
        """End the turn of the session that an event failed for, and take the session back from the engine."""
        session = self._session_of(event)
        if session is None:
            return
        try:
            if session.turn is not None:
                self._turns.fail(session.turn, error)
            unload(self._context, session)
            self._unloaded(session, error)
        except Exception:
            log.exception("event_not_contained session=%s", short_id(session.id))

    def _is_current(self, engine: int, event: Event) -> bool:
        """Return whether an event is not of an engine that the session or the turn has left."""
        if isinstance(event, Described):
            return True
        turn = self._turns.find(getattr(event, "turn_id", None) or "")
        if turn is not None and turn.is_in(TurnState.PREPARING):
            return False  # it has left an engine, and is not sent to another one yet
        session = self._session_of(event)
        return session is None or session.engine in (None, engine)

    def _dispatch(self, event: Event) -> None:
        match event:
            case TurnAdmitted():
                self._answers.on_admitted(event)
            case Delta():
                self._answers.on_delta(event)
            case Finished():
                self._answers.on_finished(event)
            case Cancelled() | TurnFailed():
                self._end_turn(event)
            case OutOfCapacity():
                self._out_of_capacity(event)
            case Described():
                self._descriptions.on_described(event)
            case Admitted() | Prefilled() | OpenFailed() | Closed():
                session = self._context.table.find(event.session_id)
                if session is not None:
                    self._session_event(session, event)

    def _end_turn(self, event: Cancelled | TurnFailed) -> None:
        turn = self._turns.find(event.turn_id)
        if turn is None:
            return
        if isinstance(event, Cancelled):
            self._turns.cancelled(turn, event.reason, event)
        else:
            self._turns.fail(turn, _turn_error(event))

    def _session_event(self, session: Session, event: Admitted | Prefilled | OpenFailed | Closed) -> None:
        match event:
            case Admitted():
                self._openings.admitted(session)
            case Prefilled():
                if session.is_in(Residency.LOADING):
                    session.advance(Residency.LOADED)
                self._ready(session, event)
            case OpenFailed():
                self._unloaded(session, _turn_error(event))
            case Closed():
                if session.is_in(SessionState.CLOSING):
                    session.unload()
                    self._closes.freed(session)

    def _ready(self, session: Session, event: Prefilled) -> None:
        if session.engine is not None:
            log.info(
                "session_ready session=%s device=%s encode_ms=%d total_ms=%d",
                short_id(session.id),
                self._context.engines.all[session.engine].label,
                round(event.encode_ms),
                round(event.total_ms),
            )

    def _out_of_capacity(self, event: OutOfCapacity) -> None:
        message = (
            f"The device's memory cannot hold the session: {event.needed_bytes:,} bytes are needed, "
            f"{event.free_bytes:,} are free, {event.open_sessions} sessions are open."
        )
        if event.waiting_turns:
            message = f"{event.waiting_turns} questions wait for device memory already; try again later."
        error = Refused("capacity", message)
        turn = None if event.turn_id is None else self._turns.find(event.turn_id)
        session = self._context.table.find(event.session_id)
        if turn is not None:
            if not self._place_turn_again(turn, event):
                self._turns.fail(turn, self._context.engines.absent() or error)
        elif event.turn_id is None and session is not None:
            rejected = session.turn
            if self._openings.place_again(session, session.engine):
                return
            if rejected is None or not self._place_turn_again(rejected, event):
                absent = None if self._openings.holds(session) else self._context.engines.absent()
                self._unloaded(session, absent or error)

    def _place_turn_again(self, turn: Turn, event: OutOfCapacity) -> bool:
        """Start a rejected turn on another engine, once. Return False if there is none with room.

        A session that its engine holds leaves it only for free memory elsewhere.
        """
        session = turn.session
        engine = session.engine
        placement = self._context.placement
        if engine is None or turn.avoids is not None or turn.is_admitted or not turn.is_in(TurnState.RUNNING):
            return False
        is_held = event.turn_id is not None and session.conversation is None
        if is_held and not placement.has_room(max(event.needed_bytes, self._kv_bytes(turn, engine)), engine):
            return False
        if not placement.has_other(engine):
            return False
        log.info("turn_placed_again session=%s", short_id(session.id))
        for pending in turn.pending:
            pending.avoids = engine
        # Retries that are attached to the turn may want another form of the reply than its first request.
        turn.retries[:0] = [
            (pending, turn.ask.model_copy(update={"stream": pending.streamed})) for pending in turn.pending
        ]
        self._turns.end(turn)
        if event.turn_id is None:
            session.unload()  # the engine holds nothing of it
        elif session.conversation is None:
            unload(self._context, session)
        return True

    def _kv_bytes(self, turn: Turn, engine: int) -> int:
        """Return the KV bytes of a named session at the end of its longest answer. 0 if they are not known."""
        tokens = turn.session.known_transcript.token_count + len(turn.prompt_ids) + turn.ask.max_new_tokens
        return self._context.engines.all[engine].kv_bytes(min(tokens, self._context.context_tokens))

    def _unloaded(self, session: Session, error: Exception) -> None:
        """Reject an open that is not acknowledged; make an acknowledged session cold and fail its turn."""
        session.unload()
        if self._openings.failed(session, error):
            return
        self._turns.unloaded(session, error)
        self._closes.freed(session)
        self._conversations.drop_cold()

    def _session_of(self, event: Event) -> Session | None:
        """Return the session that an event is about, if it is in the table."""
        session_id = getattr(event, "session_id", None)
        if session_id is not None:
            return self._context.table.find(session_id)
        turn = self._turns.find(getattr(event, "turn_id", ""))
        return None if turn is None else turn.session


def _turn_error(event: TurnFailed | OpenFailed) -> Exception:
    """Return the error of a turn. Pictures are sent without arrays only if the engine seems to have their features."""
    if event.lacks_pictures:
        message = "The server has just released a picture of the conversation; send the request again."
        return Refused("request_dropped", message, retry_after_s=1)
    return RuntimeError(event.error)
