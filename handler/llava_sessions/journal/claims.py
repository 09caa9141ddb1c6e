"""Claim a session: become its owner in every store that has it, and load it.

With two stores availability comes first. A store that can't be reached now is left out, since every durable turn is in
the other store too; only a turn that was answered with `durable` false can be missing. The next save writes to the
store that was left out, unless another instance has claimed the session there meanwhile.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from ..chat.transcript import OpenRecord, Transcript, short_id
from . import owners
from .encoding import Damaged, Owner, OwnerRecord, key_of
from .owners import Busy, NotOwner
from .reader import Found, Loaded
from .stores import Removed, StoreError
from .writer import StoreWriter

log = logging.getLogger(__name__)

T = TypeVar("T")


class JournalError(Exception):
    """A session could not be claimed."""


class NotFound(JournalError):
    """There is no such session for this caller: unknown, removed, expired, or another token's.

    `damaged`: the session exists but no copy can be trusted. Only then is it lost for good.
    """

    def __init__(self, damaged: bool = False) -> None:
        super().__init__("the session is damaged" if damaged else "the session is not in the journal")
        self.damaged = damaged


class JournalUnavailable(JournalError):
    """No store that may have the session can be read now."""

    def __init__(self) -> None:
        super().__init__("the journal can't be read now")


class AlreadyClaimed(JournalError):
    """Another instance claimed the session at the same time."""

    def __init__(self) -> None:
        super().__init__("another instance claimed the session")


class OwnerIsAnswering(JournalError):
    """A turn of the session runs on another instance, which keeps the session until it ends."""

    def __init__(self) -> None:
        super().__init__("another instance is answering the session")


@dataclass(frozen=True)
class Claimed:
    """A session that this process owns now."""

    transcript: Transcript
    owner: Owner


@dataclass(frozen=True)
class Claimant:
    """Who claims: the process, the time in seconds since the epoch, and the digest of the caller's session token.

    `waits`: raise `OwnerIsAnswering` while a turn of another instance runs.
    """

    instance: str
    now_s: float
    token_digest: str | None
    waits: bool = False

    def may_use(self, opening: OpenRecord) -> bool:
        """Return whether the session has not expired, and has this token."""
        has_token = hmac.compare_digest(opening.token_digest or "", self.token_digest or "")
        return has_token and self.now_s < opening.expires_at_s


def verify(writers: Sequence[StoreWriter], session_id: str, claimant: Claimant) -> None:
    """Return if the session could be claimed, without a claim. Blocks. Raise `NotFound`, `JournalUnavailable`."""
    _find(_Claim(session_id), writers, claimant)


def claim(writers: Sequence[StoreWriter], session_id: str, claimant: Claimant) -> Claimed:
    """Claim a session, behind this process's pending work on it. Blocks. Raise `JournalError`."""
    try:
        return _claim(writers, session_id, claimant)
    except NotOwner as lost:
        raise (NotFound() if lost.retired else AlreadyClaimed()) from None
    except Busy:
        raise OwnerIsAnswering from None


def _find(claiming: _Claim, writers: Sequence[StoreWriter], claimant: Claimant) -> list[tuple[StoreWriter, Found]]:
    found = claiming.find(writers)
    if not claimant.may_use(claiming.read_opening([writer for writer, _ in found])):
        raise NotFound
    return found


def _claim(writers: Sequence[StoreWriter], session_id: str, claimant: Claimant) -> Claimed:
    claiming = _Claim(session_id)
    instance = claimant.instance
    found = _find(claiming, writers, claimant)
    check = partial(_check_idle, claimant=claimant, ended=_ended(writers, found, claimant))
    for _, one in found:
        check(one.owned)
    latest = max((one.owned.owner for _, one in found), key=lambda one: one.epoch)
    is_ours = latest.instance == instance and all(one.owned.owner == latest for _, one in found)
    owner = latest if is_ours else Owner(latest.epoch + 1, instance)
    taken = claiming.take(found, owner, check)
    transcript = claiming.load(taken, owner)
    return Claimed(transcript, owner)


def _ended(
    writers: Sequence[StoreWriter], found: Sequence[tuple[StoreWriter, Found]], claimant: Claimant
) -> frozenset[str]:
    """Return the owners whose marks do not count: the claimant itself, and processes that have ended."""
    instances = {one.owned.owner.instance for _, one in found} - {claimant.instance}
    ended = {one for one in instances if any(writer.store.has_ended(one) for writer in writers)}
    return frozenset(ended | {claimant.instance})


def _check_idle(record: OwnerRecord, claimant: Claimant, ended: frozenset[str]) -> None:
    """Raise `Busy` if the claimant waits for running turns, and one may run."""
    if claimant.waits:
        owners.check_idle(record, claimant.now_s, ended)


class _Claim:
    """The steps of one claim. A store that fails in one of them counts to the end."""

    def __init__(self, session_id: str) -> None:
        self._key = key_of(session_id)
        self._shown = short_id(session_id)
        self._damaged: set[StoreWriter] = set()
        self._unavailable = False

    def find(self, writers: Sequence[StoreWriter]) -> list[tuple[StoreWriter, Found]]:
        """Return the stores that have the session."""
        known = [writer for writer in writers if not writer.is_forgotten(self._key)]
        replies = self._ask(known, lambda writer: writer.reader.find(self._key))
        found = [(writer, one) for writer, one in replies if one is not None]
        if any(one.owned.retired for _, one in found):
            raise NotFound
        if not found:
            raise self._missing()
        return found

    def read_opening(self, writers: Sequence[StoreWriter]) -> OpenRecord:
        """Return the session's first record, from the first store that can give it."""
        for writer in writers:
            for _, opening in self._ask([writer], lambda one: one.reader.opening(self._key)):
                return opening
        raise self._missing()

    def take(
        self, found: Sequence[tuple[StoreWriter, Found]], owner: Owner, check: Callable[[OwnerRecord], None]
    ) -> list[tuple[StoreWriter, Found]]:
        """Become the owner, store by store in the order of the configuration. Return the stores that could be reached.

        Two claims that meet therefore meet in the first store that both reach. Raise `NotOwner`, `Busy`.
        """
        taken = []
        for writer, one in found:
            for _, owned in self._ask([writer], lambda store: owners.take(store.store, self._key, owner, check)):
                taken.append((writer, replace(one, owned=owned)))
        if not taken:
            raise self._missing()
        return taken

    def load(self, taken: Sequence[tuple[StoreWriter, Found]], owner: Owner) -> Transcript:
        """Return the longest verified transcript, and adopt the records that each store has of it. Raise `NotOwner`."""
        loaded: list[tuple[StoreWriter, Loaded]] = []
        for writer, one in sorted(taken, key=lambda pair: -pair[1].records):
            if writer in self._damaged or any(len(known.checksums) >= one.records for _, known in loaded):
                continue
            loaded += self._ask([writer], partial(self._load, owned=one.owned))
        if not loaded:
            raise self._missing()
        source, longest = max(loaded, key=lambda pair: len(pair[1].checksums))

        def adopt(writer: StoreWriter) -> None:
            checksums = [] if writer in self._damaged else longest.checksums
            expires_at_s = longest.transcript.opening.expires_at_s
            writer.adopt(self._key, owner, expires_at_s, checksums, loaded=writer is source)

        if not [result for writer, _ in taken for result in self._ask([writer], adopt)]:
            raise self._missing()
        return longest.transcript

    def _load(self, writer: StoreWriter, owned: OwnerRecord) -> Loaded:
        return writer.reader.load(self._key, owned)

    def _missing(self) -> JournalError:
        """Return the error to raise if no store has given what was asked for."""
        return JournalUnavailable() if self._unavailable else NotFound(damaged=bool(self._damaged))

    def _ask(self, writers: Sequence[StoreWriter], work: Callable[[StoreWriter], T]) -> list[tuple[StoreWriter, T]]:
        """Run the work on each writer's executor. Return the results of those that did not fail."""
        results = []
        futures = [(writer, writer.executor.run(self._key, partial(work, writer))) for writer in writers]
        for writer, future in futures:
            try:
                results.append((writer, future.result()))
            except Damaged as error:
                self._damaged.add(writer)
                log.warning("journal_damaged store=%s session=%s reason=%s", writer.store.name, self._shown, error)
            except Removed:
                continue  # as if the store had never had the session
            except StoreError as error:
                self._unavailable = True
                log.warning("journal_unreadable store=%s session=%s reason=%s", writer.store.name, self._shown, error)
            except CancelledError:  # the journal is closed
                self._unavailable = True
        return results
