"""Store the transcript of each session in every configured store, and load it again.

Each store has its own threads, so that neither a slow disk nor S3 blocks a caller; the work on one session is done in
order. A failing store does not end a session: the failure is logged and counted, and the next save of the session
writes the missing records. docs/operations.md describes sizes, permissions and encryption.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..chat.transcript import BlobPool, Transcript
from ..config_file import ConfigError
from ..errors import describe
from .appender import Records
from .claims import AlreadyClaimed, JournalError, JournalUnavailable, NotFound, claim
from .directory import SessionDirectory, StoredSession
from .encoding import Owner, key_of
from .owners import FIRST_EPOCH, NO_OWNER, Removal
from .stores import DirectoryStore, S3Store, Store
from .writer import KEPT_PAST_EXPIRY_S, SaveOutcome, StoreWriter

__all__ = [
    "AlreadyClaimed",
    "Journal",
    "JournalError",
    "JournalUnavailable",
    "NotFound",
    "Recovered",
    "SaveOutcome",
    "StoredSession",
    "open_journal",
]

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Recovered:
    """The sessions in the directory at start: those to continue, and those that expired meanwhile.

    `complete` is False if a session could not be read now, so that `recover` is to be called again.
    """

    live: list[StoredSession] = field(default_factory=list)
    expired: list[StoredSession] = field(default_factory=list)
    complete: bool = True


class _Owners:
    """The owner of each session, as last seen by this process: itself, or after `recover` another. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Owner, float]] = {}  # by key: the owner, and when the session expires

    def __len__(self) -> int:
        return len(self._known)

    def set(self, key: str, owner: Owner, expires_at_s: float) -> None:
        """Note an owner, unless a later epoch is known."""
        with self._lock:
            known = self._known.get(key)
            if known is None or known[0].epoch < owner.epoch:
                self._known[key] = (owner, expires_at_s)

    def own(self, key: str, instance: str, expires_at_s: float) -> Owner:
        """Return as what `instance` owns the session: since its open or its claim."""
        with self._lock:
            known = self._known.get(key)
            if known is None or known[0].instance != instance:
                known = self._known[key] = (Owner(FIRST_EPOCH, instance), expires_at_s)
            return known[0]

    def pop(self, key: str, owner: Owner | None = None) -> Owner | None:
        """Remove and return the owner; only if it is `owner`, if one is given."""
        with self._lock:
            known = self._known.get(key)
            if known is None or owner not in (None, known[0]):
                return None
            del self._known[key]
            return known[0]

    def drop_expired(self, now_s: float) -> None:
        """Forget the sessions that expired."""
        with self._lock:
            for key, (_, expires_at_s) in list(self._known.items()):
                if now_s >= expires_at_s + KEPT_PAST_EXPIRY_S:
                    del self._known[key]


class _RunningClaims:
    """Counts the running claims of each session, so that a removal can wait for them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, int] = {}
        self._waiting: dict[str, list[Callable[[], None]]] = {}

    @contextlib.contextmanager
    def running(self, key: str) -> Iterator[None]:
        """Count a claim inside the block."""
        with self._lock:
            self._running[key] = self._running.get(key, 0) + 1
        try:
            yield
        finally:
            waiting = []
            with self._lock:
                self._running[key] -= 1
                if not self._running[key]:
                    del self._running[key]
                    waiting = self._waiting.pop(key, [])
            for work in waiting:
                work()

    def when_idle(self, key: str, work: Callable[[], None]) -> None:
        """Run `work` at once, or after the last running claim of the session."""
        with self._lock:
            if key in self._running:
                self._waiting.setdefault(key, []).append(work)
                return
        work()


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
    journal.check()
    return journal


class Journal:
    """The transcripts of sessions in every store. Without stores it does nothing. Thread-safe.

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
        self._owners = _Owners()
        self._claims = _RunningClaims()
        self._writers: list[StoreWriter] = []
        self._directories: list[SessionDirectory] = []
        for store in stores:
            writer = StoreWriter(store, self.blobs, clock, pool)
            self._writers.append(writer)
            if isinstance(store, DirectoryStore):
                self._directories.append(SessionDirectory(store, writer))

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

    @property
    def pending(self) -> list[Future[Any]]:
        """Work that is not done."""
        return [future for writer in self._writers for future in writer.executor.pending()]

    def check(self) -> None:
        """Log a warning if the directory can't be written."""
        for directory in self._directories:
            directory.check()

    def save(self, transcript: Transcript) -> Future[SaveOutcome]:
        """Write the records of the transcript, as it is now, that are not stored yet. Returns at once.

        FAILED has no other effect: the next save of the session writes them. After NOT_OWNER the session belongs to
        another instance, or is removed; close it locally. Don't save a session after `forget` or `retire`.
        """
        if not self._writers:
            return _done(SaveOutcome.STORED)
        records: Records = (transcript.opening, *transcript.log)
        key = key_of(transcript.opening.session_id)
        owner = self._owners.own(key, self._instance, transcript.opening.expires_at_s)

        def merge(outcomes: list[SaveOutcome]) -> SaveOutcome:
            if SaveOutcome.NOT_OWNER not in outcomes:
                return SaveOutcome.FAILED if SaveOutcome.FAILED in outcomes else SaveOutcome.STORED
            self._owners.pop(key, owner)
            return SaveOutcome.NOT_OWNER

        saves = [writer.executor.run(key, partial(writer.write, key, records, owner)) for writer in self._writers]
        return _combine(saves, SaveOutcome.FAILED, merge)

    def claim(self, session_id: str, now_s: float, token_digest: str | None) -> Transcript:
        """Become the owner of a stored session and return it, verified, behind its pending saves. Blocks.

        The token is checked first. Raise `NotFound`, `JournalUnavailable`, `AlreadyClaimed`.
        """
        key = key_of(session_id)
        with self._claims.running(key):
            claimed = claim(self._writers, session_id, now_s, token_digest, self._instance)
            self._owners.set(key, claimed.owner, claimed.transcript.opening.expires_at_s)
        return claimed.transcript

    def retire(self, session_id: str) -> Future[bool]:
        """Remove a session that a new one continues, behind its pending saves.

        False: another instance owns it, or it was retired before. True: this process owned it, and it is removed or
        will be (`sweep` retries). A store that fails at this moment counts as removed, so that the session is not lost.
        """
        if not self._writers:
            return _done(True)
        owner = self._owners.pop(key_of(session_id))
        if owner is None:
            return _done(False)
        return self._remove(session_id, owner, lambda removals: Removal.NOT_OWNER not in removals)

    def forget(self, session_id: str) -> Future[bool]:
        """Remove a session behind its pending saves, if no other instance has claimed it. Returns at once.

        False: a store failed; `sweep` retries.
        """
        key = key_of(session_id)
        removed: Future[bool] = Future()

        def remove() -> None:
            owner = self._owners.pop(key) or NO_OWNER
            done = self._remove(session_id, owner, lambda removals: Removal.FAILED not in removals)
            done.add_done_callback(lambda one: removed.set_result(not one.cancelled() and one.result()))

        # A claim that runs changes the owner. The removal must be the new owner's, or the session would come back.
        self._claims.when_idle(key, remove)
        return removed

    def recover(self, now_s: float) -> Recovered:
        """Return the sessions in the directory, at start; damaged ones are logged and left out. Blocks.

        S3 isn't searched: it holds the sessions of other instances too.
        """
        results = [directory.recover() for directory in self._directories]
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
        sweeps = [directory.sweep(now_s) for directory in self._directories]
        return _combine(sweeps, False, lambda swept: all(swept) and not retries)

    def flush(self, timeout_s: float) -> bool:
        """Wait for all pending work. Return whether all of it is done."""
        return not wait(self.pending, timeout_s).not_done

    def close(self, timeout_s: float) -> bool:
        """Do as `flush`, then cancel the work that has not begun."""
        flushed = self.flush(timeout_s)
        for writer in self._writers:
            writer.executor.close()
        return flushed

    def _remove(self, session_id: str, owner: Owner, merge: Callable[[list[Removal]], bool]) -> Future[bool]:
        key = key_of(session_id)
        removals = [writer.executor.run(key, partial(writer.remove, key, owner)) for writer in self._writers]
        return _combine(removals, Removal.FAILED, merge)


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def _combine(futures: list[Future[T]], failed: T, merge: Callable[[list[T]], R]) -> Future[R]:
    """Merge the results of all futures; a cancelled or broken one counts as `failed`."""
    if not futures:
        return _done(merge([]))
    combined: Future[R] = Future()
    combined.set_running_or_notify_cancel()
    lock = threading.Lock()
    left = len(futures)

    def one_done(_: Future[T]) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        combined.set_result(merge([_result(future, failed) for future in futures]))

    for future in futures:
        future.add_done_callback(one_done)
    return combined


def _result(future: Future[T], failed: T) -> T:
    if future.cancelled():
        return failed
    error = future.exception()
    if error is None:
        return future.result()
    log.error("journal_error", exc_info=error)
    return failed
