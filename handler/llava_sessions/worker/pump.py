"""Owns the exchange with TorchServe's batches: which row waits for what, and what each row is answered in this step.

`exchange()` takes all active rows and gives each a reply or holds it. It never raises. Must not know TorchServe's API
(the edge translates), torch, or how an answer is computed (the engine does).

A row that is held gets no prediction in this step; the frontend keeps its request open and sends the row again. So the
status of a reply stays free until there is something to say, and a refusal or a failure keeps its own HTTP status.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from ..chat.transcript import Conversation, short_id
from ..config import MediaLimits, RequestLimits
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
from ..journal.journal import Journal
from ..metrics import MetricValues
from ..protocol.constants import NEW_SESSION, STREAM_TYPE
from ..protocol.requests import Ask, Cancel, Close, Open, parse
from ..text.chat_template import ChatTemplate
from ..torchserve.batch import Reply, Row
from ..torchserve.sequences import SequenceEnd, SequenceReaper
from .context import WorkerContext
from .engines import EngineLost, EngineUp
from .openings import Opens, digest_of
from .pending import EngineDoor, PendingRequest
from .preparation import Preparer
from .sessions import SessionTable
from .telling import as_refusal, refuse, tell_closed
from .turns import Turns

log = logging.getLogger(__name__)

# How long a step waits for something to say. A new request joins between steps, so this bounds what it waits for.
WAIT_S = 0.02
# How long a step waits for the engine to free a session, so that a close is answered in the step in which it came.
CLOSE_WAIT_S = 2.0
# While rows are active, TorchServe calls without a pause; a silence of this length means that all their clients are
# gone.
SILENCE_S = 5.0
# How often expired journals are looked for; those of sessions that are open here go with these.
JOURNAL_SWEEP_S = 60.0
# A platform that stops a container gives it 30 s: so long turns may run on, and the rest is for their last words.
DRAIN_S = 25.0


class Pump:
    """Answers rows from sessions. One lock guards all state: TorchServe's thread and the sweeper's take turns."""

    def __init__(
        self,
        engine: EngineDoor,
        inbox: queue.SimpleQueue,
        tokens: ChatTemplate,
        table: SessionTable[Conversation],
        context_tokens: int,
        limits: RequestLimits,
        media_limits: MediaLimits,
        sequences: SequenceEnd,
        journal: Journal,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`inbox`: where the engine puts its reports; `clock`: seconds since the epoch."""
        self._inbox = inbox
        self._limits = limits
        preparer = Preparer(tokens, media_limits, journal, clock)
        # The frontend has places for twice as many and some (model-config.yaml): half of what the open ones leave.
        self._sequences = SequenceReaper(sequences, linger=table.max_sessions // 2 + 8)
        places = (table, preparer, journal, self._sequences, context_tokens, clock)
        self._desk = WorkerContext(engine, *places, post=inbox.put, let_go=self._end_sequence_of)
        self._opens = Opens(self._desk)
        self._turns = Turns(self._desk)
        self._lock = threading.Lock()
        self._entries: dict[str, PendingRequest] = {}
        self._closing: dict[str, list[PendingRequest]] = {}
        self._memory = Memory()
        self._last_exchange_s = time.monotonic()
        self._journal_swept_s = time.monotonic()

    def recover(self) -> None:
        """Open again what the journal has stored. Call it once, before the first row."""
        desk, now_s = self._desk, self._desk.clock()
        found = desk.journal.recover(now_s)
        for head in found.expired:
            desk.table.remember(head.session_id, "expired")
        for head in found.live:
            desk.table.recover(head.session_id, head.expires_at_s, now_s, head.token_digest)
            if head.retry_key is not None:
                self._opens.remember(head.retry_key, head.session_id)
        if found.live or found.expired:
            log.info("journal_recovered sessions=%d expired=%d", len(found.live), len(found.expired))

    def exchange(self, rows: list[Row]) -> list[Reply | None]:
        """One step: `rows` are all active requests. A reply for each, or None where the row is held."""
        with self._lock:
            self._sequences.begin_step(row.sequence_id for row in rows)
            self._drain_inbox()  # a new row meets what is known by now, an engine's end or start among it
            for row in rows:
                if row.request_id not in self._entries:
                    self._admit(row)
            self._drop_vanished({row.request_id for row in rows})
            self._wait()
            replies = [self._safe_reply(self._entries[row.request_id]) for row in rows]
            self._last_exchange_s = time.monotonic()
            self._sequences.end_step()
            return replies

    def sweep(self) -> None:
        """Expire sessions, and notice clients that left while nothing else went on. Call it about once a second."""
        with self._lock:
            self._drain_inbox()
            now = time.monotonic()
            if self._entries and now - self._last_exchange_s > SILENCE_S:
                self._drop_vanished(set())
            desk = self._desk
            for session in desk.table.expired(desk.clock()):
                log.info("session_expired session=%s", short_id(session.id))
                desk.forget(session, "expired")
                self._sequences.end(session.id)
            self._sequences.sweep(entry.row.sequence_id for entry in self._entries.values())
            if now - self._journal_swept_s > JOURNAL_SWEEP_S:
                self._journal_swept_s = now
                desk.journal.sweep(desk.clock())
            if desk.draining and now - desk.draining_since_s > DRAIN_S:
                self._turns.cut_all("shutdown")

    def drain(self) -> None:
        """Take nothing new from now on; turns that run may finish for `DRAIN_S`, then they end with what they have.

        Safe in a signal handler: it takes no lock.
        """
        if not self._desk.draining:
            self._desk.draining_since_s = time.monotonic()

    @property
    def drained(self) -> bool:
        """Whether, after `drain`, all is answered and stored."""
        return self._desk.draining and not self._entries and self._desk.journal.flush(timeout_s=0)

    @property
    def busy(self) -> bool:
        """Whether any row is still waiting for its last reply."""
        return bool(self._entries)

    def figures(self) -> MetricValues:
        """Gauges and counters as of now."""
        with self._lock:
            return self._figures()

    def _figures(self) -> MetricValues:
        memory, desk = self._memory, self._desk
        held = memory.features_bytes + memory.kv_bytes
        return MetricValues(
            open_sessions=len(desk.table),
            running_turns=desk.table.running_turns,
            resident_sessions=memory.resident,
            parked_sessions=memory.offloaded,
            cold_sessions=memory.cold,
            features_bytes=memory.features_bytes,
            kv_bytes=memory.kv_bytes,
            parked_bytes=memory.offloaded_bytes,
            device_bytes=memory.allocated_bytes or held,
            turns_total=desk.turns_total,
            refusals_total=desk.refusals_total,
            rebuilds_total=desk.rebuilds_total,
            engine_restarts_total=desk.engine_restarts_total,
            journal_failures_total=desk.journal.failures_total,
        )

    # --- requests ---

    def _admit(self, row: Row) -> None:
        """Take a new row: parse it, and start what it asks for or refuse it."""
        entry = self._entries[row.request_id] = PendingRequest(row)
        try:
            request = parse(row.body, row.headers, self._limits)
            match request:
                case Open():
                    self._opens.start(entry, request)
                case Ask():
                    self._turns.start(entry, request)
                case Close():
                    self._close(entry, request)
                case Cancel():
                    self._turns.cancel(entry, request)
        except Exception as error:
            refuse(self._desk, entry, error)

    def _close(self, entry: PendingRequest, request: Close) -> None:
        session_id, desk = request.session_id, self._desk
        if session_id in self._closing:
            self._closing[session_id].append(entry)
            return
        if desk.table.was_closed(session_id) or self._is_ours(entry):
            tell_closed(entry, session_id)
            return
        session = desk.table.get(session_id, desk.clock(), digest_of(request.session_token))
        session.closing = True
        self._closing[session_id] = [entry]
        self._turns.closing(session)
        if session.in_engine:
            desk.submit(CloseSession(session_id))
        else:
            self._freed(session_id)

    def _is_ours(self, entry: PendingRequest) -> bool:
        """Whether the request only ends its sequence; that of an open session goes the way of every close."""
        return self._sequences.is_ours(entry.row) and entry.row.sequence_id not in self._desk.table

    def _drop_vanished(self, active: set[str]) -> None:
        """Forget rows whose clients left, and end what only they were waiting for."""
        for request_id in self._entries.keys() - active:
            entry = self._entries.pop(request_id)
            entry.gone = True
            self._end_sequence_of(entry)
            self._turns.left(entry)

    # --- events ---

    def _wait(self) -> None:
        """Take in what has happened; when no row can be answered by it, wait a little for more."""
        self._drain_inbox()
        began = time.monotonic()
        while (freeing := self._freeing) or not any(entry.lines or entry.final for entry in self._entries.values()):
            left = began + (CLOSE_WAIT_S if freeing else WAIT_S) - time.monotonic()
            if left <= 0:
                return
            try:
                self._take(self._inbox.get(timeout=left))
            except queue.Empty:
                return
            self._drain_inbox()

    @property
    def _freeing(self) -> bool:
        """Whether the engine has still to free a session that is being closed; a journal may take its time."""
        return any(session_id in self._desk.table for session_id in self._closing)

    def _drain_inbox(self) -> None:
        while True:
            try:
                self._take(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _take(self, item: Report | EngineLost | EngineUp | Callable[[], None]) -> None:
        """A report of the engine, news of its process, or what to do with work that is done."""
        if isinstance(item, Report):
            self._memory = item.memory
            steps = [partial(self._hear, event) for event in item.events]
        elif isinstance(item, EngineLost):
            steps = [partial(self._engine_lost, item)]
        elif isinstance(item, EngineUp):
            steps = [partial(self._engine_up, item)]
        else:
            steps = [item]
        for step in steps:
            try:
                step()
            except Exception:
                log.exception("event_lost")  # one session's fault stays its own

    def _hear(self, event: Event) -> None:
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
                self._no_room(event)
            case Admitted():
                self._opens.accepted(event.session_id)
            case Prefilled():
                times = f"encode_ms={event.encode_ms:.0f} total_ms={event.total_ms:.0f}"
                log.info("session_ready session=%s %s", short_id(event.session_id), times)
            case OpenFailed():
                self._open_failed(event.session_id, RuntimeError(event.error))
            case Closed():
                self._freed(event.session_id)

    def _no_room(self, event: OutOfCapacity) -> None:
        sizes = f"{event.needed_bytes:,} bytes are needed, {event.free_bytes:,} are free"
        message = f"The device's memory can't hold it: {sizes} beside what is running, {event.open_sessions} are open."
        refused = Refused("capacity", message)
        if event.turn_id is not None:
            self._turns.failed(event.turn_id, refused)
        elif not self._opens.failed(event.session_id, refused):
            session = self._desk.table.find(event.session_id)
            if session is not None:  # it stays open, and is rebuilt when it speaks again
                self._turns.not_rebuilt(session, refused)

    def _open_failed(self, session_id: str, error: Exception) -> None:
        session = self._desk.table.find(session_id)
        if self._opens.failed(session_id, error) or session is None:
            return
        if not self._turns.not_rebuilt(session, error):
            self._desk.forget(session, "failed")
            self._sequences.end(session_id)

    def _freed(self, session_id: str) -> None:
        """The engine holds nothing of a session any more, or never did; once its journal is gone too, it is closed."""
        session = self._desk.table.find(session_id)
        if session_id not in self._closing or session is None:
            return  # expired, or carried on by another: the table knows already
        session.in_engine = False
        self._desk.when_done(self._desk.forget(session, "closed"), partial(self._closed, session_id))

    def _closed(self, session_id: str, _: Future) -> None:
        log.info("session_close session=%s open=%d", short_id(session_id), len(self._desk.table))
        for entry in self._closing.pop(session_id):
            tell_closed(entry, session_id)

    def _engine_lost(self, item: EngineLost) -> None:
        desk = self._desk
        desk.engine, desk.retry_after_s = None, item.retry_after_s
        desk.engine_restarts_total += 1
        self._memory = Memory()
        for session in desk.table:
            session.in_engine = False
        self._opens.engine_lost()
        self._turns.engine_lost()
        for session_id in list(self._closing):
            self._freed(session_id)

    def _engine_up(self, item: EngineUp) -> None:
        self._desk.engine = item.door
        log.info("engine_up sessions=%d", len(self._desk.table))

    # --- replies ---

    def _safe_reply(self, entry: PendingRequest) -> Reply | None:
        try:
            return self._reply(entry)
        except Exception as error:
            self._entries.pop(entry.row.request_id, None)
            body = json.dumps(as_refusal(error).body())
            return Reply(body + "\n", more=False) if entry.head_sent else Reply(body, status=500)

    def _reply(self, entry: PendingRequest) -> Reply | None:
        """What the row is told in this step."""
        text = "".join(entry.lines)
        entry.lines.clear()
        if entry.final is None:
            entry.steps += 1
            if not text and not entry.head_sent:
                return None
            # An empty chunk is how TorchServe notices that a streaming client has left.
            entry.head_sent = True
            return Reply(text, more=True, content_type=STREAM_TYPE)
        del self._entries[entry.row.request_id]
        final = entry.final
        final.body = text + final.body
        if final.more is False and not entry.head_sent:
            final.more = None  # a last chunk that is also the first sends no head at all: make it a whole answer
        own, alone = self._is_foreign(entry), not self._is_shared(entry)
        self._sequences.release(entry.row, entry.steps, final, own, alone)
        return final

    def _is_foreign(self, entry: PendingRequest) -> bool:
        """Whether the row came on a sequence that is no open session's, and can be ended."""
        sequence = entry.row.sequence_id
        # A ';' would name two sequences to the frontend, the second perhaps somebody else's.
        return bool(sequence) and not (sequence in self._desk.table or sequence == NEW_SESSION or ";" in sequence)

    def _is_shared(self, entry: PendingRequest) -> bool:
        """Whether another row of the same sequence is waiting."""
        others = (other.row.sequence_id for other in self._entries.values() if other is not entry)
        return entry.row.sequence_id in others

    def _end_sequence_of(self, entry: PendingRequest) -> None:
        """Have the sequence of a row that will get no reply ended."""
        if self._is_foreign(entry):
            self._sequences.end(entry.row.sequence_id)
