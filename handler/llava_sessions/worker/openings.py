"""Owns the life of an open: from the request, by way of its pictures and the engine, to the session and its reply.

Must not know how rows are exchanged, nor turns; no torch, no TorchServe.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from ..chat.transcript import Conversation, OpenRecord, Transcript, short_id
from ..errors import Refused
from ..protocol.constants import NEW_SESSION, SESSION_HEADER
from ..protocol.requests import Open, session_in_header
from .context import WorkerContext, new_session_id
from .pending import PendingRequest
from .preparation import Chat
from .sessions import Session
from .telling import refuse, tell_open

log = logging.getLogger(__name__)

_OPENS_KEPT = 10_000
# How the frontend names a sequence that came without an id (InferenceRequestHandler.java).
_FRONTEND_ID = re.compile(r"ts-seq-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(eq=False)
class _Opening:
    """A session that is not open yet. `entries` wait for it: more than one where a request was repeated.

    `old` is the session that it carries on, where that is open here.
    """

    session_id: str
    request: Open
    entries: list[PendingRequest] = field(default_factory=list)
    old: Session[Conversation] | None = None
    chat: Chat | None = None

    @property
    def waiting(self) -> list[PendingRequest]:
        """The rows whose clients are still there."""
        return [entry for entry in self.entries if not entry.gone]


class Opens:
    """All opens that are under way, and which request opened which session."""

    def __init__(self, desk: WorkerContext) -> None:
        self._desk = desk
        self._openings: dict[str, _Opening] = {}
        self._known: OrderedDict[str, str] = OrderedDict()  # sessions by what a repeated open is known by

    def start(self, entry: PendingRequest, request: Open) -> None:
        """Take an open. Raises `Refused`."""
        row = entry.row
        if session_in_header(row.headers):
            wanted = f"open without the {SESSION_HEADER} header, or with {NEW_SESSION} in it"
            raise Refused("invalid_request", f"A new session gets its id from the server; {wanted}.")
        if request.retry_key is not None and self._opened_before(entry, request.retry_key):
            return
        self._desk.check_taking_work()
        # The frontend routes by the id that it made; behind a literal NEW_SESSION it made none.
        made = row.fresh and _FRONTEND_ID.fullmatch(row.sequence_id)
        opening = _Opening(row.sequence_id if made else new_session_id(), request, [entry])
        self._desk.table.reserve(opening.session_id)
        try:
            chat = self._prepare(opening)
        except Exception:
            self._desk.table.release(opening.session_id)
            raise
        self._openings[opening.session_id] = opening
        if request.retry_key is not None:
            self.remember(request.retry_key, opening.session_id)
        chat.add_done_callback(lambda done: self._desk.post(partial(self._prepared, opening, done)))

    def remember(self, retry_key: str, session_id: str) -> None:
        """Know a repetition of the request that opened the session."""
        self._known[retry_key] = session_id
        while len(self._known) > _OPENS_KEPT:
            self._known.popitem(last=False)

    def accepted(self, session_id: str) -> bool:
        """The engine has room for the session. False where it is no opening."""
        opening = self._openings.get(session_id)
        if opening is None:
            return False
        desk, chat, request = self._desk, opening.chat, opening.request
        now_s = desk.clock()
        session = desk.table.open(session_id, chat.conversation(), now_s, digest_of(request.session_token))
        session.in_engine = True
        record = OpenRecord(
            session_id=session_id,
            opened_at_s=now_s,
            expires_at_s=session.expires_at_s,
            token_digest=session.token_digest,
            kind=chat.opening.kind,
            pictures=chat.blobs,
            token_ids=chat.opening.token_ids,
            image_tokens=chat.opening.image_tokens,
            retry_key=request.retry_key,
        )
        session.story = chat.story(record)
        opening.chat = None
        desk.when_done(desk.journal.save(session.story), partial(self._saved, opening, session))
        return True

    def failed(self, session_id: str, error: Exception) -> bool:
        """Something keeps the session from being opened. False where it is no opening."""
        opening = self._openings.get(session_id)
        if opening is None or self._desk.table.find(session_id) is not None:
            return False
        self._refuse(opening, error)
        return True

    def engine_lost(self) -> None:
        """Refuse what the engine had been given."""
        for opening in list(self._openings.values()):
            # One that is being stored is open already, and is rebuilt when it speaks.
            if opening.chat is not None and self._desk.table.find(opening.session_id) is None:
                self._refuse(opening, self._desk.restarting())

    def _opened_before(self, entry: PendingRequest, retry_key: str) -> bool:
        """Answer a repeated open with the session of the first: at once, or when that one is."""
        session_id = self._known.get(retry_key)
        if session_id in self._openings:
            self._openings[session_id].entries.append(entry)
            return True
        session = None if session_id is None else self._desk.table.find(session_id)
        if session is None or session.closing or session.is_over(self._desk.clock()):
            return False
        if session.story is None:
            story = self._desk.preparer.read(session_id)
            story.add_done_callback(lambda done: self._desk.post(partial(self._read, entry, session, done)))
        else:
            tell_open(entry, session, session.story)
        return True

    def _read(self, entry: PendingRequest, session: Session[Conversation], story: Future[Transcript]) -> None:
        """The journal of a session that a repeated open asks for is read, or is damaged."""
        try:
            tell_open(entry, session, story.result())
        except Exception as error:
            refuse(self._desk, entry, error)

    def _prepare(self, opening: _Opening) -> Future[Chat]:
        request, desk = opening.request, self._desk
        if request.resume is None:
            return desk.preparer.open(request)
        digest, story = digest_of(request.session_token), None
        if desk.table.find(request.resume) is not None:
            old = desk.table.get(request.resume, desk.clock(), digest)
            if old.turn_id is not None:
                raise Refused("session_busy", "The session to carry on is still answering; cancel that or wait.")
            # Nobody may ask, close or carry it on until this open is answered.
            old.closing, opening.old, story = True, old, old.story
        elif desk.table.was_closed(request.resume):
            desk.table.get(request.resume, desk.clock(), digest)
        return desk.preparer.resume(request.resume, digest, story)

    def _prepared(self, opening: _Opening, chat: Future[Chat]) -> None:
        """The pictures are there, or one is refused."""
        try:
            opening.chat = chat.result()
            self._desk.check_fits(len(opening.chat.token_ids) + 1)
            if not opening.waiting:
                raise Refused("invalid_request", "All who asked for it have left.")  # told to nobody
            self._desk.submit(opening.chat.command(opening.session_id))
        except Exception as error:
            self._refuse(opening, error)

    def _saved(self, opening: _Opening, session: Session[Conversation], saved: Future[bool]) -> None:
        """The session is open, and its journal is stored, or is not."""
        desk, durable = self._desk, succeeded(saved)
        del self._openings[session.id]
        waiting = opening.waiting
        if not waiting:  # nobody knows the id
            if session.id in desk.table:
                desk.forget(session, "closed")
            desk.let_go(opening.entries[0])
        for entry in waiting:
            tell_open(entry, session, session.story, durable if desk.journal.durable else None)
        if opening.request.resume is not None:
            self._retire(opening, stored=durable)
        conversation = session.conversation
        counts = f"tokens={len(conversation.token_ids)} turns={conversation.turns} open={len(desk.table)}"
        log.info("session_open session=%s %s", short_id(session.id), counts)

    def _retire(self, opening: _Opening, stored: bool) -> None:
        """Close the session that the new one carries on; its journal stays where there is no other."""
        if opening.old is not None and opening.old.id in self._desk.table:
            self._desk.forget(opening.old, "closed", stored)
            self._desk.sequences.end(opening.old.id)
        elif stored:
            self._desk.journal.forget(opening.request.resume)

    def _refuse(self, opening: _Opening, error: Exception) -> None:
        """Give the place back, and tell whoever is still there."""
        del self._openings[opening.session_id]
        self._desk.table.release(opening.session_id)
        if opening.old is not None:
            opening.old.closing = False
        for entry in opening.waiting:
            refuse(self._desk, entry, error)
        if opening.entries[0].gone:
            self._desk.let_go(opening.entries[0])


def digest_of(session_token: str | None) -> str | None:
    """What is kept of a caller's token."""
    return None if session_token is None else hashlib.sha256(session_token.encode()).hexdigest()


def succeeded(saved: Future[bool]) -> bool:
    """Whether a journal is stored; one that broke is not."""
    return not saved.cancelled() and saved.exception() is None and saved.result()
