"""Dispatch of requests and events to openings and turns; close, expiry, drain, recovery and the loss of the engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from ..chat.transcript import short_id
from ..errors import Refused
from ..ipc.messages import (
    Admitted,
    Cancelled,
    Closed,
    CloseSession,
    Delta,
    Event,
    Finished,
    Memory,
    OpenFailed,
    OutOfCapacity,
    Prefilled,
    Report,
    TurnFailed,
)
from ..metrics import MetricValues
from ..protocol import replies
from ..protocol.constants import CLOSED_SESSION_HEADER
from ..protocol.requests import Ask, Cancel, Close, Open, Request
from .context import WorkerContext
from .engines import EngineLost, EngineUp
from .openings import Openings, digest_of
from .pending import PendingRequest
from .sessions import Residency, Session, SessionState, session_not_found
from .turns import Turns

log = logging.getLogger(__name__)

# How often expired journals are searched for. The journals of sessions in the table are removed with the session.
JOURNAL_SWEEP_S = 60.0
# A platform that stops a container gives it 30 s. Turns may run for this long; the rest is for their last lines.
DRAIN_S = 25.0


class SessionManager:
    """Owns all sessions of one worker. All methods run on the pump's thread, under its lock, except `drain`."""

    def __init__(self, context: WorkerContext, monotonic: Callable[[], float] = time.monotonic) -> None:
        """`monotonic`: seconds, for the drain and for the journal's sweep."""
        self._context = context
        self._monotonic = monotonic
        self._openings = Openings(context)
        self._turns = Turns(context)
        self._closing: dict[str, list[PendingRequest]] = {}
        self._memory = Memory()
        self._journal_swept_s = monotonic()

    def recover(self) -> None:
        """Add the sessions that the journal holds. Call it once, before the first row. Blocks."""
        context = self._context
        now_s = context.clock()
        found = context.journal.recover(now_s)
        for stored in found.expired:
            context.table.remember(stored.session_id, "expired")
        for stored in found.live:
            context.table.recover(stored.session_id, stored.expires_at_s, now_s, stored.token_digest)
            if stored.retry_key is not None:
                self._openings.remember(stored.retry_key, stored.session_id)
        if found.live or found.expired:
            log.info("journal_recovered sessions=%d expired=%d", len(found.live), len(found.expired))

    def handle(self, pending: PendingRequest, request: Request) -> None:
        """Start the work of a request. Raise `Refused` if it is rejected at once."""
        match request:
            case Open():
                self._openings.start(pending, request)
            case Ask():
                self._turns.start(pending, request)
            case Close():
                self._close(pending, request)
            case Cancel():
                self._turns.cancel(pending, request)
        self._follow_up()

    def disconnected(self, pending: PendingRequest) -> None:
        """Stop the work that only this request's client waited for."""
        pending.disconnected = True
        self._turns.disconnected(pending)
        self._follow_up()

    def on_event(self, item: Report | EngineLost | EngineUp | Callable[[], None]) -> None:
        """Apply what the inbox delivered. An error fails one session and never the caller."""
        match item:
            case Report():
                self._memory = item.memory
                for event in item.events:
                    self._apply(event)
            case EngineLost():
                self._engine_lost(item)
            case EngineUp():
                self._context.gate.connect(item.client)
                log.info("engine_up sessions=%d", len(self._context.table))
            case _:
                try:
                    item()
                except Exception:
                    log.exception("step_failed")
        self._follow_up()

    def sweep(self) -> None:
        """Expire sessions, sweep the journal, and end turns that outlast the drain. Call it about once a second."""
        context = self._context
        for session in context.table.expired(context.clock()):
            if self._openings.holds(session):
                continue  # it expires after its acknowledgement
            log.info("session_expired session=%s", short_id(session.id))
            self._drop(session, "expired")
        now_s = self._monotonic()
        if now_s - self._journal_swept_s > JOURNAL_SWEEP_S:
            self._journal_swept_s = now_s
            context.journal.sweep(context.clock())
        draining_since_s = context.gate.draining_since_s
        if draining_since_s is not None and now_s - draining_since_s > DRAIN_S:
            self._turns.stop_all("shutdown")

    def drain(self) -> None:
        """Take no new work from now on. Takes no lock, so a signal handler may call it."""
        if not self._context.gate.draining:
            self._context.gate.draining_since_s = self._monotonic()

    @property
    def drained(self) -> bool:
        """Whether a drain was asked for and everything is stored."""
        return self._context.gate.draining and self._context.journal.flush(timeout_s=0)

    @property
    def freeing(self) -> bool:
        """Whether the engine has still to free a session that a client is closing."""
        sessions = (self._context.table.find(session_id) for session_id in self._closing)
        return any(session is not None and session.in_engine for session in sessions)

    def take_ended_sequences(self) -> list[str]:
        """Return the sequences of the sessions that have ended since the last call."""
        return self._context.table.take_ended()

    def has_session(self, session_id: str) -> bool:
        """Return whether a session of this ID is opening, open or closing."""
        return session_id in self._context.table

    def metric_values(self) -> MetricValues:
        """Return all gauges and counters as of now."""
        memory = self._memory
        context = self._context
        counters = context.counters
        return MetricValues(
            open_sessions=len(context.table),
            running_turns=context.table.running_turns,
            resident_sessions=memory.resident,
            parked_sessions=memory.parked,
            cold_sessions=memory.cold,
            features_bytes=memory.features_bytes,
            kv_bytes=memory.kv_bytes,
            parked_bytes=memory.parked_bytes,
            device_bytes=memory.allocated_bytes or memory.features_bytes + memory.kv_bytes,
            turns_total=counters.turns,
            refusals_total=counters.refusals,
            rebuilds_total=counters.rebuilds,
            engine_restarts_total=counters.engine_restarts,
            journal_failures_total=context.journal.failures_total,
        )

    def count_refusal(self) -> None:
        """Count a request that was answered with an error."""
        self._context.counters.refusals += 1

    # --- Closes ---

    def _close(self, pending: PendingRequest, request: Close) -> None:
        session_id = request.session_id
        table = self._context.table
        if session_id in self._closing:
            self._closing[session_id].append(pending)
            return
        if table.was_closed(session_id):
            close(pending, session_id)
            return
        session = table.get(session_id, self._context.clock(), digest_of(request.session_token))
        if self._openings.failed(session, session_not_found()):
            close(pending, session_id)
            return
        session.advance(SessionState.CLOSING)
        self._closing[session_id] = [pending]
        self._turns.closing(session)
        if session.in_engine:
            self._context.gate.submit_if_connected(CloseSession(session_id))
        else:
            self._freed(session)

    def _freed(self, session: Session) -> None:
        """Remove a session that a client closes, after the engine has freed its memory."""
        if session.id in self._closing:
            self._turns.unloaded(session, session_not_found())
            removed = self._drop(session, "closed")
            self._context.inbox.when_done(removed, partial(self._closed, session.id))

    def _closed(self, session_id: str, _: Future[bool] | None = None) -> None:
        """Acknowledge a close, after the journal has removed the session or another instance has taken it over."""
        log.info("session_close session=%s open=%d", short_id(session_id), len(self._context.table))
        for pending in self._closing.pop(session_id):
            if not pending.disconnected:
                close(pending, session_id)

    def _drop(self, session: Session, reason: str) -> Future[bool]:
        """Remove a session from the table, the engine and the journal. The future is the journal's removal."""
        self._unload(session)
        self._context.table.end(session, reason)
        return self._context.journal.forget(session.id)

    def _unload(self, session: Session) -> None:
        if session.in_engine:
            self._context.gate.submit_if_connected(CloseSession(session.id))
            session.unload()

    # --- Events of the engine ---

    def _apply(self, event: Event) -> None:
        try:
            self._dispatch(event)
        except Exception as error:
            log.exception("event_failed event=%s", type(event).__name__)
            session = self._session_of(event)
            if session is not None:
                self._reset(session, error)

    def _session_of(self, event: Event) -> Session | None:
        session_id = getattr(event, "session_id", None)
        if session_id is not None:
            return self._context.table.find(session_id)
        turn_id = getattr(event, "turn_id", None)
        sessions = (session for session in self._context.table if session.turn is not None)
        return next((session for session in sessions if session.turn.id == turn_id), None)

    def _reset(self, session: Session, error: Exception) -> None:
        """Take a session back from the engine after an error: it stays open, and is rebuilt by its next turn."""
        self._unload(session)
        self._unloaded(session, error)

    def _dispatch(self, event: Event) -> None:
        match event:
            case Delta():
                self._turns.delta(event)
            case Finished():
                self._turns.finished(event)
            case Cancelled():
                self._turns.cancelled(event.turn_id, event.reason)
            case TurnFailed():
                self._turns.failed(event.turn_id, RuntimeError(event.error))
            case OutOfCapacity():
                self._out_of_capacity(event)
            case Admitted() | Prefilled() | OpenFailed() | Closed():
                session = self._context.table.find(event.session_id)
                if session is not None:
                    self._session_event(session, event)

    def _session_event(self, session: Session, event: Admitted | Prefilled | OpenFailed | Closed) -> None:
        match event:
            case Admitted():
                self._openings.admitted(session)
            case Prefilled():
                if session.is_in(Residency.LOADING):
                    session.advance(Residency.LOADED)
                sizes = (short_id(session.id), event.encode_ms, event.total_ms)
                log.info("session_ready session=%s encode_ms=%.0f total_ms=%.0f", *sizes)
            case OpenFailed():
                self._unloaded(session, RuntimeError(event.error))
            case Closed():
                if session.is_in(SessionState.CLOSING):
                    session.unload()
                    self._freed(session)

    def _out_of_capacity(self, event: OutOfCapacity) -> None:
        message = (
            f"The device's memory cannot hold the session: {event.needed_bytes:,} bytes are needed, "
            f"{event.free_bytes:,} are free, {event.open_sessions} sessions are open."
        )
        error = Refused("capacity", message)
        if event.turn_id is not None:
            self._turns.failed(event.turn_id, error)
            return
        session = self._context.table.find(event.session_id)
        if session is not None:
            self._unloaded(session, error)

    def _unloaded(self, session: Session, error: Exception) -> None:
        """The engine does not hold the session. An acknowledged session becomes cold; an open is rejected."""
        session.unload()
        if self._openings.failed(session, error):
            return
        self._turns.unloaded(session, error)
        if session.is_in(SessionState.CLOSING):
            self._freed(session)

    def _engine_lost(self, item: EngineLost) -> None:
        context = self._context
        context.gate.disconnect(item.retry_after_s)
        context.counters.engine_restarts += 1
        self._memory = Memory()
        for session in context.table:
            session.unload()
        self._openings.engine_lost()
        self._turns.engine_lost()
        for session_id in list(self._closing):
            session = context.table.find(session_id)
            if session is not None:
                self._freed(session)

    # --- Work that turns leave behind ---

    def _follow_up(self) -> None:
        """Drop sessions that the journal cannot give back, and start retries whose stopped turn is done."""
        for session, reason in self._turns.take_lost():
            if session.id in self._context.table:
                log.warning("session_lost session=%s reason=%s", short_id(session.id), reason)
                self._unload(session)
                self._context.table.end(session, reason)
                if session.id in self._closing:
                    self._closed(session.id)
        for pending, ask in self._turns.take_retries():
            if pending.disconnected:
                continue
            try:
                self._turns.start(pending, ask)
            except Exception as error:
                pending.refuse(error)


def close(pending: PendingRequest, session_id: str) -> None:
    """Acknowledge a close."""
    pending.reply(replies.closed(session_id), {CLOSED_SESSION_HEADER: session_id})
