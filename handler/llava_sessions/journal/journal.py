"""Store the transcript of each session in every configured store, and load it again.

Each store has its own threads, so that neither a slow disk nor S3 blocks a caller; the work on one session is done in
order. A failing store does not end a session: the failure is logged and counted, and the next save of the session
writes the missing records. docs/operations.md describes sizes, permissions and encryption.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..chat.transcript import BlobPool, Transcript
from ..config_file import ConfigError
from ..errors import describe
from .appender import Records
from .claims import (
    AlreadyClaimed,
    Claimant,
    JournalError,
    JournalUnavailable,
    NotFound,
    OwnerIsAnswering,
    claim,
    verify,
)
from .directory import SessionDirectory, StoredSession
from .encoding import Owner, key_of
from .futures import combine, done, result_of
from .known import KnownOwners, RunningClaims
from .owners import NO_OWNER, Removal
from .stores import DirectoryStore, S3Store, Store
from .writer import SaveOutcome, StoreWriter

__all__ = [
    "AlreadyClaimed",
    "Journal",
    "JournalError",
    "JournalUnavailable",
    "NotFound",
    "OwnerIsAnswering",
    "Recovered",
    "Removal",
    "SaveOutcome",
    "StoredSession",
    "open_journal",
]

R = TypeVar("R")


@dataclass(frozen=True)
class Recovered:
    """The sessions in the directory at start: those to continue, and those that expired meanwhile.

    `complete` is False if a session could not be read now, so that `recover` is to be called again.
    """

    live: list[StoredSession] = field(default_factory=list)
    expired: list[StoredSession] = field(default_factory=list)
    complete: bool = True


def open_journal(journal_dir: str | None, journal_s3_prefix: str | None, held_bytes: int | None = None) -> Journal:
    """Return the configured journal. `held_bytes`: as in `Journal`. Raise `ConfigError` with every problem.

    A directory that can't be written now is only a warning: it is tried again with every turn.
    """
    problems: list[str] = []
    stores: list[Store] = []
    if journal_dir:
        if not Path(journal_dir).is_absolute():
            problems.append(f"`llava.journal_dir` must be an absolute path, got {describe(journal_dir)}")
        stores.append(DirectoryStore(journal_dir))
    if journal_s3_prefix:
        try:
            stores.append(S3Store(journal_s3_prefix))
        except ValueError:
            got = describe(journal_s3_prefix)
            problems.append(f"`llava.journal_s3_prefix` must be s3://<bucket>/<prefix>, got {got}")
        except Exception as error:  # boto3 raises many types for bad settings
            problems.append(f"`llava.journal_s3_prefix` needs usable AWS settings: {error}")
    if problems:
        raise ConfigError(problems)
    journal = Journal(stores, held_bytes=held_bytes)
    for directory in journal.directories:
        directory.check()
    return journal


class Journal:
    """The transcripts of sessions in every store. Without stores it does nothing. Thread-safe.

    `directories`: those of the stores that are directories.

    Futures don't raise. A session is written only by its owner (owners.py): the process that opened or claimed it.
    """

    def __init__(
        self,
        stores: Sequence[Store] = (),
        clock: Callable[[], float] = time.monotonic,
        pool: Executor | None = None,
        held_bytes: int | None = None,
    ) -> None:
        """`clock`: seconds, for the pauses after a failure. `pool` replaces the stores' threads, for tests.

        `held_bytes`: of all sessions' pictures in memory; None for no limit.
        """
        self.blobs = BlobPool(held_bytes)
        self._instance = secrets.token_hex(16)
        self._owners = KnownOwners()
        self._claims = RunningClaims()
        self._writers: list[StoreWriter] = []
        self.directories: list[SessionDirectory] = []
        for store in stores:
            writer = StoreWriter(store, self.blobs, clock, pool)
            self._writers.append(writer)
            if isinstance(store, DirectoryStore):
                self.directories.append(SessionDirectory(store, writer))

    @property
    def durable(self) -> bool:
        """Whether sessions outlive this process."""
        return bool(self._writers)

    @property
    def failures_total(self) -> int:
        """Writes and removals that failed, or that an outage kept from being tried."""
        return sum(writer.failures_total for writer in self._writers)

    @property
    def tracked_sessions(self) -> int:
        """Sessions that occupy memory in the journal."""
        return max([len(self._owners), *(writer.tracked for writer in self._writers)])

    def save(self, transcript: Transcript) -> Future[SaveOutcome]:
        """Write the records of the transcript, as it is now, that are not stored yet. Returns at once.

        FAILED has no other effect: the next save of the session writes them. After NOT_OWNER the session belongs to
        another instance, or is removed; close it locally. Don't save a session after `forget` or `retire`.
        """
        if not self._writers:
            return done(SaveOutcome.STORED)
        records: Records = (transcript.opening, *transcript.log)
        key = key_of(transcript.opening.session_id)
        owner = self._owners.own(key, self._instance, transcript.opening.expires_at_s)

        saves = [writer.executor.run(key, partial(writer.write, key, records, owner)) for writer in self._writers]
        return combine(saves, SaveOutcome.FAILED, partial(self._owners.merged, key, owner))

    def mark(self, session_id: str, busy_until_s: float) -> Future[SaveOutcome]:
        """Note that a turn of the session runs here until then at most, or that none runs (0). Returns at once.

        Claims with `waits` leave the session to this process until then. NOT_OWNER: another instance owns the session,
        or it is removed. A session that this process does not own needs no mark: STORED.
        """
        key = key_of(session_id)
        owner = self._owners.known(key, self._instance)
        if owner is None:
            return done(SaveOutcome.STORED)
        marks = [writer.executor.run(key, partial(writer.mark, key, owner, busy_until_s)) for writer in self._writers]
        return combine(marks, SaveOutcome.FAILED, partial(self._owners.merged, key, owner))

    def claim(self, session_id: str, now_s: float, token_digest: str | None, waits: bool = False) -> Transcript:
        """Become the owner of a stored session and return it, verified, behind its pending saves. Blocks.

        The token is checked first. Raise `NotFound`, `JournalUnavailable`, `AlreadyClaimed`, and with `waits`
        `OwnerIsAnswering` while a turn of another instance runs.
        """
        key = key_of(session_id)
        claimant = Claimant(self._instance, now_s, token_digest, waits)
        with self._claims.running(key):
            claimed = claim(self._writers, session_id, claimant)
            self._owners.set(key, claimed.owner, claimed.transcript.opening.expires_at_s)
        return claimed.transcript

    def verify(self, session_id: str, now_s: float, token_digest: str | None) -> None:
        """Return if a session is stored for this token. Blocks. Raise `NotFound`, `JournalUnavailable`."""
        verify(self._writers, session_id, Claimant(self._instance, now_s, token_digest))

    def retire(self, session_id: str) -> Future[bool]:
        """Remove a session that a new one continues, behind its pending saves.

        False: another instance owns it, or it was retired before. True: this process owned it, and it is removed or
        will be (`sweep` retries). A store that fails at this moment counts as removed, so that the session is not lost.
        """
        if not self._writers:
            return done(True)
        owner = self._owners.pop(key_of(session_id))
        if owner is None:
            return done(False)
        return self._remove(session_id, owner, lambda removals: Removal.NOT_OWNER not in removals)

    def forget(self, session_id: str) -> Future[Removal]:
        """Remove a session behind its pending saves, if no other instance has claimed it. Returns at once.

        FAILED: a store failed; `sweep` retries.
        """
        key = key_of(session_id)
        removed: Future[Removal] = Future()

        def merge(removals: list[Removal]) -> Removal:
            if Removal.NOT_OWNER in removals:
                return Removal.NOT_OWNER
            return Removal.FAILED if Removal.FAILED in removals else Removal.REMOVED

        def remove() -> None:
            owner = self._owners.pop(key) or NO_OWNER
            done = self._remove(session_id, owner, merge)
            done.add_done_callback(lambda one: removed.set_result(result_of(one, Removal.FAILED)))

        # A claim that runs changes the owner. The removal must be the new owner's, or the session would come back.
        self._claims.when_idle(key, remove)
        return removed

    def recover(self, now_s: float) -> Recovered:
        """Return the sessions in the directory, at start; damaged ones are logged and left out. Blocks.

        S3 isn't searched: it holds the sessions of other instances too.
        """
        results = [directory.recover() for directory in self.directories]
        found = [one for sessions, _ in results for one in sessions]
        self.sweep(now_s).result()
        live = [(stored, owner) for stored, owner in found if now_s < stored.expires_at_s]
        expired = [stored for stored, _ in found if now_s >= stored.expires_at_s]
        for stored, owner in live:
            self._owners.set(key_of(stored.session_id), owner, stored.expires_at_s)
        return Recovered([stored for stored, _ in live], expired, all(complete for _, complete in results))

    def sweep(self, now_s: float) -> Future[bool]:
        """Remove expired sessions of any owner from the directory, and retry failed removals.

        Returns at once; call it about once a minute. False: something is left to do.
        """
        self._owners.drop_expired(now_s)
        for writer in self._writers:
            writer.drop_expired(now_s)
        retries = [retry for writer in self._writers for retry in writer.retry_removals()]
        sweeps = [directory.sweep(now_s) for directory in self.directories]
        return combine(sweeps, False, lambda swept: all(swept) and not retries)

    def flush(self, timeout_s: float) -> bool:
        """Wait for all pending work. Return whether all of it is done."""
        pending = [future for writer in self._writers for future in writer.executor.pending()]
        return not wait(pending, timeout_s).not_done

    def close(self, timeout_s: float) -> bool:
        """Do as `flush`, then cancel the work that has not begun."""
        flushed = self.flush(timeout_s)
        for writer in self._writers:
            writer.executor.close()
        return flushed

    def _remove(self, session_id: str, owner: Owner, merge: Callable[[list[Removal]], R]) -> Future[R]:
        key = key_of(session_id)
        removals = [writer.executor.run(key, partial(writer.remove, key, owner)) for writer in self._writers]
        return combine(removals, Removal.FAILED, merge)
