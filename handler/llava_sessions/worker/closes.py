"""The life of a close: the engine frees the memory, the journal removes the records, the client is answered.

All methods run on the pump's thread, under its lock.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from functools import partial

from ..chat.transcript import short_id
from ..ipc.messages import CloseSession
from ..journal.journal import Removal
from ..protocol import replies
from ..protocol.constants import CLOSED_SESSION_HEADER
from ..protocol.requests import Close
from .context import WorkerContext
from .openings import Openings, digest_of, unload
from .pending import PendingRequest, session_moved
from .sessions import Session, same_token, session_not_found
from .states import SessionState, TurnState
from .turns import Turns

log = logging.getLogger(__name__)


class Closes:
    """All closes that are not answered, by session ID."""

    def __init__(self, context: WorkerContext, openings: Openings, turns: Turns) -> None:
        self._context = context
        self._openings = openings
        self._turns = turns
        self._pending: dict[str, list[PendingRequest]] = {}

    def start(self, pending: PendingRequest, request: Close) -> None:
        """Start a close, or attach to the one that runs. Raise `Refused`."""
        session_id = request.session_id
        table = self._context.table
        token_digest = digest_of(request.session_token)
        was_closed = table.was_closed(session_id, token_digest)  # the journal may still have to remove it
        closing = table.find(session_id) if session_id in self._pending else None
        is_closing = closing is not None and same_token(closing.token_digest, token_digest)
        if is_closing or (was_closed and session_id in self._pending):
            self._pending[session_id].append(pending)
            return
        if was_closed:
            acknowledge_close(pending, session_id)
            return
        session = table.get(session_id, self._context.clock(), token_digest)
        if self._openings.failed(session, session_not_found()):
            acknowledge_close(pending, session_id)
            return
        if session.is_stored_only and self._context.adopts:
            table.end(session, None)  # it may be another instance's: it must be claimed to be removed
            raise session_not_found()
        session.advance(SessionState.CLOSING)
        self._pending[session_id] = [pending]
        if session.turn is not None and session.turn.is_in(TurnState.PREPARING):
            self._turns.cancelled(session.turn, "cancelled")  # the engine does not know the turn
        if session.in_engine:
            self._context.engines.submit_if_held(session, CloseSession(session_id))
        else:
            self.freed(session)

    def freed(self, session: Session) -> None:
        """Remove a session that is being closed and whose memory the engine has freed."""
        if session.id in self._pending:
            self._turns.unloaded(session, session_not_found())
            removed = drop(self._context, session, "closed")
            self._context.inbox.when_done(removed, partial(self._removed, session))

    def lost(self, session: Session, reason: str) -> None:
        """Answer the close of a session that another instance has taken over ("moved"), or whose journal is damaged."""
        if session.id in self._pending:
            if reason == "moved":
                self._moved(session.id)
            else:
                self._acknowledge(session.id)

    @property
    def freeing(self) -> bool:
        """Whether an engine has still to free a session whose close arrived in this step.

        The journal may take longer.
        """
        arrived = (one for one, pending in self._pending.items() if any(not request.steps for request in pending))
        sessions = (self._context.table.find(session_id) for session_id in arrived)
        return any(session is not None and session.in_engine for session in sessions)

    def _removed(self, session: Session, removed: Future[Removal]) -> None:
        """Acknowledge a close, unless another instance has the session: a retry claims it and closes it."""
        if removed.result() is Removal.NOT_OWNER:
            self._context.table.remember(session.id, "moved", session.token_digest)
            self._moved(session.id)
        else:
            self._acknowledge(session.id)

    def _moved(self, session_id: str) -> None:
        for pending in self._pending.pop(session_id):
            if not pending.disconnected:
                pending.refuse(session_moved())

    def _acknowledge(self, session_id: str) -> None:
        log.info("session_close session=%s open=%d", short_id(session_id), len(self._context.table))
        for pending in self._pending.pop(session_id):
            if not pending.disconnected:
                acknowledge_close(pending, session_id)


def acknowledge_close(pending: PendingRequest, session_id: str) -> None:
    """Reply to a close."""
    pending.reply(replies.closed(session_id), {CLOSED_SESSION_HEADER: session_id})


def drop(context: WorkerContext, session: Session, reason: str) -> Future[Removal]:
    """Remove a session from the engine, the table and the journal. The future is the journal's removal."""
    unload(context, session)
    context.table.end(session, reason)
    return context.journal.forget(session.id)


def expire(context: WorkerContext, session: Session) -> None:
    """Remove a session whose time is over here. Another instance may have it, and may have used it since."""
    if session.is_stored_only and context.table.may_release_stored and context.clock() < session.expires_at_s:
        context.table.end(session, None)
        return
    log.info("session_expired session=%s", short_id(session.id))

    def removed(future: Future[Removal]) -> None:
        if future.result() is Removal.NOT_OWNER and context.clock() < session.expires_at_s:
            context.table.remember(session.id, "moved", session.token_digest)

    context.inbox.when_done(drop(context, session, "expired"), removed)
