"""Owns the journal: writes what rebuilds a session (`records`) to every store that is configured, and finds it again.

Beside its callers: each store has threads of its own, so neither a slow disk nor S3 holds the pump up. Of one session
all is done in the order in which it was asked for. Nothing is kept here but what is still being written. Must not know
torch, TorchServe, the pump or the engine.

For operators. Without `journal_dir` and `journal_s3_prefix` sessions live in the worker's memory only. Stored are, per
open session, the pictures as they were sent, the token ids, the answers' texts and the session id; nothing of it is
encrypted here.

- Directory: files 0600 in directories 0700, of the server's user; put it on an encrypted volume. One fsynced file per
  turn, in place before the answer is acknowledged; removed at close and soon after expiry.
- S3: switch on default encryption with a KMS key (SSE-KMS) for the bucket. The role needs s3:PutObject, s3:GetObject,
  s3:DeleteObject on the prefix and s3:ListBucket on the bucket, kms:GenerateDataKey and kms:Decrypt on the key. A
  lifecycle rule of one day on the prefix removes what instances that died have left; keep versioning off, or expire old
  versions too.
- Bytes per session: 4/3 of its pictures + about 6 per token + 1 to 6 per character of its answers + 500 per turn; on
  disk each turn is rounded up to the file system's block.
- A store that fails costs no chat: one warning per outage, `failures_total` counts, and `save` says False. What is
  missing is written with the session's next turn.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..chat.transcript import Blobs, OpenRecord, Transcript, TurnRecord, short_id
from ..config import ConfigError
from .encoding import Damaged, checksum_of, encode, key_of, read_story
from .executor import KeyedExecutor
from .stores import DirectoryStore, S3Store, Store, StoreError

log = logging.getLogger(__name__)

# A turn may run past its session's expiry, and is still written; longer than the longest turn.
_KEPT_PAST_EXPIRY_S = 120
# No session lives longer, so what can't be read is of no use after it.
_UNREADABLE_KEPT_S = 86_400
_REMOVALS_KEPT = 10_000
_UNSURE: tuple[int, str] = (-1, "")


@dataclass(frozen=True)
class StoredSession:
    """Of a session in the directory what its place at the table needs; `Journal.read` has the rest."""

    session_id: str
    expires_at_s: float
    token_digest: str | None
    retry_key: str | None


@dataclass(frozen=True)
class Recovered:
    """What a start finds in the directory: sessions to carry on, and those whose time passed meanwhile."""

    live: list[StoredSession] = field(default_factory=list)
    expired: list[StoredSession] = field(default_factory=list)


def open_journal(journal_dir: str | None, journal_s3_prefix: str | None) -> Journal:
    """The journal that is configured. Raises `ConfigError`, with every problem named, where none can work.

    A directory that can't be written at the moment is a warning: chats go on, and it is tried again with every turn.
    """
    problems: list[str] = []
    stores: list[Store] = []
    if journal_dir:
        if not Path(journal_dir).is_absolute():
            problems.append(f"llava.journal_dir is {journal_dir!r}; an absolute path is wanted")
        stores.append(DirectoryStore(journal_dir))
    if journal_s3_prefix:
        try:
            stores.append(S3Store(journal_s3_prefix))
        except Exception as error:  # boto3 has many ways to dislike its settings
            problems.append(f"llava.journal_s3_prefix is {journal_s3_prefix!r}; {error}")
    if problems:
        raise ConfigError(problems)
    journal = Journal(stores)
    journal.check()
    return journal


class Journal:
    """Stories of sessions, in every store; with no store, a journal that has nothing to do. Thread-safe."""

    def __init__(self, stores: Sequence[Store] = (), clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds, for the pauses after a failure."""
        self.blobs = Blobs()
        self._keepers = [_StoreWriter(store, self.blobs, clock) for store in stores]

    @property
    def durable(self) -> bool:
        """Whether anything outlives this process."""
        return bool(self._keepers)

    @property
    def failures_total(self) -> int:
        """Writes and removals that failed or were not tried because of an outage."""
        return sum(keeper.failures_total for keeper in self._keepers)

    def check(self) -> None:
        """Warn at once of a directory that can't be written."""
        for keeper in self._keepers:
            keeper.check()

    def save(self, story: Transcript) -> Future[bool]:
        """Write what of the story is not yet written. True: all of it, as it is now, lies safely in every store.

        Returns at once. False costs nothing but that: the next save of the session catches up. Never after `forget`.
        """
        records = story.records()
        return _all([keeper.save(records) for keeper in self._keepers])

    def forget(self, session_id: str) -> Future[bool]:
        """Remove the session everywhere, behind all that is still being written of it; `sweep` retries what fails."""
        return _all([keeper.forget(session_id) for keeper in self._keepers])

    def read(self, session_id: str, now_s: float) -> Transcript | None:
        """The session's story, verified whole, from the store that knows most of it; behind its pending saves. Blocks.

        None: unknown, forgotten, expired or damaged.
        """
        found = [(keeper.count(session_id).result(), keeper) for keeper in self._keepers]
        for count, keeper in sorted(found, key=lambda pair: -pair[0]):
            loaded = keeper.load(session_id).result() if count else None
            if loaded is not None:
                story, digests = loaded
                if now_s >= story.open.expires_at_s:
                    return None
                for other in self._keepers:
                    other.adopt(session_id, digests).result()
                return story
        return None

    def recover(self, now_s: float) -> Recovered:
        """At start: the sessions in the directory, each verified whole; damaged ones are logged and left out. Blocks.

        S3 isn't looked through: it holds other instances' sessions too.
        """
        heads = [head for keeper in self._keepers for head in keeper.heads()]
        self.sweep(now_s).result()
        live = [head for head in heads if now_s < head.expires_at_s]
        return Recovered(live, [head for head in heads if head not in live])

    def sweep(self, now_s: float) -> Future[bool]:
        """Remove what has expired in the directory, whoever wrote it, and retry what could not be removed.

        Returns at once; call it about once a minute.
        """
        return _all([keeper.sweep(now_s) for keeper in self._keepers])

    def flush(self, timeout_s: float) -> bool:
        """Wait for all that was asked for so far; whether all of it is done."""
        pending = [future for keeper in self._keepers for future in keeper.pending()]
        return not wait(pending, timeout_s).not_done

    def close(self, timeout_s: float) -> bool:
        """As `flush`; then give up what is left, and end."""
        flushed = self.flush(timeout_s)
        for keeper in self._keepers:
            keeper.close()
        return flushed


class _StoreWriter:
    """One store, and what of each session is known to lie in it.

    `_written`: by key, how many records lie there and the last one's checksum; `_UNSURE` where something else
    may lie there, which has to go first. `_unremoved`: sessions that were forgotten and are still there.
    """

    def __init__(self, store: Store, blobs: Blobs, clock: Callable[[], float]) -> None:
        self._store = store
        self._blobs = blobs
        self._lanes = KeyedExecutor(f"journal-{store.name}")
        self._writes = _CircuitBreaker(store, "write", "turns are not durable", clock)
        self._removals = _CircuitBreaker(store, "remove", "it is tried again", clock)
        self._written: dict[str, tuple[int, str]] = {}
        self._unremoved: dict[str, None] = {}  # oldest first
        self._expiries: dict[str, float] = {}  # by key

    @property
    def failures_total(self) -> int:
        return self._writes.failures_total + self._removals.failures_total

    def save(self, records: tuple[OpenRecord | TurnRecord, ...]) -> Future[bool]:
        key = key_of(records[0].session_id)
        return self._lanes.run(key, partial(self._write, key, records))

    def forget(self, session_id: str) -> Future[bool]:
        key = key_of(session_id)
        return self._lanes.run(key, partial(self._forget, key))

    def count(self, session_id: str) -> Future[int]:
        """How many records of the session there are; 0 also where that can't be found out."""
        key = key_of(session_id)
        return self._lanes.run(key, partial(self._count, key, session_id))

    def load(self, session_id: str) -> Future[tuple[Transcript, list[str]] | None]:
        """The story and the checksums of its records; None, with a log line, where it can't be had."""
        key = key_of(session_id)
        return self._lanes.run(key, partial(self._load, key, short_id(session_id)))

    def adopt(self, session_id: str, digests: list[str]) -> Future[None]:
        """Find out how much of a story, told by its records' checksums, lies here, to go on behind it."""
        key = key_of(session_id)
        return self._lanes.run(key, partial(self._adopt, key, digests))

    def sweep(self, now_s: float) -> Future[bool]:
        return self._lanes.run("sweep", partial(self._sweep, now_s))

    def check(self) -> None:
        if isinstance(self._store, DirectoryStore):
            self._writes.done(self._store.check)

    def heads(self) -> list[StoredSession]:
        if not isinstance(self._store, DirectoryStore):
            return []
        try:
            keys = self._store.keys()
        except StoreError as error:
            self._tell_unreadable("all", error)
            return []
        loaded = (self._load(key, f"key:{key[:8]}") for key in keys)
        opens = [story.open for story, _ in filter(None, loaded)]
        return [StoredSession(one.session_id, one.expires_at_s, one.token_digest, one.retry_key) for one in opens]

    def pending(self) -> list[Future]:
        return self._lanes.pending()

    def close(self) -> None:
        self._lanes.close()

    # --- in the store's threads, one after the other for each session ---

    def _write(self, key: str, records: tuple[OpenRecord | TurnRecord, ...]) -> bool:
        session_id = records[0].session_id
        if self._written.get(key) == _UNSURE:
            if not self._removals.done(partial(self._store.remove, key)):
                return False
            del self._written[key]
        self._expiries[key] = records[0].expires_at_s
        count, digest = self._written.get(key, (0, ""))
        for number, record in enumerate(records[count:], count):
            data, digest = encode(record, session_id, number, digest)
            if not self._writes.done(partial(self._store.put, key, number, data)):
                return False
            self._written[key] = (number + 1, digest)
        return True

    def _forget(self, key: str) -> bool:
        self._written.pop(key, None)
        self._expiries.pop(key, None)
        self._unremoved.pop(key, None)
        if self._removals.done(partial(self._store.remove, key)):
            return True
        self._unremoved[key] = None
        if len(self._unremoved) > _REMOVALS_KEPT:
            self._unremoved.pop(next(iter(self._unremoved)), None)
        return False

    def _count(self, key: str, session_id: str) -> int:
        if key in self._unremoved:
            return 0
        try:
            return len(self._store.numbers(key))
        except StoreError as error:
            self._tell_unreadable(short_id(session_id), error)
            return 0

    def _load(self, key: str, shown: str) -> tuple[Transcript, list[str]] | None:
        try:
            numbers = self._store.numbers(key)
            if numbers != list(range(len(numbers))):
                raise Damaged("a record is missing")
            return read_story(key, (self._store.get(key, number) for number in numbers), self._blobs.of)
        except Damaged as error:
            self._written[key] = _UNSURE
            log.warning("journal_damaged store=%s session=%s reason=%s", self._store.name, shown, error)
        except StoreError as error:
            self._tell_unreadable(shown, error)
        return None

    def _tell_unreadable(self, shown: str, error: StoreError) -> None:
        log.warning("journal_unreadable store=%s session=%s reason=%s", self._store.name, shown, error)

    def _adopt(self, key: str, digests: list[str]) -> None:
        if self._written.get(key) == _UNSURE:
            return
        try:
            count = len(self._store.numbers(key))
            known = count == 0 or (
                count <= len(digests) and checksum_of(self._store.get(key, count - 1)) == digests[count - 1]
            )
        except StoreError:
            known = False
        if not known:
            self._written[key] = _UNSURE
        elif count:
            self._written[key] = (count, digests[count - 1])

    def _sweep(self, now_s: float) -> bool:
        again = [self._lanes.run(key, partial(self._forget, key)) for key in list(self._unremoved)]
        done = True
        if isinstance(self._store, DirectoryStore):
            done = self._removals.done(partial(self._store.tidy, now_s)) and self._remove_expired(now_s)
        return done and not again

    def _remove_expired(self, now_s: float) -> bool:
        try:
            keys = self._store.keys()
        except StoreError:
            return False
        for key in self._expiries.keys() - set(keys):
            self._expiries.pop(key, None)
        for key in keys:
            if now_s >= self._expiry(key) + _KEPT_PAST_EXPIRY_S:
                self._lanes.run(key, partial(self._removals.done, partial(self._store.remove, key)))
        return True

    def _expiry(self, key: str) -> float:
        """When the session's time is up; read once, where another process has written it."""
        known = self._expiries.get(key)
        if known is not None:
            return known
        try:
            story, _ = read_story(key, [self._store.get(key, 0)], self._blobs.of)
            self._expiries[key] = story.open.expires_at_s
            return story.open.expires_at_s
        except (Damaged, StoreError):
            pass
        try:
            return self._store.changed_at_s(key) + _UNREADABLE_KEPT_S
        except StoreError:
            return math.inf  # another worker has just removed it


class _CircuitBreaker:
    """Keeps account of one kind of work in a store: one warning per outage, and a pause before the next try."""

    def __init__(self, store: Store, what: str, outcome: str, clock: Callable[[], float]) -> None:
        """`what` is done and its `outcome` where it fails: words of the log."""
        self._store = store
        self._what = what
        self._outcome = outcome
        self._clock = clock
        self._lock = threading.Lock()
        self._failing = False
        self._next_try_s = 0.0
        self.failures_total = 0

    def done(self, work: Callable[[], object]) -> bool:
        """Do the work, unless the store just failed; whether it was done."""
        with self._lock:
            if self._failing and self._clock() < self._next_try_s:
                self.failures_total += 1
                return False
            self._next_try_s = self._clock() + self._store.pause_s  # meanwhile others don't try too, while it fails
        try:
            work()
        except StoreError as error:
            self._note(error)
            return False
        self._note(None)
        return True

    def _note(self, error: StoreError | None) -> None:
        with self._lock:
            was_failing, self._failing = self._failing, error is not None
            self.failures_total += self._failing
            if self._failing:
                self._next_try_s = self._clock() + self._store.pause_s
        facts = f"store={self._store.name} work={self._what}"
        if error is not None and not was_failing:
            log.warning("journal_failing %s reason=%s; chats go on, %s", facts, error, self._outcome)
        elif error is None and was_failing:
            log.info("journal_works_again %s", facts)


def _all(futures: list[Future[bool]]) -> Future[bool]:
    """Whether all of them come true; a failed or cancelled one does not."""
    whole: Future[bool] = Future()
    whole.set_running_or_notify_cancel()
    left = len(futures)
    lock = threading.Lock()

    def one_done(_: Future[bool] | None = None) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        whole.set_result(all(not f.cancelled() and f.exception() is None and f.result() for f in futures))

    if not futures:
        whole.set_result(True)
    for future in futures:
        future.add_done_callback(one_done)
    return whole
