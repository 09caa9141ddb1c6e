"""Write, load and remove sessions in one store, and remember how much of each session is stored."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future
from enum import Enum
from functools import partial

from ..chat.transcript import BlobPool, short_id
from . import owners
from .appender import Appender, Records
from .breaker import CircuitBreaker
from .encoding import Damaged, Owner
from .executor import KeyedExecutor
from .owners import NotOwner, Removal
from .reader import StoreReader
from .stores import Store, StoreError

log = logging.getLogger(__name__)

# A turn may outlast its session's expiry and is still written. Longer than the longest turn.
KEPT_PAST_EXPIRY_S = 120
_REMOVALS_KEPT = 10_000


class SaveOutcome(Enum):
    """What came of a save. STORED: every store has every record. NOT_OWNER: another instance owns the session."""

    STORED = "stored"
    FAILED = "failed"
    NOT_OWNER = "not owner"


class StoreWriter:
    """The sessions of one store. Methods that take a key block: run them on `executor`, under that key."""

    def __init__(self, store: Store, blobs: BlobPool, clock: Callable[[], float], pool: Executor | None = None) -> None:
        """`clock`: seconds, for the pauses after a failure. `pool` as in `KeyedExecutor`."""
        self.store = store
        self.executor = KeyedExecutor(f"journal-{store.name}", pool)
        self.reader = StoreReader(store, blobs)
        self._writes = CircuitBreaker(store, "write", "turns are not durable", clock)
        self._removals = CircuitBreaker(store, "remove", "it is tried again", clock)
        self._appenders: dict[str, Appender] = {}
        self._unremoved: dict[str, Owner] = {}  # removals to retry, oldest first

    @property
    def failures_total(self) -> int:
        """Writes and removals that failed, or that an outage kept from being tried."""
        return self._writes.failures_total + self._removals.failures_total

    @property
    def tracked(self) -> int:
        """Sessions that occupy memory here."""
        return len(self._appenders.keys() | self._unremoved.keys())

    def check(self, work: Callable[[], None], removal: bool = False) -> bool:
        """Do some other write or removal of the store. Return whether it succeeded; an outage is logged."""
        return _succeeds(partial((self._removals if removal else self._writes).run, work))

    def write(self, key: str, records: Records, owner: Owner) -> SaveOutcome:
        """Write the records that are not stored yet."""
        try:
            return self._writes.run(partial(self._write, key, records, owner))
        except StoreError:
            return SaveOutcome.FAILED

    def mark(self, key: str, owner: Owner, busy_until_s: float) -> SaveOutcome:
        """Note in the owner record until when a turn may run; 0: none runs.

        Its success or failure is not that of a write: a session without an owner record needs no write. A store whose
        writes fail is not asked.
        """
        if self._writes.is_failing:
            return SaveOutcome.FAILED
        try:
            self._mark(key, owner, busy_until_s)
        except StoreError:
            return SaveOutcome.FAILED
        except NotOwner:
            return SaveOutcome.NOT_OWNER
        return SaveOutcome.STORED

    def remove(self, key: str, owner: Owner) -> Removal:
        """Remove the session if `owner` owns it. A removal that fails is retried by `retry_removals`."""
        self._appenders.pop(key, None)
        self._unremoved.pop(key, None)
        try:
            return self._removals.run(partial(self._remove, key, owner))
        except StoreError:
            self._unremoved[key] = owner
        if len(self._unremoved) > _REMOVALS_KEPT:
            self._unremoved.pop(next(iter(self._unremoved)), None)
        return Removal.FAILED

    def discard(self, key: str) -> bool:
        """Remove an expired session of any owner. Return whether that succeeded."""
        self._appenders.pop(key, None)
        return _succeeds(partial(self._removals.run, partial(self.store.remove, key)))

    def retry_removals(self) -> list[Future[Removal]]:
        """Retry the removals that failed. Returns at once."""
        waiting = list(self._unremoved.items())
        return [self.executor.run(key, partial(self.remove, key, owner)) for key, owner in waiting]

    def drop_expired(self, now_s: float) -> None:
        """Release the memory of sessions that expired and were not removed by this process."""
        for key, appender in list(self._appenders.items()):
            if now_s >= appender.expires_at_s + KEPT_PAST_EXPIRY_S:
                self._appenders.pop(key, None)

    def is_forgotten(self, key: str) -> bool:
        """Return whether the session was removed, although a failure may have left its records."""
        return key in self._unremoved

    def adopt(self, key: str, owner: Owner, expires_at_s: float, checksums: list[str], loaded: bool) -> None:
        """Note how much of a claimed transcript this store has: all of it if it was `loaded` from here.

        `checksums` are those of the transcript's records; they are empty if the copy here is damaged. What is missing
        or differs is written with the next save. Raise `NotOwner`, `Damaged`, `StoreError`.
        """
        appender = Appender(self.store, self.reader, key, owner, expires_at_s)
        appender.adopt(checksums, loaded)
        self._appenders[key] = appender

    def _write(self, key: str, records: Records, owner: Owner) -> SaveOutcome:
        opening = records[0]
        try:
            appender = self._appenders.get(key)
            if appender is None or appender.owner != owner:
                owners.take_empty(self.store, key, owner)
                appender = Appender(self.store, self.reader, key, owner, opening.expires_at_s)
                self._appenders[key] = appender
            appender.write(records)
        except NotOwner:
            self._appenders.pop(key, None)
            log.warning("journal_not_owner store=%s session=%s", self.store.name, short_id(opening.session_id))
            return SaveOutcome.NOT_OWNER
        except Damaged as error:
            raise StoreError(f"can't write: {error}") from error
        return SaveOutcome.STORED

    def _mark(self, key: str, owner: Owner, busy_until_s: float) -> None:
        if busy_until_s:
            self.store.announce(owner.instance)
        try:
            owners.mark(self.store, key, owner, busy_until_s)
        except Damaged as error:
            raise StoreError(f"can't mark: {error}") from error

    def _remove(self, key: str, owner: Owner) -> Removal:
        try:
            return owners.remove(self.store, key, owner)
        except Damaged as error:
            raise StoreError(f"can't remove: {error}") from error


def _succeeds(work: Callable[[], object]) -> bool:
    try:
        work()
    except StoreError:
        return False
    return True
