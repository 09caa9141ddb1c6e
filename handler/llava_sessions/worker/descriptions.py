"""Descriptions of sessions: where the KV cache of a session is, its memory and its expiry.

A description renews no session, waits for no turn, and claims no session from the journal. All methods run on the
pump's thread, under its lock.
"""

from __future__ import annotations

from ..ipc.messages import Described, DescribeSession, Residence
from ..protocol import replies
from ..protocol.requests import Describe
from .context import WorkerContext
from .openings import digest_of
from .pending import PendingRequest
from .sessions import Session

_COLD = Residence()


class Descriptions:
    """The descriptions that the engine has still to answer, by the request ID of their row."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._pending: dict[str, tuple[PendingRequest, Session, int | None]] = {}  # the last: the engine

    def start(self, pending: PendingRequest, request: Describe) -> None:
        """Ask the engine for a session, or describe a session that the engine does not hold. Raise `Refused`."""
        context = self._context
        session = context.table.get(request.session_id, context.clock(), digest_of(request.session_token))
        if not session.in_engine:
            _reply(pending, session, _COLD)
            return
        request_id = pending.row.request_id
        context.engines.submit(session, DescribeSession(session.id, request_id))
        self._pending[request_id] = (pending, session, session.engine)

    def on_described(self, event: Described) -> None:
        """Reply with the engine's answer, unless the client has left."""
        pending, session, _ = self._pending.pop(event.request_id, (None, None, None))
        if pending is not None and session is not None:
            _reply(pending, session, event.residence)

    def engine_lost(self, engine: int) -> None:
        """Describe the sessions that the lost engine held: they are cold."""
        for request_id, (pending, session, asked) in list(self._pending.items()):
            if asked == engine:
                del self._pending[request_id]
                _reply(pending, session, _COLD)

    def disconnected(self, pending: PendingRequest) -> None:
        """Drop a request whose client has left."""
        self._pending.pop(pending.row.request_id, None)


def _reply(pending: PendingRequest, session: Session, residence: Residence) -> None:
    pending.reply(
        replies.described(session.id, replies.utc_text(session.ends_at_s), session.turn is not None, residence)
    )
