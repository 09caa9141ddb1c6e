"""The life of an open: pictures prepared, admitted by the engine, stored, acknowledged.

All methods run on the pump's thread, under its lock.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import uuid
from collections import OrderedDict
from collections.abc import Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..chat.media import RecordMedia
from ..chat.transcript import OpenRecord, Transcript, short_id
from ..errors import Refused
from ..ipc.messages import CloseSession
from ..journal.journal import AlreadyClaimed, SaveOutcome
from ..protocol import replies
from ..protocol.constants import NEW_SESSION, SESSION_HEADER
from ..protocol.requests import Open, session_in_header
from ..text.chat_template import Opening
from .context import WorkerContext
from .pending import PendingRequest, session_moved
from .prompts import PreparedOpen, Rebuild
from .sessions import Session, session_not_found
from .states import SessionState

log = logging.getLogger(__name__)

_RETRY_KEYS_KEPT = 10_000
# The ID that the frontend gives a sequence that came without one (InferenceRequestHandler.java).
_UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_FRONTEND_ID = re.compile(f"ts-seq-{_UUID}")
# All IDs that `_session_id` returns.
SESSION_ID = re.compile(f"(ts-seq|ls)-{_UUID}")


@dataclass(eq=False)
class _Opening:
    """An open that is not acknowledged yet. `pending`: its requests, several after a retry.

    `resumed`: the session that it continues, if that is open in this worker. `retiring`: the journal removes the old
    session, so an error of the engine cannot reject this open any more. `rebuild`: the session as it was sent to the
    engine, kept until it is admitted if there are several engines.
    """

    session: Session
    request: Open
    pending: list[PendingRequest] = field(default_factory=list)
    resumed: Session | None = None
    retiring: bool = False
    rebuild: Rebuild | None = None

    @property
    def waiting(self) -> list[PendingRequest]:
        """The requests whose clients are still connected."""
        return [pending for pending in self.pending if not pending.disconnected]


class Openings:
    """All opens that are not acknowledged, and the sessions that retried opens are answered with."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._openings: dict[str, _Opening] = {}
        self._by_retry_key: OrderedDict[str, str] = OrderedDict()

    def start(self, pending: PendingRequest, request: Open) -> None:
        """Start an open. Raise `Refused`."""
        if session_in_header(pending.row.headers):
            message = f"A new session gets its ID from the server; `{SESSION_HEADER}` must be absent or {NEW_SESSION}."
            raise Refused("invalid_request", message)
        if request.stored_key is not None and self._attach(pending, request.stored_key, request.confirm_s):
            return
        self._context.engines.check()
        session = self._context.table.reserve(_session_id(pending))
        opening = _Opening(session, request, [pending])
        try:
            prepared = _prepare(self._context, opening)
        except Exception:
            self._context.table.release(session)
            raise
        self._openings[session.id] = opening
        if request.stored_key is not None:
            self.remember(request.stored_key, session.id)
        self._context.inbox.when_done(prepared, partial(self._prepared, opening))

    def remember(self, retry_key: str, session_id: str) -> None:
        """Answer a retry of an open with this session."""
        self._by_retry_key[retry_key] = session_id
        while len(self._by_retry_key) > _RETRY_KEYS_KEPT:
            self._by_retry_key.popitem(last=False)

    def admitted(self, session: Session) -> None:
        """Store a session that the engine has admitted. A session that is rebuilt needs nothing."""
        opening = self._openings.get(session.id)
        if opening is None or not session.is_in(SessionState.OPENING):
            return
        opening.rebuild = None
        session.advance(SessionState.OPEN)
        saved = self._context.journal.save(session.known_transcript)
        self._context.inbox.when_done(saved, partial(self._saved, opening))

    def failed(self, session: Session, error: Exception) -> bool:
        """Reject an open that is not acknowledged. Return False if there is none, or if its resume is being retired."""
        opening = self._openings.get(session.id)
        if opening is None or opening.retiring:
            return False
        self._reject(opening, error)
        return True

    def holds(self, session: Session) -> bool:
        """Return whether the session is not acknowledged yet."""
        return session.id in self._openings

    def engine_lost(self, lost: Set[Session]) -> None:
        """Place the opens again that the lost engine held, or reject them.

        An open that is being stored becomes a cold session.
        """
        for opening in list(self._openings.values()):
            session = opening.session
            if session in lost and session.is_in(SessionState.OPENING) and not self.place_again(session, None):
                self._reject(opening, self._context.engines.restarting())

    def place_again(self, session: Session, avoid: int | None) -> bool:
        """Send an open to another engine than `avoid`, which has rejected it, or than the lost one.

        Return False if there is no other engine, or if the open was placed again before.
        """
        opening = self._openings.get(session.id)
        rebuild = None if opening is None else opening.rebuild
        if opening is None or rebuild is None or not self._context.placement.has_other(avoid):
            return False
        log.info("open_placed_again session=%s", short_id(session.id))
        session.unload()
        opening.rebuild = None
        _load(self._context, session, rebuild, avoid)
        return True

    def _attach(self, pending: PendingRequest, retry_key: str, confirm_s: int | None) -> bool:
        """Answer a retried open with the session of the first one. Return False if that session has ended."""
        session_id = self._by_retry_key.get(retry_key)
        if session_id is None:
            return False
        if session_id in self._openings:
            self._openings[session_id].pending.append(pending)
            return True
        session = self._context.table.find(session_id)
        now_s = self._context.clock()
        if session is None or not session.is_in(SessionState.OPEN) or session.has_expired(now_s):
            return False
        if session.confirm_by_s < math.inf:
            session.await_confirmation(confirm_s, now_s)
        if session.transcript is not None:
            _acknowledge(pending, session)
        else:
            read = self._context.preparer.claim(session_id, session.token_digest)
            self._context.inbox.when_done(read, partial(self._read, pending, session))
        return True

    def _read(self, pending: PendingRequest, session: Session, read: Future[Transcript]) -> None:
        """Answer a retried open whose session only the journal held."""
        try:
            transcript = read.result()
        except Exception as error:
            pending.refuse(error)
            return
        if not session.is_in(SessionState.OPEN) or self._context.table.find(session.id) is not session:
            was_closed = self._context.table.was_closed(session.id, session.token_digest)
            # Otherwise it is closing, or has made room for another session. A retry finds out.
            pending.refuse(session_not_found() if was_closed else session_moved())
            return
        if session.transcript is None:
            session.transcript = transcript
            session.stored_turns = len(transcript.log)
        _acknowledge(pending, session)

    def _prepared(self, opening: _Opening, prepared: Future[PreparedOpen | Rebuild]) -> None:
        """Submit an open whose pictures are prepared, or reject it."""
        session = opening.session
        try:
            rebuild = _new_transcript(opening, prepared.result(), self._context)
            check_context(rebuild.transcript.token_count + 1, self._context.context_tokens)
            if not opening.waiting:
                raise Refused("invalid_request", "The client has left.")  # no client receives it
            _load(self._context, session, rebuild)
            opening.rebuild = rebuild if self._context.placement.are_several else None
        except Exception as error:
            self._reject(opening, error)

    def _saved(self, opening: _Opening, saved: Future[SaveOutcome]) -> None:
        """Acknowledge an open whose record is stored, or could not be stored."""
        if opening.session.id not in self._openings:
            return  # the engine has failed it meanwhile
        if not opening.waiting:
            self._reject(opening, Refused("invalid_request", "The client has left."))
            return
        if _has_lost_resumed(self._context, opening):
            self._reject(opening, AlreadyClaimed())
            return
        durable = outcome_of(saved) is SaveOutcome.STORED
        if opening.request.resume is None or not durable:
            self._acknowledge(opening, durable)
            return
        opening.retiring = True
        retired = self._context.journal.retire(opening.request.resume)
        self._context.inbox.when_done(retired, partial(self._retired, opening))

    def _retired(self, opening: _Opening, retired: Future[bool]) -> None:
        """Acknowledge a resumed session if this instance still owned the old one."""
        if opening.session.id not in self._openings:
            return
        if not retired.cancelled() and retired.exception() is None and retired.result():
            self._acknowledge(opening, durable=True)
            return
        _end_resumed(self._context, opening, "moved")
        self._reject(opening, AlreadyClaimed())

    def _acknowledge(self, opening: _Opening, durable: bool) -> None:
        del self._openings[opening.session.id]
        session = opening.session
        session.await_confirmation(opening.request.confirm_s, self._context.clock())
        transcript = session.known_transcript
        self._context.counters.opens += 1
        if durable:
            session.stored_turns = len(transcript.log)
        _end_resumed(self._context, opening, "closed")
        for pending in opening.waiting:
            _acknowledge(pending, session, durable if self._context.journal.durable else None)
        log.info(
            "session_open session=%s tokens=%d turns=%d open=%d",
            short_id(session.id),
            transcript.token_count,
            len(transcript.turns),
            len(self._context.table),
        )

    def _reject(self, opening: _Opening, error: Exception) -> None:
        """Free the session's place, open a resumed session again, and answer the clients."""
        session = opening.session
        del self._openings[session.id]
        if session.is_in(SessionState.OPEN):
            self._context.journal.forget(session.id)
        unload(self._context, session)
        first = opening.pending[0]
        if first.disconnected and first.row.sequence_id == session.id:
            self._context.table.end(session, None)  # no reply ends its sequence
        else:
            self._context.table.release(session)
        if opening.resumed is not None:
            opening.resumed.advance(SessionState.OPEN)
        for pending in opening.waiting:
            pending.refuse(error)


def _prepare(context: WorkerContext, opening: _Opening) -> Future[Any]:
    """Start the preparation. Its future returns a `PreparedOpen` or, for a resume, a `Rebuild`."""
    request = opening.request
    if request.resume is None:
        return context.preparer.open(request, opening.session.id, digest_of(request.session_token))
    token_digest = digest_of(request.session_token)
    transcript = None
    if context.table.find(request.resume) is not None:
        resumed = context.table.get(request.resume, context.clock(), token_digest)
        if resumed.turn is not None:
            raise Refused("session_busy", "The session to resume is still answering; cancel that turn or wait.")
        # No ask, close or other resume may use the session until this open is answered.
        resumed.advance(SessionState.CLOSING)
        opening.resumed = resumed
        transcript = resumed.transcript
    elif context.table.was_closed(request.resume, token_digest):
        context.table.get(request.resume, context.clock(), token_digest)
    return context.preparer.resume(request.resume, token_digest, transcript)


def _has_lost_resumed(context: WorkerContext, opening: _Opening) -> bool:
    """Return whether the session that an open continues was lost meanwhile: another instance may have added turns."""
    old = opening.resumed
    return old is not None and context.table.find(old.id) is not old


def _end_resumed(context: WorkerContext, opening: _Opening, reason: str) -> None:
    """End the session that an open continues, unless it was lost meanwhile."""
    old = opening.resumed
    if old is not None and not _has_lost_resumed(context, opening):
        unload(context, old)
        context.table.end(old, reason)
    opening.resumed = None


def _load(context: WorkerContext, session: Session, rebuild: Rebuild, avoid: int | None = None) -> None:
    """Make an engine hold a session that opens. Raise `Refused` (engine_restarting)."""
    engine = context.placement.place(rebuild.picture_keys, avoid)
    context.engines.load(session, rebuild.command(session.id), engine)
    session.transcript = rebuild.transcript
    session.picture_keys = rebuild.picture_keys


def _new_transcript(opening: _Opening, prepared: PreparedOpen | Rebuild, context: WorkerContext) -> Rebuild:
    """Begin the session's transcript; a resumed one continues with the old session's turns."""
    now_s = context.clock()
    session = opening.session
    session.used_at_s = now_s
    session.expires_at_s = context.table.expiry_of_open(now_s)
    session.token_digest = digest_of(opening.request.session_token)
    if isinstance(prepared, Rebuild):
        source: OpenRecord | Opening = prepared.transcript.opening
        opening_record = prepared.transcript.opening
        media = RecordMedia(opening_record.pictures, opening_record.groups, opening_record.clips)
        turns = prepared.transcript.turns
        pictures = prepared.pictures
        history_turns = prepared.transcript.opening.history_turns
        scope = prepared.scope
    else:
        source = prepared.opening
        media = prepared.media
        turns = ()
        pictures = prepared.opening.pictures
        history_turns = prepared.history_turns
        scope = context.preparer.prompts.scope(session.id, session.token_digest)
    record = OpenRecord(
        session_id=session.id,
        opened_at_s=now_s,
        expires_at_s=session.expires_at_s,
        token_digest=session.token_digest,
        kind=source.kind,
        pictures=media.pictures,
        token_ids=source.token_ids,
        image_tokens=source.image_tokens,
        retry_key=opening.request.stored_key,
        history_turns=history_turns,
        groups=media.groups,
        clips=media.clips,
    )
    return Rebuild(Transcript(record, turns), pictures, scope)


def _session_id(pending: PendingRequest) -> str:
    """Return the ID by which the frontend routes, else (behind a literal NEW_SESSION) a new one."""
    row = pending.row
    if row.fresh and _FRONTEND_ID.fullmatch(row.sequence_id):
        return row.sequence_id
    return f"ls-{uuid.uuid4()}"


def _acknowledge(pending: PendingRequest, session: Session, durable: bool | None = None) -> None:
    transcript = session.known_transcript
    body = replies.opened(
        session.id,
        session.expires,
        transcript.opening.image_tokens,
        len(transcript.opening.token_ids),
        transcript.opening.history_turns + len(transcript.turns),
        durable,
    )
    pending.reply(body, replies.session_headers(session.id, session.expires))


def unload(context: WorkerContext, session: Session) -> None:
    """Make the engine free a session that it holds."""
    if session.in_engine:
        context.engines.submit_if_held(session, CloseSession(session.id))
        session.unload()


def check_context(tokens: int, context_tokens: int) -> None:
    """Raise `Refused` (context_length_exceeded) if a conversation of `tokens` does not fit into the context."""
    if tokens > context_tokens:
        message = f"The conversation must be at most {context_tokens} tokens, got {tokens}."
        raise Refused("context_length_exceeded", message)


def digest_of(session_token: str | None) -> str | None:
    """Return the sha256 (hex) of a caller's token: the form in which it is kept."""
    return None if session_token is None else hashlib.sha256(session_token.encode()).hexdigest()


def outcome_of(saved: Future[SaveOutcome]) -> SaveOutcome:
    """Return the outcome of a save; a save that was cancelled or broke has failed."""
    if saved.cancelled() or saved.exception() is not None:
        return SaveOutcome.FAILED
    return saved.result()
