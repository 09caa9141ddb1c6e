"""Owns the session table: who is open, who is busy, when each expires, and which ids are remembered as gone.

Must not know torch, TorchServe, payloads or tokens: what a session says is in its `conversation`, held here as an
opaque value. Not thread-safe; its one user, the pump, holds a lock. Pure: time comes in as an argument (seconds since
the epoch).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from .errors import Refused

Conversation = TypeVar("Conversation")

_REMEMBERED = 10_000
_ANSWERS_KEPT = 8


@dataclass
class Session(Generic[Conversation]):
    """One open chat. `turn_id` is the request id of the running turn; `expires_at_s` is absolute.

    `answers` are the latest finished ones, by what a repeated request is known by: it is told again.
    """

    id: str
    conversation: Conversation
    expires_at_s: float
    turn_id: str | None = None
    closing: bool = False
    answers: OrderedDict[str, Any] = field(default_factory=OrderedDict)

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
    """The open sessions of one worker, at most `max_sessions`, each for `ttl_s` seconds from its open.

    Places are reserved before a picture is prepared, so that a full table refuses an open before any work is done.
    """

    def __init__(self, max_sessions: int, ttl_s: float) -> None:
        self._max_sessions = max_sessions
        self._ttl_s = ttl_s
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
        if len(self._open) + len(self._reserved) >= self._max_sessions:
            full = f"All {self._max_sessions} sessions are taken; close one or try again later."
            raise Refused("capacity", full)
        self._reserved.add(session_id)

    def release(self, session_id: str) -> None:
        """Give a reserved place back."""
        self._reserved.discard(session_id)

    def open(self, session_id: str, conversation: Conversation, now_s: float) -> Session[Conversation]:
        """Turn a reserved place into an open session."""
        self._reserved.remove(session_id)
        # Whole seconds, rounded up, so that nothing is dropped before the expiry that was announced.
        session = Session(session_id, conversation, expires_at_s=float(math.ceil(now_s + self._ttl_s)))
        self._open[session_id] = session
        self._gone.pop(session_id, None)
        return session

    def get(self, session_id: str, now_s: float) -> Session[Conversation]:
        """The open session of that id. Raises `Refused` (session_expired, session_not_found, internal)."""
        session = self._open.get(session_id)
        if session is not None and not session.closing:
            if now_s < session.expires_at_s:
                return session
            raise Refused("session_expired", "The session has expired; open a new one.")
        reason = self._gone.get(session_id)
        if reason == "expired":
            raise Refused("session_expired", "The session has expired; open a new one.")
        if reason == "failed":
            raise Refused("internal", "The session's picture could not be prepared; the server's log has the cause.")
        raise Refused("session_not_found", "No session of that id is open here; open one with a picture first.")

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
        self._gone[session_id] = reason
        while len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)

    def expired(self, now_s: float) -> list[Session[Conversation]]:
        """Open sessions whose time is up and which are not being closed already."""
        return [s for s in self._open.values() if not s.closing and now_s >= s.expires_at_s]
