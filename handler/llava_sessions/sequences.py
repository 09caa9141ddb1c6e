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

import math
import time
from collections.abc import Iterable

from . import protocol
from .rows import Entry, Reply, Row, SequenceEnd

# So long after a step the frontend has surely done with it, also on a busy machine; what comes later came after it.
QUIET_S = 0.25
# So long has nobody used what our own request ends. One of a client's that comes while it is under way is lost.
LINGER_S = 1.5
# The same header to a client, and another one to the frontend, which tells cases apart.
_TOLD_HEADER = protocol.CLOSED_SESSION_HEADER.lower()


class Sequences:
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

    def release(self, entry: Entry, final: Reply, own: bool, alone: bool) -> None:
        """Have what the row's last reply, `final`, ends be ended: the session that it names as closed, if any, and with
        `own` the row's own sequence. `alone`: no other row of that is waiting.
        """
        closed = final.headers.pop(protocol.CLOSED_SESSION_HEADER, None)
        sequence = entry.row.sequence_id
        ends = {closed, sequence if own else None} - {None}
        nobody_asks_again = entry.row.fresh or self.is_ours(entry.row)
        crowded = len(self._ending) + self._ender.pending >= self._linger
        at_once = nobody_asks_again or crowded or not self._ender.able
        if at_once and ends == {sequence} and alone and entry.steps == 0 and self._is_quiet(sequence):
            final.headers[protocol.CLOSED_SESSION_HEADER] = sequence
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
