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
from .sessions import Residency, Session, SessionState
from .turns import Turns

log = logging.getLogger(__name__)


class EngineEvents:
    """Applies events. An acknowledged session that the engine loses stays open, and its next turn rebuilds it."""

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

    def apply(self, event: Event) -> None:
        """Apply one event. Never raises."""
        try:
            self._dispatch(event)
        except Exception as error:
            log.exception("event_failed event=%s", type(event).__name__)
            self._contain(event, error)

    def engine_lost(self) -> None:
        """Make every session COLD; fail the turns and opens that only the lost engine held."""
        for session in self._context.table:
            session.unload()
        self._descriptions.engine_lost()
        self._openings.engine_lost()
        self._turns.engine_lost()
        for session in self._context.table:
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
                encode_ms = round(event.encode_ms)
                total_ms = round(event.total_ms)
                log.info("session_ready session=%s encode_ms=%d total_ms=%d", short_id(session.id), encode_ms, total_ms)
            case OpenFailed():
                self._unloaded(session, _turn_error(event))
            case Closed():
                if session.is_in(SessionState.CLOSING):
                    session.unload()
                    self._closes.freed(session)

    def _out_of_capacity(self, event: OutOfCapacity) -> None:
        message = (
            f"The device's memory cannot hold the session: {event.needed_bytes:,} bytes are needed, "
            f"{event.free_bytes:,} are free, {event.open_sessions} sessions are open."
        )
        if event.waiting_turns:
            message = f"{event.waiting_turns} questions wait for device memory already; try again later."
        error = Refused("capacity", message)
        if event.turn_id is not None:
            turn = self._turns.find(event.turn_id)
            if turn is not None:
                self._turns.fail(turn, error)
            return
        session = self._context.table.find(event.session_id)
        if session is not None:
            self._unloaded(session, error)

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
