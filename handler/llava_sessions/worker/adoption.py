"""Sessions of other instances: claimed from the shared journal when a request names one of them.

All methods run on the pump's thread, under its lock. The journal is read on threads of the preparer.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from ..chat.transcript import Transcript, short_id
from ..errors import Refused
from ..journal.journal import AlreadyClaimed, NotFound
from ..protocol.openai import Chat, Models
from ..protocol.parsing import Request
from ..protocol.requests import Ask, Cancel, Close, Open
from .context import WorkerContext
from .openings import SESSION_ID, digest_of
from .pending import PendingRequest, session_moved
from .sessions import Session

log = logging.getLogger(__name__)

# An ID that the journal does not have is not looked up again for so long.
MISS_S = 2.0
_MISSES_KEPT = 10_000
# Look-ups of one worker: on average, at once after a pause, and side by side.
LOOKUPS_PER_S = 50.0
LOOKUPS_BURST = 100
LOOKUPS_AT_ONCE = 32
_RETRY_AFTER_S = 1

Handle = Callable[[PendingRequest, Request], None]


class TokenBucket:
    """Allows `per_s` events a second on average, and `burst` after a pause. Times are arguments, in seconds."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._tokens = float(burst)
        self._at_s = 0.0

    def take(self, now_s: float) -> bool:
        """Return whether one more event is allowed now."""
        gained = max(now_s - self._at_s, 0.0) * self._per_s
        self._tokens = min(self._tokens + gained, self._burst)
        self._at_s = now_s
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(eq=False)
class _Claim:
    """A look-up that runs, and the requests that wait for it, in order of arrival.

    `session`: the place that is reserved. None: no place is free, so the session is looked up and not claimed.
    """

    session_id: str
    token_digest: str | None
    session: Session | None = None
    waiting: list[tuple[PendingRequest, Request]] = field(default_factory=list)


class Adoption:
    """Claims the sessions that requests name and this instance does not know. Off without a journal."""

    def __init__(self, context: WorkerContext, handle: Handle) -> None:
        """`handle` starts a request once its session is here, or raises `Refused`."""
        self._context = context
        self._handle = handle
        self._claims: dict[str, _Claim] = {}
        # By session ID and digest of the token: the time of the miss, by the pump's clock; oldest first.
        self._misses: OrderedDict[tuple[str, str | None], float] = OrderedDict()
        self._lookups = TokenBucket(LOOKUPS_PER_S, LOOKUPS_BURST)

    def start(self, pending: PendingRequest, request: Request) -> bool:
        """Let a request wait for its session, which is not open here, if the journal may have it. Raise `Refused`.

        False: the session is unknown.
        """
        session_id = request.resume if isinstance(request, Open) else _session_of(request)
        if session_id is None or not self._context.adopts or not SESSION_ID.fullmatch(session_id):
            return False
        running = self._claims.get(session_id)
        if running is not None:
            running.waiting.append((pending, request))
            return True
        token_digest = _token_digest(request)
        if isinstance(request, Open) or not self._may_look_up(session_id, token_digest):
            return False
        self._context.engines.check()
        self._check_limits()
        self._look_up(_Claim(session_id, token_digest, waiting=[(pending, request)]))
        return True

    def _may_look_up(self, session_id: str, token_digest: str | None) -> bool:
        table = self._context.table
        if table.find(session_id) is not None or table.was_closed(session_id, token_digest):
            return False
        missed_s = self._misses.get((session_id, token_digest))
        return missed_s is None or self._context.monotonic() - missed_s >= MISS_S

    def _check_limits(self) -> None:
        """Raise `Refused` if too many sessions are looked up."""
        if len(self._claims) >= LOOKUPS_AT_ONCE or not self._lookups.take(self._context.monotonic()):
            message = "Too many sessions are being looked up in the journal; send the request again."
            raise Refused("journal_unavailable", message, _RETRY_AFTER_S)

    def _look_up(self, claim: _Claim) -> None:
        """Reserve a place and claim the session. Without a place, only look for it."""
        context = self._context
        self._claims[claim.session_id] = claim
        try:
            claim.session = context.table.reserve(claim.session_id)
        except Refused as full:
            found = context.preparer.verify(claim.session_id, claim.token_digest)
            context.inbox.when_done(found, partial(self._verified, claim, full))
            return
        claimed = context.preparer.adopt(claim.session_id, claim.token_digest)
        context.inbox.when_done(claimed, partial(self._claimed, claim, claim.session))

    def _verified(self, claim: _Claim, full: Refused, found: Future[None]) -> None:
        """Reject the requests of a session for which no place is free."""
        self._refuse(claim, found.exception() or full)

    def _claimed(self, claim: _Claim, session: Session, claimed: Future[Transcript]) -> None:
        """Open a session that the journal has given, and start its requests, or reject them."""
        context = self._context
        try:
            transcript = claimed.result()
        except Exception as error:
            context.table.end(session, None)  # a client that left has started a sequence
            self._refuse(claim, error)
            return
        session.restore(transcript, context.clock())
        log.info("session_adopted session=%s turns=%d", short_id(session.id), len(transcript.turns))
        del self._claims[claim.session_id]
        self._start_again(claim.waiting)

    def _refuse(self, claim: _Claim, error: BaseException) -> None:
        """Reject the requests of a claim that failed. Those with another token are looked up by themselves."""
        del self._claims[claim.session_id]
        if isinstance(error, NotFound):
            self._remember_miss((claim.session_id, claim.token_digest))
        elif isinstance(error, AlreadyClaimed):
            error = session_moved()
        others = []
        for pending, request in claim.waiting:
            if _token_digest(request) != claim.token_digest:
                others.append((pending, request))
            elif not pending.disconnected:
                pending.refuse(error if isinstance(error, Exception) else RuntimeError("the look-up was cancelled"))
        self._start_again(others)

    def _start_again(self, requests: list[tuple[PendingRequest, Request]]) -> None:
        for pending, request in requests:
            if pending.disconnected:
                continue
            try:
                self._handle(pending, request)
            except Exception as error:
                pending.refuse(error)

    def _remember_miss(self, key: tuple[str, str | None]) -> None:
        self._misses.pop(key, None)
        self._misses[key] = self._context.monotonic()
        while len(self._misses) > _MISSES_KEPT:
            self._misses.popitem(last=False)


def _session_of(request: Request) -> str | None:
    """Return the ID of the session that a request names."""
    return request.session_id if isinstance(request, Ask | Chat | Close | Cancel) else None


def _token_digest(request: Request) -> str | None:
    return None if isinstance(request, Models) else digest_of(request.session_token)
