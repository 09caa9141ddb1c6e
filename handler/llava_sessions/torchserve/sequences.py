"""End TorchServe's sequences, so that none of its places and threads stays occupied.

Facts of TorchServe 0.12:

- The frontend keeps a place for each sequence ID that it has ever received. If all places are occupied, no session can
  be opened.
- The frontend has a few more threads than places. One thread waits for the next request of each sequence: from the end
  of the first step that had a row of the sequence, and again after each further step with one.
- The end header in a response frees the place at once, but not a thread that waits. That thread is lost until
  `sequenceTimeoutMSec`. If all threads are lost, the server answers no request (SequenceBatching.java,
  pollJobFromJobGroup).
- The end header drops every request that is queued in the sequence; such a request is never answered.
- The frontend acts on the end header only after it has sent the response (SequenceContinuousBatching.java,
  sendResponse). A client that immediately reuses the sequence loses that request, about once in some hundred times.

Rules that follow from them:

- The end header is sent only when no thread waits: in the very step in which a row arrived, if the steps shortly before
  had no row of its sequence.
- By default the end header is in the reply to an end request. The worker sends that request to the frontend once the
  client has been silent for a while; the request also takes the waiting thread.
- A sequence that the frontend made for one request is ended sooner: no client knows its ID, so that no request of a
  client meets the end request.
- The end header is in the client's own reply if no client knows the ID (the frontend made it for a request that is
  rejected), or if so many sequences wait for their end that places for others would be short.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol
from urllib.parse import urlsplit

from ..protocol.constants import CLOSED_SESSION_HEADER, JSON_TYPE, SESSION_HEADER
from .batch import Reply, Row

log = logging.getLogger(__name__)

# The frontend has finished with a step after this time, also on a busy machine. A later row arrived after the step.
QUIET_S = 0.25
# An end request is sent after the sequence has been idle for this time. A client's request that meets it is lost.
LINGER_S = 1.5
# The same after a reply with Retry-After: the client comes back with the same ID, and its session may be adopted then.
RETURN_S = 15.0
# The frontend compares header names with case, clients do not. Only the exact spelling ends a sequence.
_CLOSED_HEADER_FOR_CLIENTS = CLOSED_SESSION_HEADER.lower()
_END_REQUEST_HEADER = "x-llava-end-sequence"
# One end request waits for a step of the handler, and several share a step. Each request without a session needs one if
# its answer takes more than a step.
_SENDER_THREADS = 16
# Attempts for each sequence: a busy machine misses a timeout, and a sequence that is not ended keeps its place.
_SENDER_ATTEMPTS = 3
_SENDER_TIMEOUT_S = 10.0


class SequenceEnder(Protocol):
    """Ends a sequence by a request to the frontend that has the header `mark` (lower-case name, value).

    `able`: whether the frontend accepts such requests. `pending`: number of sequences that are still to be ended.
    """

    mark: tuple[str, str]
    able: bool
    pending: int

    def end(self, sequence_id: str) -> None:
        """Queue the sequence for its end request. Return at once."""


class SequenceReaper:
    """Decides when a sequence is ended, and in which reply. Not thread-safe: the pump holds a lock."""

    def __init__(
        self,
        ender: SequenceEnder,
        max_waiting: int,
        *,
        quiet_s: float | None = None,
        linger_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a reaper that lets at most `max_waiting` sequences wait for their end; each occupies a place.

        `quiet_s` and `linger_s` default to `QUIET_S` and `LINGER_S`, `clock` returns seconds.
        """
        self._ender = ender
        self._max_waiting = max_waiting
        self._quiet_s = QUIET_S if quiet_s is None else quiet_s
        self._linger_s = LINGER_S if linger_s is None else linger_s
        self._clock = clock
        self._waiting: dict[str, float] = {}  # sequences to end, in this order, and the earliest time of each
        self._fresh: set[str] = set()  # those of them that no client knows
        self._in_step: set[str] = set()  # sequences with a row in the current step
        self._last_used_s: dict[str, float] = {}  # end of the latest earlier step with a row of it; oldest first

    def is_ours(self, row: Row) -> bool:
        """Return whether the row is an end request of this worker."""
        name, value = self._ender.mark
        return row.headers.get(name) == value

    def end(self, sequence_id: str, fresh: bool = False, after_s: float = 0.0) -> None:
        """End the sequence once no row uses it, and not before `after_s` seconds from now.

        `fresh`: the frontend made its ID, which no client knows.
        """
        self._waiting[sequence_id] = self._clock() + after_s
        if fresh:
            self._fresh.add(sequence_id)

    def keep(self, is_session: Callable[[str], bool]) -> None:
        """Don't end a sequence whose session has been adopted since."""
        for sequence in [one for one in self._waiting if is_session(one)]:
            del self._waiting[sequence]
            self._fresh.discard(sequence)

    def begin_step(self, sequence_ids: Iterable[str]) -> None:
        """Begin a step whose rows belong to these sequences."""
        self._forget_idle()
        self._in_step = set(sequence_ids)

    def end_step(self) -> None:
        """End the step, and send end requests for sequences that have become idle."""
        for sequence in self._in_step:
            self._last_used_s.pop(sequence, None)  # the new entry is the last one again
            self._last_used_s[sequence] = self._clock()
        self._in_step = set()
        self.sweep(())

    def sweep(self, pending: Iterable[str]) -> None:
        """Send end requests for sequences that have been idle for `linger_s`, or `quiet_s` if no client knows them.

        `pending` are the sequences of rows that have no final reply yet: they take part in further steps.
        """
        self._forget_idle()
        recent = {one for one in self._last_used_s if one not in self._fresh or not self._is_quiet(one)}
        in_use = {*recent, *pending}
        now_s = self._clock()
        for sequence in [one for one, from_s in self._waiting.items() if one not in in_use and now_s >= from_s]:
            del self._waiting[sequence]
            self._fresh.discard(sequence)
            self._ender.end(sequence)

    def release(self, row: Row, steps: int, final: Reply, own: bool, alone: bool, *, will_return: bool = False) -> None:
        """End the sequences that the row's last reply closes: now by the header in `final`, or later.

        The reply closes the session in its end header, if any, and with `own` the row's own sequence. `steps` is the
        number of earlier steps that had the row. `alone`: no other row of the sequence is pending. `will_return`: the
        client was asked to send the request again. If the sequence is ended later, the client receives the end header
        in lower case, which the frontend ignores.
        """
        sequence = row.sequence_id
        closed = final.headers.pop(CLOSED_SESSION_HEADER, None)
        ended = {sequence} if own else set()
        if closed is not None:
            ended.add(closed)
        may_end_now = ended == {sequence} and alone and steps == 0 and self._is_quiet(sequence)
        if may_end_now and self._prefers_now(row):
            final.headers[CLOSED_SESSION_HEADER] = sequence
            self._waiting.pop(sequence, None)
            self._fresh.discard(sequence)
            return
        if closed is not None:
            final.headers[_CLOSED_HEADER_FOR_CLIENTS] = closed
        will_return = will_return and not row.fresh
        for sequence_id in sorted(ended):
            after_s = RETURN_S if will_return else 0.0
            self.end(sequence_id, fresh=row.fresh and sequence_id == sequence, after_s=after_s)

    def _prefers_now(self, row: Row) -> bool:
        never_reused = row.fresh or self.is_ours(row)
        crowded = len(self._waiting) + self._ender.pending >= self._max_waiting
        return never_reused or crowded or not self._ender.able

    def _is_quiet(self, sequence_id: str) -> bool:
        return self._clock() - self._last_used_s.get(sequence_id, -math.inf) >= self._quiet_s

    def _forget_idle(self) -> None:
        idle_since_s = self._clock() - self._linger_s
        while self._last_used_s:
            sequence_id, used_s = next(iter(self._last_used_s.items()))
            if used_s > idle_since_s:
                return
            del self._last_used_s[sequence_id]


class EndRequestSender:
    """A `SequenceEnder` that sends end requests to the frontend from a few threads of its own. Thread-safe.

    A sequence that is not ended is forgotten by the frontend only after `sequenceTimeoutMSec`. `able` is false if the
    frontend has TLS. It is also false after an end request failed, until the next one succeeds. With token
    authorisation every end request fails.
    """

    def __init__(self, inference_address: str, model: str) -> None:
        """Start the threads. `inference_address` is as in the frontend's properties, such as `http://0.0.0.0:8080`."""
        address = urlsplit(inference_address)
        # The worker runs on the frontend's host. A wildcard address is reached by loopback.
        wildcard = address.hostname in (None, "0.0.0.0", "::")
        self._host = "127.0.0.1" if wildcard else str(address.hostname)
        self._port = address.port or 80
        self._path = f"/predictions/{model}"
        self._is_plain_http = address.scheme == "http"
        self.able = self._is_plain_http
        self.mark = (_END_REQUEST_HEADER, secrets.token_hex(16))
        self.pending = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()  # sequence ID, attempts left
        for _ in range(_SENDER_THREADS):
            threading.Thread(target=self._run, name="sequences", daemon=True).start()

    def end(self, sequence_id: str) -> None:
        """Queue the sequence for its end request. Return at once."""
        with self._lock:
            self.pending += 1
        self._queue.put((sequence_id, _SENDER_ATTEMPTS))

    def _run(self) -> None:
        while True:
            sequence_id, attempts = self._queue.get()
            problem = self._send(sequence_id)
            if problem and attempts > 1:
                self._queue.put((sequence_id, attempts - 1))
                continue
            with self._lock:
                self.pending -= 1
            self.able = problem is None
            if problem:
                log.warning("sequence_not_ended reason=%s", problem)

    def _send(self, sequence_id: str) -> str | None:
        """Send one end request. Return None, or the reason why it failed."""
        if not self._is_plain_http:
            return "tls"
        try:
            status = self._post(sequence_id)
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__
        return None if status == http.client.OK else f"status {status}"

    def _post(self, sequence_id: str) -> int:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_SENDER_TIMEOUT_S)
        name, value = self.mark
        headers: dict[str, str | bytes] = {
            SESSION_HEADER: sequence_id.encode(),  # http.client encodes a string in Latin-1
            "Content-Type": JSON_TYPE,
            name: value,
        }
        try:
            connection.request("POST", self._path, json.dumps({"type": "close_session"}), headers)
            return connection.getresponse().status
        finally:
            connection.close()
