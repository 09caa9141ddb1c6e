"""Owns when TorchServe's sequences are ended, so that none of its places and threads stays taken.

TorchServe keeps a place for each id that it ever saw; when all are taken nobody can open a session. It has a few more
threads than places, and one of them waits for each sequence's next request: from the end of the first step that had a
row of it, and anew after each further one. Its end header, in a response, frees the place at once, but not a thread
that waits: that one is lost until `sequenceTimeoutMSec`, and when all are lost the server answers nothing
(SequenceBatching.java, pollJobFromJobGroup). So the header may only go where no thread waits: out in the very step in
which a row came, where the steps just before had none of its sequence.

What it ends it ends with all that is queued there, which then is never answered; and it is heeded only when the answer
is out already (SequenceContinuousBatching.java, sendResponse): a client that asks again at once loses that request, one
time in some hundreds. So it goes into the answer to a request of our own, which is sent when the client has long been
silent and takes the thread that waits. It goes into the client's own answer where no client knows the id (the frontend
made it for a request that is refused), and where very many shall end, to keep places for others.

Must not know what rows ask for, nor how requests of our own are made. Not thread-safe; the pump holds a lock.
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
from collections.abc import Iterable
from typing import Protocol
from urllib.parse import urlsplit

from ..protocol.constants import CLOSED_SESSION_HEADER, JSON_TYPE, SESSION_HEADER
from .batch import Reply, Row

log = logging.getLogger(__name__)

# So long after a step the frontend has surely done with it, also on a busy machine; what comes later came after it.
QUIET_S = 0.25
# So long has nobody used what our own request ends. One of a client's that comes while it is under way is lost.
LINGER_S = 1.5
# The same header to a client, and another one to the frontend, which tells cases apart.
_TOLD_HEADER = CLOSED_SESSION_HEADER.lower()


class SequenceReaper:
    """The sequences that shall end, and when the latest steps had rows of which."""

    def __init__(self, ender: SequenceEnd, linger: int) -> None:
        """`linger`: so many may wait for their end, each with a place of the frontend's."""
        self._ender = ender
        self._linger = linger
        self._ending: dict[str, None] = {}  # in the order in which they shall
        self._now: set[str] = set()
        self._used_s: dict[str, float] = {}  # when a step before this one last had a row of it; oldest first

    def is_ours(self, row: Row) -> bool:
        """Whether the request does nothing but end its sequence."""
        name, value = self._ender.mark
        return row.headers.get(name) == value

    def end(self, sequence_id: str) -> None:
        """Have a sequence ended soon, once no row uses it."""
        self._ending[sequence_id] = None

    def begin_step(self, sequence_ids: Iterable[str]) -> None:
        """A step begins whose rows are of these sequences."""
        self._forget_old()
        self._now = set(sequence_ids)

    def end_step(self) -> None:
        """The step is over."""
        for sequence in self._now:
            self._used_s.pop(sequence, None)
            self._used_s[sequence] = time.monotonic()
        self._now = set()
        self.sweep(())

    def sweep(self, waiting: Iterable[str]) -> None:
        """Have ended what nobody has used for a while; rows of the sequences in `waiting` come again."""
        self._forget_old()
        in_use = {*self._used_s, *waiting}
        for sequence in [one for one in self._ending if one not in in_use]:
            del self._ending[sequence]
            self._ender.end(sequence)

    def release(self, row: Row, steps: int, final: Reply, own: bool, alone: bool) -> None:
        """Have what the row's last reply, `final`, ends be ended: the session that it names as closed, if any, and with
        `own` the row's own sequence. `alone`: no other row of that is waiting.
        """
        closed = final.headers.pop(CLOSED_SESSION_HEADER, None)
        sequence = row.sequence_id
        ends = {closed, sequence if own else None} - {None}
        nobody_asks_again = row.fresh or self.is_ours(row)
        crowded = len(self._ending) + self._ender.pending >= self._linger
        at_once = nobody_asks_again or crowded or not self._ender.able
        if at_once and ends == {sequence} and alone and steps == 0 and self._is_quiet(sequence):
            final.headers[CLOSED_SESSION_HEADER] = sequence
            self._ending.pop(sequence, None)
            return
        if closed is not None:
            final.headers[_TOLD_HEADER] = closed
        for ended in sorted(ends):
            self.end(ended)

    def _is_quiet(self, sequence: str) -> bool:
        return time.monotonic() - self._used_s.get(sequence, -math.inf) >= QUIET_S

    def _forget_old(self) -> None:
        old_since_s = time.monotonic() - LINGER_S
        while self._used_s and (oldest := next(iter(self._used_s.items())))[1] <= old_since_s:
            del self._used_s[oldest[0]]


class SequenceEnd(Protocol):
    """Has the frontend end a sequence, by a request with the header `mark` (its name in lower case, and its value).

    `able`: whether the frontend takes such requests; `pending`: sequences that it has still to end.
    """

    mark: tuple[str, str]
    able: bool
    pending: int

    def end(self, sequence_id: str) -> None:
        """Have the sequence ended soon."""


END_HEADER = "x-llava-end-sequence"

# One request waits for a step of the handler; several share it.
_THREADS = 4

# A machine that is busy enough answers none in time, and what is not ended keeps its place.
_TRIES = 3


class EndRequestSender:
    """Ends sequences of the frontend by requests to it, from a few threads of its own.

    Without it the frontend forgets them too, but only after `sequenceTimeoutMSec`. `mark` is the header that tells the
    pump that such a request is ours; `able`, whether such requests are answered, as far as is known: with TLS or token
    authorisation they are not. `pending` are the sequences that have still to be ended.
    """

    def __init__(self, inference_address: str, model: str) -> None:
        """`inference_address` as in the frontend's properties, such as `http://0.0.0.0:8080`."""
        address = urlsplit(inference_address)
        # The worker runs on the frontend's host; an address that means "all" is reached by loopback.
        self._host = "127.0.0.1" if address.hostname in (None, "0.0.0.0", "::") else address.hostname
        self._port = address.port or 80
        self._plain = self.able = address.scheme == "http"
        self._path = f"/predictions/{model}"
        self.mark = (END_HEADER, secrets.token_hex(16))
        self._queue: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self.pending = 0
        self._lock = threading.Lock()
        for _ in range(_THREADS):
            threading.Thread(target=self._run, name="sequences", daemon=True).start()

    def end(self, sequence_id: str) -> None:
        """Have the sequence ended soon."""
        with self._lock:
            self.pending += 1
        self._queue.put((sequence_id, _TRIES))

    def _run(self) -> None:
        while True:
            sequence_id, tries = self._queue.get()
            try:
                status = self._post(sequence_id) if self._plain else 0
                problem = None if status == http.client.OK else f"status {status}"
            except (OSError, http.client.HTTPException) as error:
                problem = type(error).__name__
            if problem and tries > 1:
                self._queue.put((sequence_id, tries - 1))
                continue
            with self._lock:
                self.pending -= 1
            self.able = not problem
            if problem:
                log.warning("sequence_not_ended reason=%s", problem)

    def _post(self, sequence_id: str) -> int:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=10)
        headers = {SESSION_HEADER: sequence_id.encode(), "Content-Type": JSON_TYPE, **dict([self.mark])}
        try:
            connection.request("POST", self._path, json.dumps({"type": "close_session"}), headers)
            return connection.getresponse().status
        finally:
            connection.close()
