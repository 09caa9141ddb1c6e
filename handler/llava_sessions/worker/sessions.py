"""Sessions and turns of one worker, and the table of all sessions.

Nothing here is thread-safe. The pump's lock guards all of it. Times are arguments, in seconds since the epoch.
"""

from __future__ import annotations

import hmac
import math
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from ..chat.media import RecordMedia
from ..chat.transcript import Transcript, TurnRecord
from ..errors import Refused
from ..protocol.openai import Chat
from ..protocol.replies import utc_text
from ..protocol.requests import Ask
from .pending import PendingRequest
from .prefixes import HeldConversation, Prompt
from .prompts import PreparedChat, PreparedQuestion
from .states import Residency, SessionState, Stateful, TurnState

_REMEMBERED = 10_000
# A request that was sent just before the announced expiry arrives a moment later: the session is kept for so long.
GRACE_S = 2.0
# For so long after an answer an Inference-Id identifies a retry of its question. It may label further questions too.
LABEL_S = 10.0
MAX_ENGINE_LOSSES = 5  # engines that may die in a row during a session's turns; its further turns are rejected


class Turn(Stateful):
    """A question and its answer. `pending`: the requests that wait for the answer, several after a retry.

    `arrived_s`, `submitted_s` (to the engine) and `deadline_s` are times of the pump's clock; `deadline_s` is None
    without a deadline. `prepared`: the preparation, until it is done. `ask` has no pictures once it is admitted.
    `record`: the answer, from STORING on. `media`, `base_turns`: as in `TurnRecord`. `picture_keys`: of the whole
    conversation. `prompt`: that of a conversation without a session header. `kept_tokens`: tokens of the session that
    the turn follows; `crops`: the engine drops all others. `avoids`: as in `PendingRequest`. `is_owned`: no other
    instance has the session, as far as the journal can be read (marks.py).
    """

    def __init__(self, session: Session, ask: Ask | Chat, pending: PendingRequest) -> None:
        super().__init__(pending.row.request_id, TurnState.PREPARING)
        self.session = session
        self.ask = ask
        self.pending = [pending]
        self.cancels: list[PendingRequest] = []
        # Retries that arrive while the turn is being stopped. They run as a new turn once this turn is done.
        self.retries: list[tuple[PendingRequest, Ask | Chat]] = []
        self.is_admitted = False
        self.is_owned = True
        self.prompt_ids: list[int] = []
        self.media = RecordMedia()
        self.base_turns: int | None = None
        self.picture_keys: tuple[str, ...] = ()
        self.prompt: Prompt | None = None
        self.kept_tokens = 0
        self.crops = False
        self.chunks: list[str] = []
        self.arrived_s = pending.arrived_s
        self.avoids = pending.avoids
        self.submitted_s = pending.arrived_s
        self.deadline_s = None if ask.deadline_ms is None else pending.arrived_s + ask.deadline_ms / 1e3
        self.prepared: Future[PreparedQuestion] | Future[PreparedChat] | None = None
        self.record: TurnRecord | None = None

    @property
    def shown_text(self) -> str:
        """The text that clients may see: none before it is certain that no other instance has the session."""
        return self.text if self.is_owned else ""

    @property
    def may_commit(self) -> bool:
        """Whether large requests may be committed to status 200."""
        return self.is_admitted and self.is_owned

    def is_overdue(self, now_s: float) -> bool:
        """Return whether the deadline has passed."""
        return self.deadline_s is not None and now_s >= self.deadline_s

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.chunks)

    @property
    def in_engine(self) -> bool:
        """Whether the engine works on the turn."""
        return self.is_in(TurnState.RUNNING, TurnState.STOPPING)


class Session(Stateful):
    """One chat. `expires_at_s` is absolute; `used_at_s` is the end of the latest turn; idle expiry counts from there.

    At `confirm_by_s` the session expires if no request has named it. `transcript` is None during the opening, and after
    a restart of the worker until the journal is read. `stored_turns` counts the turns that are durable. `engine_losses`
    counts the engines that died during its turns, since its last answer. `conversation`: what an implicit session
    holds; None for a session opened by name. `picture_keys`: keys of the pictures that the engine holds, in order.
    `engine`: the number of the engine that holds the session, or was asked to; None for a cold session.
    `loading_tokens`: the tokens that the engine prefills while the session is LOADING.
    """

    def __init__(self, session_id: str, idle_s: float) -> None:
        super().__init__(session_id, SessionState.OPENING, Residency.COLD)
        self.conversation: HeldConversation | None = None
        self.engine: int | None = None
        self.loading_tokens = 0
        self.picture_keys: tuple[str, ...] = ()
        self._idle_s = idle_s
        self.transcript: Transcript | None = None
        self.expires_at_s = math.inf
        self.confirm_by_s = math.inf
        self.used_at_s = 0.0
        self.token_digest: str | None = None
        self.turn: Turn | None = None
        self.stored_turns = 0
        self.engine_losses = 0
        self._labelled: dict[str, tuple[int, float]] = {}  # retry key: index of the turn, end of the turn

    def add_labelled(self, retry_key: str, index: int, now_s: float) -> None:
        """Remember the turn of a question that only an Inference-Id identifies, for `LABEL_S`."""
        recent = {key: (turn, at_s) for key, (turn, at_s) in self._labelled.items() if now_s - at_s < LABEL_S}
        self._labelled = {**recent, retry_key: (index, now_s)}

    def find_labelled(self, retry_key: str, now_s: float) -> int | None:
        """Return the index of the turn that a retry by Inference-Id repeats, or None if it is too old."""
        index, at_s = self._labelled.get(retry_key, (None, -math.inf))
        return index if now_s - at_s < LABEL_S else None

    @property
    def known_transcript(self) -> Transcript:
        """The transcript of a session whose opening is over or whose journal was read. Raise LookupError otherwise."""
        if self.transcript is None:
            raise LookupError("the session has no transcript yet")
        return self.transcript

    @property
    def is_stored_only(self) -> bool:
        """Whether only the journal has the session: it was found there at the start, and not asked yet."""
        is_idle = self.turn is None and self.is_in(SessionState.OPEN)
        return is_idle and self.transcript is None and self.conversation is None

    @property
    def held_conversation(self) -> HeldConversation:
        """What an implicit session holds. Raise LookupError for any other session."""
        if self.conversation is None:
            raise LookupError("the session was opened by name")
        return self.conversation

    @property
    def in_engine(self) -> bool:
        """Whether the engine holds the session, or was asked to."""
        return not self.is_in(Residency.COLD)

    @property
    def is_loaded(self) -> bool:
        """Whether the engine has encoded and prefilled what the session was opened with."""
        return self.is_in(Residency.LOADED)

    @property
    def expires(self) -> str:
        """The expiry in the form of SageMaker's header, UTC."""
        return utc_text(self.expires_at_s)

    @property
    def ends_at_s(self) -> float:
        """The expiry, the idle limit or the end of the time to confirm, whichever comes first."""
        return min(self.expires_at_s, self.used_at_s + self._idle_s, self.confirm_by_s)

    def has_expired(self, now_s: float) -> bool:
        """Return whether the session has reached its expiry or its idle limit, or was not confirmed in time."""
        return now_s >= self.ends_at_s

    def await_confirmation(self, confirm_s: int | None, now_s: float) -> None:
        """Expire in `confirm_s` seconds unless a request names the session. None: wait for no request."""
        self.confirm_by_s = math.inf if confirm_s is None else now_s + confirm_s

    def restore(self, transcript: Transcript, now_s: float) -> None:
        """Open a session that the journal has given."""
        self.transcript = transcript
        self.stored_turns = len(transcript.log)
        self.expires_at_s = transcript.opening.expires_at_s
        self.used_at_s = now_s
        self.token_digest = transcript.opening.token_digest
        self.advance(SessionState.OPEN)

    def load(self, engine: int, tokens: int) -> None:
        """Enter LOADING: an engine was asked to hold the session, and prefills `tokens` tokens."""
        self.advance(Residency.LOADING)
        self.engine = engine
        self.loading_tokens = tokens

    def unload(self) -> None:
        """Enter COLD from any residency."""
        if self.in_engine:
            self.advance(Residency.COLD)
        self.engine = None


@dataclass(frozen=True)
class _Ended:
    """Why a session ended, and the digest of its token."""

    reason: str
    token_digest: str | None

    def fits(self, reason: str, token_digest: str | None) -> bool:
        """Return whether the session ended for this reason and had this token."""
        return self.reason == reason and same_token(self.token_digest, token_digest)


class SessionTable:
    """The sessions of one worker: at most `max_sessions` that clients opened by name, and `max_implicit` others.

    A session expires `ttl_s` seconds after its open, or `idle_s` seconds after its latest turn (None: never). A place
    is taken before a picture is prepared, so a full table rejects an open before any work is done.
    `may_release_stored`: sessions that only the journal has make room for others, since they can be adopted later.
    """

    def __init__(self, max_sessions: int, ttl_s: float, idle_s: float | None = None, max_implicit: int = 64) -> None:
        self.max_sessions = max_sessions
        self.may_release_stored = False
        self.max_implicit = max_implicit
        self.ttl_s = ttl_s
        self.idle_s = math.inf if idle_s is None else idle_s
        self._sessions: dict[str, Session] = {}
        self._opening: set[str] = set()  # IDs of opening sessions, and of others until the next `__len__`
        self._past: OrderedDict[str, _Ended] = OrderedDict()
        self._ended: list[str] = []

    def __len__(self) -> int:
        """Count the sessions that are open or closing."""
        self._opening = {one for one in self._opening if (item := self.find(one)) and item.is_in(SessionState.OPENING)}
        return len(self._sessions) - len(self._opening)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._sessions

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def add(self, session: Session) -> None:
        """Add an implicit session."""
        self._sessions[session.id] = session

    def reserve(self, session_id: str) -> Session:
        """Add a session in state OPENING. Raise `Refused` (capacity, invalid_request)."""
        if session_id in self._sessions:
            raise Refused("invalid_request", "The session is open already; close it, or open without a session ID.")
        if sum(one.conversation is None for one in self._sessions.values()) >= self.max_sessions:
            stored = next((one for one in self._sessions.values() if one.is_stored_only), None)
            if stored is None or not self.may_release_stored:
                raise Refused("capacity", f"All {self.max_sessions} sessions are taken; close one or try again later.")
            self.end(stored, None)
        self._opening.add(session_id)
        session = self._sessions[session_id] = Session(session_id, self.idle_s)
        return session

    def release(self, session: Session) -> None:
        """Remove a session whose open was rejected, or an implicit one."""
        self._sessions.pop(session.id, None)

    def expiry_of_open(self, now_s: float) -> float:
        """Return the expiry of a session that opens now: whole seconds, rounded up."""
        return float(math.ceil(now_s + self.ttl_s))

    def recover(self, session_id: str, expires_at_s: float, now_s: float, token_digest: str | None) -> bool:
        """Add an open session that only the journal holds, even if the table is full. Return False if it is known."""
        if session_id in self._sessions or session_id in self._past:
            return False
        session = self._sessions[session_id] = Session(session_id, self.idle_s)
        session.expires_at_s = expires_at_s
        session.used_at_s = now_s
        session.token_digest = token_digest
        session.advance(SessionState.OPEN)
        return True

    def remember(self, session_id: str, reason: str, token_digest: str | None = None) -> None:
        """Remember why a session ended ("closed", "expired", "damaged", "moved"), for later requests on its ID."""
        self._past[session_id] = _Ended(reason, token_digest)
        while len(self._past) > _REMEMBERED:
            self._past.popitem(last=False)

    def get(self, session_id: str, now_s: float, token_digest: str | None = None) -> Session:
        """Return the open session of this ID, which confirms it. Raise `Refused` (session_expired, session_not_found).

        A request without the session's token receives the same error as an unknown session ID.
        """
        session = self._sessions.get(session_id)
        if session is not None and session.conversation is None and session.is_in(SessionState.OPEN):
            if not same_token(session.token_digest, token_digest):
                raise session_not_found()
            if session.has_expired(now_s):
                raise session_expired()
            session.confirm_by_s = math.inf
            return session
        past = self._past.get(session_id)
        if past is not None and past.fits("expired", token_digest):
            raise session_expired()
        raise session_not_found()

    def find(self, session_id: str) -> Session | None:
        """Return the session of this ID in any state, or None."""
        return self._sessions.get(session_id)

    def was_closed(self, session_id: str, token_digest: str | None = None) -> bool:
        """Return whether the session of this ID and token was closed, among the IDs that are remembered."""
        past = self._past.get(session_id)
        return past is not None and past.fits("closed", token_digest)

    def end(self, session: Session, reason: str | None) -> None:
        """Remove a session. `reason` as in `remember`; None for an open that was rejected."""
        del self._sessions[session.id]
        self._ended.append(session.id)
        if reason is not None:
            self.remember(session.id, reason, session.token_digest)

    def take_ended(self) -> list[str]:
        """Return the IDs of the sessions that have ended since the last call."""
        ended = self._ended
        self._ended = []
        return ended


def expired_sessions(table: SessionTable, now_s: float) -> list[Session]:
    """Return the open sessions without a turn whose expiry and grace are over."""
    idle = (session for session in table if session.is_in(SessionState.OPEN) and session.turn is None)
    return [session for session in idle if session.has_expired(now_s - GRACE_S)]


def same_token(expected: str | None, given: str | None) -> bool:
    """Compare the digests of two session tokens in constant time. None: no token."""
    return hmac.compare_digest(expected or "", given or "")


def session_not_found() -> Refused:
    """Return the error for an unknown session, and for a session that the caller may not know of."""
    return Refused("session_not_found", "No session of this ID is open here; open one with a picture first.")


def session_expired() -> Refused:
    """Return the error for a session whose time is over."""
    return Refused("session_expired", "The session has expired; open a new one.")
