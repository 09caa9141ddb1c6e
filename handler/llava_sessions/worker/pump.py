"""Exchange of rows and replies with TorchServe's batches, and detection of disconnected clients.

A held row gets no reply in a step. TorchServe keeps its request open and sends the row again in the next step, so the
HTTP status stays undecided until the first output. TorchServe delivers the whole body of a held row in every step.
While large bodies are held, a step lasts as long as its delivery took (docs/decisions/0005-held-rows.md).
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from ..chat.transcript import short_id
from ..errors import Refused
from ..metrics import MetricValues
from ..protocol.constants import NEW_SESSION
from ..torchserve.batch import Reply, Row
from ..torchserve.sequences import SequenceReaper
from .arrivals import Arrivals
from .closes import acknowledge_close
from .inbox import Inbox
from .manager import SessionManager
from .pending import PendingRequest, PendingTable, refusal_of

log = logging.getLogger(__name__)

# How long a step waits for output while nothing happens, as during an encode. A new row is seen between two steps, so
# this bounds its delay. Output ends the wait.
WAIT_S = 0.1
# The same if the engine reports something that is no output, such as a token of an answer that is not streamed.
ACTIVE_WAIT_S = 0.02
# How long a step waits for the engine to free a session, so that a close is answered in the step of its arrival.
CLOSE_WAIT_S = 2.0
# A step with held large rows lasts at most this long. It must be far below `responseTimeout` in model-config.yaml.
LONGEST_PAUSE_S = 10.0
# TorchServe calls without a pause while rows are active. After this much silence the clients count as disconnected.
SILENCE_S = 5.0
# The same while bodies of this size are held or have just arrived: the next batch may take TorchServe so long.
LARGE_SILENCE_S = 60.0
LARGE_SILENCE_BYTES = 2**20
# TorchServe delivers a batch with at least so many bytes of large bodies per second, also on a busy machine.
SLOWEST_DELIVERY_BYTES_PER_S = 10_000_000
# Sweeps in which the silence must be seen. They only happen while this process runs, so its own pauses do not count.
SILENT_SWEEPS = 4


class Pump:
    """Answers rows. One lock guards everything below: TorchServe's thread and the sweeper's thread take turns."""

    def __init__(
        self,
        manager: SessionManager,
        inbox: Inbox,
        reaper: SequenceReaper,
        arrivals: Arrivals,
        wait_s: float = WAIT_S,
        close_wait_s: float = CLOSE_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: seconds, for the waits and for silence."""
        self._manager = manager
        self._inbox = inbox
        self._reaper = reaper
        self._arrivals = arrivals
        self._wait_s = wait_s
        self._close_wait_s = close_wait_s
        self._clock = clock
        self._lock = threading.Lock()
        self._pending = PendingTable()
        self._last_exchange_s = clock()
        self._silent_sweeps = 0
        self._large_until_s = self._last_exchange_s

    def recover(self) -> None:
        """Add the sessions that the journal holds. Call it once, before the first row. Blocks."""
        self._manager.recover()

    def exchange(self, rows: list[Row]) -> list[Reply | None]:
        """Run one step. `rows` are all active requests. Return a reply for each, or None for a held row.

        Never raises: an error in one row becomes its reply.
        """
        with self._lock:
            delivery_s = self._clock() - self._last_exchange_s
            self._reaper.begin_step(row.sequence_id for row in rows)
            self._take_events()  # before new rows, which may depend on the loss or the start of an engine
            for row in rows:
                if row.request_id not in self._pending:
                    self._admit(row)
            self._drop_disconnected({row.request_id for row in rows})
            self._manager.end_overdue()
            self._wait_for_output(delivery_s)
            self._end_sequences()
            replies = [self._safe_reply(self._pending[row.request_id]) for row in rows]
            self._last_exchange_s = self._clock()
            self._silent_sweeps = 0
            self._reaper.end_step()
            return replies

    def sweep(self, is_receiving: bool = False) -> None:
        """Expire sessions, and detect clients that left while TorchServe was silent. Call it about once a second.

        `is_receiving`: a batch is on its way, so TorchServe is not silent.
        """
        with self._lock:
            self._take_events()
            self._silent_sweeps = 0 if is_receiving else self._silent_sweeps + 1
            silent_s = self._clock() - self._last_exchange_s
            is_large = self._pending.held_bytes > LARGE_SILENCE_BYTES or self._clock() < self._large_until_s
            limit_s = LARGE_SILENCE_S if is_large else SILENCE_S
            if self._pending and silent_s > limit_s and self._silent_sweeps >= SILENT_SWEEPS:
                self._drop_disconnected(set())
            self._manager.sweep()
            self._end_sequences()
            self._reaper.sweep(self._pending.sequence_ids)

    def drain(self) -> None:
        """Take no new work from now on; running turns may finish. Takes no lock, so a signal handler may call it."""
        self._manager.drain()

    @property
    def drained(self) -> bool:
        """Whether a drain was asked for, every request is answered, and everything is stored."""
        return not self._pending and self._manager.drained

    @property
    def busy(self) -> bool:
        """Whether any request waits for its last reply."""
        return bool(self._pending)

    def metric_values(self) -> MetricValues:
        """Return all gauges and counters as of now."""
        with self._lock:
            return self._manager.metric_values()

    def _admit(self, row: Row) -> None:
        """Parse a new row and start its work, or reject it. A large row is parsed meanwhile, and starts later."""
        pending, has_returned = self._pending.add(row)
        pending.arrived_s = self._clock()
        if pending.body_bytes > LARGE_SILENCE_BYTES:
            self._large_until_s = pending.arrived_s + LARGE_SILENCE_S
        try:
            if pending.final is not None:
                return  # the answer was known before the pause
            if has_returned:
                message = "The server was paused and has dropped the request; send it again."
                raise Refused("request_dropped", message, retry_after_s=1)
            if self._reaper.is_ours(row):
                if self._manager.has_session(row.sequence_id):
                    pending.reply({"success": False})  # its session was adopted meanwhile
                else:
                    acknowledge_close(pending, row.sequence_id)  # it only ends its sequence
                return
            self._arrivals.add(pending, row.body)
        except Exception as error:
            pending.refuse(error)
        self._arrivals.start_ready(self._manager.handle)

    def _drop_disconnected(self, active: set[str]) -> None:
        """Stop the work of the requests that TorchServe does not list any more."""
        for pending in self._pending.drop_missing(active):
            self._manager.disconnected(pending)
            self._arrivals.disconnected(pending)
            if _may_end(pending.row, self._manager):
                self._reaper.end(pending.row.sequence_id, fresh=pending.row.fresh)

    def _end_sequences(self) -> None:
        for session_id in self._manager.take_ended_sequences():
            self._reaper.end(session_id)
        self._reaper.keep(self._manager.has_session)

    # --- Events ---

    def _wait_for_output(self, delivery_s: float) -> None:
        """Take events until a request has output. Wait longer while a session is being freed for a close.

        `delivery_s`: time since the previous step, in which TorchServe delivered this one. While large rows are held,
        wait for as long even if there is output.
        """
        self._take_events()
        began_s = self._clock()
        longest_s = self._wait_s
        while True:
            pause_s = min(delivery_s, self._pending.held_bytes / SLOWEST_DELIVERY_BYTES_PER_S, LONGEST_PAUSE_S)
            has_output = self._pending.has_output
            if self._manager.waits_for_close(has_output):
                wait_s = self._close_wait_s
            elif has_output:
                wait_s = pause_s
            else:
                wait_s = max(pause_s, longest_s)
            left_s = began_s + wait_s - self._clock()
            if left_s <= 0:
                return
            try:
                self._take_events(self._inbox.get(left_s))
                longest_s = min(longest_s, ACTIVE_WAIT_S)
            except queue.Empty:
                return

    def _take_events(self, item: Any = None) -> None:
        """Apply an item of the inbox and all that follow, then start the requests that are parsed."""
        while True:
            if item is not None:
                self._manager.on_event(item)
            try:
                item = self._inbox.get()
            except queue.Empty:
                break
        self._arrivals.start_ready(self._manager.handle)

    # --- Replies ---

    def _safe_reply(self, pending: PendingRequest) -> Reply | None:
        try:
            return self._reply(pending)
        except Exception as error:
            self._pending.remove(pending)
            refused = refusal_of(error)
            if pending.head_sent:
                return Reply(pending.form.error_chunk(refused, pending.streamed), more=False)
            return Reply(json.dumps(pending.form.error(refused)), status=500)

    def _reply(self, pending: PendingRequest) -> Reply | None:
        """Return the request's reply in this step."""
        if pending.final is None:
            pending.steps += 1
            text = pending.take_chunk()
            if not text and not pending.head_sent and not pending.must_begin:
                return None
            # TorchServe notices a disconnected client of chunks only when it sends, so an empty chunk is sent too.
            pending.head_sent = True
            return Reply(text, more=True, content_type=pending.content_type)
        final = pending.take_final()
        self._pending.remove(pending)
        if pending.refusal is not None:
            self._manager.count_refusal(pending.refusal.code)
            log.info("refused request=%s code=%s", short_id(pending.row.request_id), pending.refusal.code)
        # A last chunk that is also the first one sends no head: it must be a whole reply.
        final.more = False if pending.head_sent else None
        alone = pending.row.sequence_id not in self._pending.sequence_ids
        own = _may_end(pending.row, self._manager)
        will_return = pending.refusal is not None and pending.refusal.retry_after_s is not None
        self._reaper.release(pending.row, pending.steps, final, own=own, alone=alone, will_return=will_return)
        return final


def _may_end(row: Row, manager: SessionManager) -> bool:
    """Return whether the row's sequence belongs to no session, so that it can be ended."""
    sequence = row.sequence_id
    # The frontend reads an ID with a ';' as two sequences, of which the second may belong to another session.
    if not sequence or sequence == NEW_SESSION or ";" in sequence:
        return False
    return not manager.has_session(sequence)
