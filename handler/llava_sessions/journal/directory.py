"""Find the sessions of a journal directory at start, and remove the expired ones."""

from __future__ import annotations

import logging
import math
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from ..chat.transcript import OpenRecord
from . import owners
from .encoding import Damaged, Owner
from .stores import DirectoryStore, StoreError
from .writer import KEPT_PAST_EXPIRY_S, StoreWriter

log = logging.getLogger(__name__)

# No session lives longer, so nothing that can't be read is of use after it.
_UNREADABLE_KEPT_S = 86_400


@dataclass(frozen=True)
class StoredSession:
    """A session that is stored but not loaded: what the session table needs. `Journal.claim` returns the rest."""

    session_id: str
    expires_at_s: float
    token_digest: str | None
    retry_key: str | None


class SessionDirectory:
    """The directory behind a writer. Several workers may share it."""

    def __init__(self, store: DirectoryStore, writer: StoreWriter) -> None:
        self._store = store
        self._writer = writer
        self._expiries: dict[str, float] = {}  # by key

    def check(self) -> bool:
        """Return whether the directory can be written; log if not."""
        return self._writer.check(self._store.check)

    def recover(self) -> tuple[list[tuple[StoredSession, Owner]], bool]:
        """Return all sessions with their owners, and whether every session could be read. Blocks.

        A damaged session is logged and left out. A session whose turns can't be read now is returned, if its first
        record can be read.
        """
        try:
            keys = self._store.keys()
        except StoreError as error:
            log.warning("journal_unreadable store=%s session=all reason=%s", self._store.name, error)
            return [], False
        found = []
        complete = True
        for key in keys:
            try:
                session = self._recover(key)
            except StoreError:
                complete = False
                continue
            if session is not None:
                found.append(session)
        return found, complete

    def sweep(self, now_s: float) -> Future[bool]:
        """Remove the left-overs of killed processes, and expired sessions of any owner. Returns at once.

        False: the directory could not be searched. The removal of a session is not awaited.
        """
        return self._writer.executor.run("sweep", partial(self._sweep, now_s))

    def _sweep(self, now_s: float) -> bool:
        return self._writer.check(partial(self._store.tidy, now_s), removal=True) and self._remove_expired(now_s)

    def _recover(self, key: str) -> tuple[StoredSession, Owner] | None:
        """Return a session, or None if it is damaged or empty. Raise `StoreError` if it can't be read now."""
        reader = self._writer.reader
        shown = f"key:{key[:8]}"
        try:
            found = reader.find(key)
            if found is None or not found.records:
                return None
            opening = reader.load(key, found.owned).transcript.opening
            return _stored(opening), found.owned.owner
        except Damaged as error:
            log.warning("journal_damaged store=%s session=%s reason=%s", self._store.name, shown, error)
            return None
        except StoreError as error:
            log.warning("journal_unreadable store=%s session=%s reason=%s", self._store.name, shown, error)
        try:
            return _stored(reader.opening(key)), owners.read_owner(self._store, key).owner
        except Damaged:
            return None

    def _remove_expired(self, now_s: float) -> bool:
        try:
            keys = self._store.keys()
        except StoreError:
            return False
        for key in set(self._expiries) - set(keys):
            del self._expiries[key]
        for key in keys:
            if now_s >= self._expiry(key) + KEPT_PAST_EXPIRY_S:
                self._writer.executor.run(key, partial(self._writer.discard, key))
        return True

    def _expiry(self, key: str) -> float:
        """Return when the session expires. The first record is read once."""
        if key not in self._expiries:
            try:
                self._expiries[key] = self._writer.reader.opening(key).expires_at_s
            except (Damaged, StoreError):
                return self._expiry_of_unreadable(key)
        return self._expiries[key]

    def _expiry_of_unreadable(self, key: str) -> float:
        try:
            return self._store.changed_at_s(key) + _UNREADABLE_KEPT_S
        except StoreError:
            return math.inf  # another worker has just removed it


def _stored(opening: OpenRecord) -> StoredSession:
    return StoredSession(opening.session_id, opening.expires_at_s, opening.token_digest, opening.retry_key)
