"""Owns the session table: who is open, who is busy, when each expires, and which ids are remembered as gone.

Must not know torch, TorchServe, payloads or tokens: what a session says is in its `conversation`, held here as an
opaque value. Not thread-safe; its one user, the pump, holds a lock. Pure: time comes in as an argument (seconds since
the epoch).
"""

from __future__ import annotations

import hmac
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from ..errors import Refused

Conversation = TypeVar("Conversation")

_REMEMBERED = 10_000
_ANSWERS_KEPT = 8


# A request that was sent before the announced expiry is on its way for a while: so long is its session kept.
GRACE_S = 2.0


@dataclass
class Session(Generic[Conversation]):
    """One open chat. `turn_id` is the request id of the running turn; `expires_at_s` is absolute, `used_at_s` the end
    of its latest turn.

    `conversation` is None while only the journal knows it; `story`, its journal, is opaque here. `in_engine`: whether
    the engine holds it; `losses` are engines that died while it was answering, since its last answer. `answers` are the
    latest finished ones, by what a repeated request is known by: it is told again.
    """

    id: str
    conversation: Conversation | None
    expires_at_s: float
    used_at_s: float
    idle_s: float
    token_digest: str | None = None
    turn_id: str | None = None
    closing: bool = False
    story: Any = None
    in_engine: bool = False
    losses: int = 0
    answers: OrderedDict[str, Any] = field(default_factory=OrderedDict)

    def is_over(self, now_s: float) -> bool:
        """Whether its time is up, absolutely or since its last turn."""
        return now_s >= min(self.expires_at_s, self.used_at_s + self.idle_s)

    def keep_answer(self, retry_key: str, answer: Any) -> None:
        """Remember an answer for a retry of its request; the oldest make room."""
        self.answers[retry_key] = answer
        while len(self.answers) > _ANSWERS_KEPT:
            self.answers.popitem(last=False)

    @property
    def expires(self) -> str:
        """Expiry as SageMaker's header spells it, UTC."""
        return datetime.fromtimestamp(self.expires_at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class SessionTable(Generic[Conversation]):
    """The open sessions of one worker, at most `max_sessions`, each for `ttl_s` seconds from its open, or until nothing
    was asked for `idle_s` (None: never sooner).

    Places are reserved before a picture is prepared, so that a full table refuses an open before any work is done.
    """

    def __init__(self, max_sessions: int, ttl_s: float, idle_s: float | None = None) -> None:
        self.max_sessions = max_sessions
        self._ttl_s = ttl_s
        self._idle_s = math.inf if idle_s is None else idle_s
        self._open: dict[str, Session[Conversation]] = {}
        self._reserved: set[str] = set()
        self._gone: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._open or session_id in self._reserved

    @property
    def running_turns(self) -> int:
        """Sessions whose turn is being answered."""
        return sum(session.turn_id is not None for session in self._open.values())

    def reserve(self, session_id: str) -> None:
        """Keep a place for a session that is being prepared. Raises `Refused` (capacity, invalid_request)."""
        if session_id in self:
            raise Refused("invalid_request", "The session is open already; close it, or open without a session id.")
        if len(self._open) + len(self._reserved) >= self.max_sessions:
            full = f"All {self.max_sessions} sessions are taken; close one or try again later."
            raise Refused("capacity", full)
        self._reserved.add(session_id)

    def release(self, session_id: str) -> None:
        """Give a reserved place back."""
        self._reserved.discard(session_id)

    def open(
        self, session_id: str, conversation: Conversation, now_s: float, token_digest: str | None = None
    ) -> Session[Conversation]:
        """Turn a reserved place into an open session; `token_digest` is of the token that its requests must bring."""
        self._reserved.remove(session_id)
        # Whole seconds, rounded up, so that nothing is dropped before the expiry that was announced.
        expires_at_s = float(math.ceil(now_s + self._ttl_s))
        session = Session(session_id, conversation, expires_at_s, now_s, self._idle_s, token_digest)
        self._open[session_id] = session
        self._gone.pop(session_id, None)
        return session

    def recover(self, session_id: str, expires_at_s: float, now_s: float, token_digest: str | None) -> None:
        """Open a session that only the journal knows; it had its place before, so it has one now."""
        self._open[session_id] = Session(session_id, None, expires_at_s, now_s, self._idle_s, token_digest)

    def remember(self, session_id: str, reason: str) -> None:
        """Know an id as gone; `reason` ("closed", "expired", "failed" ...) tells later requests apart."""
        self._gone[session_id] = reason
        while len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)

    def get(self, session_id: str, now_s: float, token_digest: str | None = None) -> Session[Conversation]:
        """The open session of that id. Raises `Refused` (session_expired, session_not_found, internal).

        Whoever does not bring its token is told what is told of an id that nobody knows.
        """
        session = self._open.get(session_id)
        if session is not None and not session.closing:
            if not hmac.compare_digest(session.token_digest or "", token_digest or ""):
                raise not_found()
            if not session.is_over(now_s):
                return session
            raise Refused("session_expired", "The session has expired; open a new one.")
        reason = self._gone.get(session_id)
        if reason == "expired":
            raise Refused("session_expired", "The session has expired; open a new one.")
        if reason == "failed":
            raise Refused("internal", "The session's picture could not be prepared; the server's log has the cause.")
        raise not_found()

    def find(self, session_id: str) -> Session[Conversation] | None:
        """The open session of that id, or None; expiry is not looked at."""
        return self._open.get(session_id)

    def was_closed(self, session_id: str) -> bool:
        """Whether the id's session was closed, or could not be prepared (within the last ids that are remembered)."""
        return self._gone.get(session_id) in ("closed", "failed")

    def begin_turn(self, session: Session[Conversation], turn_id: str) -> None:
        """Mark the session busy. Raises `Refused` (session_busy) while another turn runs."""
        if session.turn_id is not None:
            raise Refused("session_busy", "The session is still answering; wait for that answer or cancel it.")
        session.turn_id = turn_id

    def remove(self, session_id: str, reason: str) -> None:
        """Forget an open session; `reason` ("closed", "expired" or "failed") tells later requests apart."""
        del self._open[session_id]
        self.remember(session_id, reason)

    def expired(self, now_s: float) -> list[Session[Conversation]]:
        """Idle sessions whose time, and the grace after it, is up, and which are not being closed already."""
        open_ones = self._open.values()
        return [s for s in open_ones if not s.closing and s.turn_id is None and s.is_over(now_s - GRACE_S)]

    def __iter__(self) -> Iterator[Session[Conversation]]:
        return iter(self._open.values())


def not_found() -> Refused:
    """What is told of a session that is not open here, and of one that the caller may not know of."""
    return Refused("session_not_found", "No session of that id is open here; open one with a picture first.")
