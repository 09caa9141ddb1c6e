"""Turns that are not done, and every way in which a turn ends.

All methods run on the pump's thread, under its lock.
"""

from __future__ import annotations

import logging
from collections.abc import Set

from ..chat.transcript import short_id
from ..ipc.messages import Cancelled, StopTurn, Timings, Usage
from ..protocol import replies
from ..protocol.openai import Chat
from ..protocol.requests import Ask, Cancel
from .context import WorkerContext
from .conversations import Conversations
from .openings import digest_of, unload
from .pending import PendingRequest
from .sessions import MAX_ENGINE_LOSSES, Session, Turn
from .states import TurnState

log = logging.getLogger(__name__)


class Turns:
    """All turns that are not done, by the request ID of their first row."""

    def __init__(self, context: WorkerContext, conversations: Conversations) -> None:
        self._context = context
        self._conversations = conversations
        self._turns: dict[str, Turn] = {}
        self._retries: list[tuple[PendingRequest, Ask | Chat]] = []
        self._lost: list[tuple[Session, str]] = []

    def add(self, turn: Turn) -> None:
        """Add a turn that starts; its session is busy from now on."""
        self._turns[turn.id] = turn
        turn.session.turn = turn

    def find(self, turn_id: str) -> Turn | None:
        """Return the turn of this ID, or None if it is done."""
        return self._turns.get(turn_id)

    def cancel(self, pending: PendingRequest, request: Cancel) -> None:
        """Stop the session's turn. Raise `Refused`."""
        context = self._context
        session = context.table.get(request.session_id, context.clock(), digest_of(request.session_token))
        if session.turn is None:
            pending.reply(replies.cancelled(session.id, False))
            return
        session.turn.cancels.append(pending)
        self.stop(session.turn, "cancelled")

    def disconnected(self, pending: PendingRequest) -> None:
        """Stop the turn that only a disconnected client waited for."""
        for turn in list(self._turns.values()):
            turn.retries = [retry for retry in turn.retries if retry[0] is not pending]
            if pending in turn.pending:
                turn.pending.remove(pending)
                if not turn.pending:
                    log.info("client_left session=%s", short_id(turn.session.id))
                    # The client of a conversation may continue behind the part of the answer that it has received.
                    self.stop(turn, "cancelled", keep_answer=turn.session.conversation is not None)

    def stop(self, turn: Turn, reason: str, keep_answer: bool = False) -> None:
        """End a turn early. With `keep_answer` the tokens so far become the answer."""
        if turn.is_in(TurnState.PREPARING):
            self.cancelled(turn, reason)
        elif turn.is_in(TurnState.RUNNING):
            turn.advance(TurnState.STOPPING)
            self._context.engines.submit_if_held(turn.session, StopTurn(turn.id, reason, keep_answer))

    def all(self) -> list[Turn]:
        """Return all turns that are not done."""
        return list(self._turns.values())

    def unloaded(self, session: Session, error: Exception) -> None:
        """Fail the turn of a session that the engine does not hold any more. An answer that is being stored stays."""
        if session.turn is not None and session.turn.in_engine:
            self.fail(session.turn, error)

    def engine_lost(self, lost: Set[Session]) -> None:
        """Fail the turns of the sessions that the lost engine held."""
        for turn in list(self._turns.values()):
            session = turn.session
            if turn.in_engine and session in lost:
                session.engine_losses += 1
                if session.engine_losses == MAX_ENGINE_LOSSES:
                    log.error("session_rejected session=%s engines_lost=%d", short_id(session.id), MAX_ENGINE_LOSSES)
                self.fail(turn, self._context.engines.restarting())

    def cancelled(self, turn: Turn, reason: str, event: Cancelled | None = None) -> None:
        """End a turn that leaves its session unchanged. `event` is None if the engine did not know the turn."""
        if event is None:
            waited_ms = (self._context.monotonic() - turn.arrived_s) * 1e3
            event = Cancelled(turn.id, reason, Usage(0, 0, 0), Timings(waited_ms, waited_ms, waited_ms))
        self._context.counters.add_tokens(event.usage)
        facts = replies.answer_facts(turn.session.id, reason, event.usage, event.timings, token_ids=None)
        self.end(turn, was_cancelled=True)
        for pending in turn.pending:
            pending.answer(turn.text, facts)

    def fail(self, turn: Turn, error: Exception) -> None:
        """End a turn with an error."""
        self.end(turn)
        for pending in turn.pending:
            pending.refuse(error)

    def end(self, turn: Turn, was_cancelled: bool = False) -> None:
        """End a turn whose requests the caller answers. Requests to cancel it are answered here."""
        turn.advance(TurnState.DONE)
        del self._turns[turn.id]
        session = turn.session
        session.turn = None
        session.used_at_s = self._context.clock()
        if turn.record is None and session.conversation is not None:
            self._conversations.unfinished(session, turn.kept_tokens)
        elif turn.record is None and turn.crops:
            unload(self._context, session)  # the next turn rebuilds what this one has dropped
        if turn.prepared is not None:
            turn.prepared.cancel()  # no effect if it has begun
        self._retries += turn.retries
        for pending in turn.cancels:
            pending.reply(replies.cancelled(turn.session.id, was_cancelled))

    def lose_session(self, session: Session, reason: str) -> None:
        """Mark a session as lost: its journal cannot give it back ("damaged"), or another instance has it ("moved")."""
        self._lost.append((session, reason))

    def take_retries(self) -> list[tuple[PendingRequest, Ask | Chat]]:
        """Return the retries whose stopped turn is done, to be started now."""
        retries = self._retries
        self._retries = []
        return retries

    def take_lost(self) -> list[tuple[Session, str]]:
        """Return the sessions that only a journal held and that it cannot give back, each with the reason."""
        lost = self._lost
        self._lost = []
        return lost
