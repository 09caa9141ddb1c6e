"""Claim a session: become its owner in every store that has it, and load it.

With two stores availability comes first. A store that can't be reached now is left out, since every durable turn is in
the other store too; only a turn that was answered with `durable` false can be missing. The next save writes to the
store that was left out, if nobody has claimed the session there meanwhile.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from ..chat.transcript import OpenRecord, Transcript, short_id
from .encoding import Damaged, Owner, key_of
from .owners import NotOwner
from .reader import Found, Loaded
from .stores import StoreError
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


@dataclass(frozen=True)
class Claimed:
    """A session that this process owns now."""

    transcript: Transcript
    owner: Owner


@dataclass
class _Replies(Generic[T]):
    """The results of the stores. Damage and failures were logged."""

    results: list[tuple[StoreWriter, T]] = field(default_factory=list)
    damaged: list[StoreWriter] = field(default_factory=list)
    unavailable: bool = False

    def missing(self) -> JournalError:
        """Return the error to raise if there is no result."""
        return JournalUnavailable() if self.unavailable else NotFound(damaged=bool(self.damaged))


def claim(
    writers: Sequence[StoreWriter], session_id: str, now_s: float, token_digest: str | None, instance: str
) -> Claimed:
    """Claim a session for `instance`, behind this process's pending work on it. Blocks. Raise `JournalError`."""
    claiming = _Claim(session_id)
    found = claiming.find(writers)
    opening = claiming.read_opening([writer for writer, _ in found])
    if not hmac.compare_digest(opening.token_digest or "", token_digest or "") or now_s >= opening.expires_at_s:
        raise NotFound
    owner = Owner(max(one.owner.epoch for _, one in found) + 1, instance)
    taken = claiming.take(found, owner)
    transcript = claiming.load(taken, owner)
    return Claimed(transcript, owner)


class _Claim:
    """The steps of one claim."""

    def __init__(self, session_id: str) -> None:
        self._key = key_of(session_id)
        self._shown = short_id(session_id)

    def find(self, writers: Sequence[StoreWriter]) -> list[tuple[StoreWriter, Found]]:
        """Return the stores that have the session."""
        known = [writer for writer in writers if not writer.is_forgotten(self._key)]
        replies = self._ask(known, lambda writer: writer.reader.find(self._key))
        found = [(writer, one) for writer, one in replies.results if one is not None]
        if any(one.owner.retired for _, one in found):
            raise NotFound
        if not found:
            raise replies.missing()
        return found

    def read_opening(self, writers: Sequence[StoreWriter]) -> OpenRecord:
        """Return the session's first record, from the first store that can give it."""
        replies: _Replies[OpenRecord] = _Replies()
        for writer in writers:
            self._ask([writer], lambda one: one.reader.opening(self._key), replies)
            if replies.results:
                return replies.results[0][1]
        raise replies.missing()

    def take(self, found: Sequence[tuple[StoreWriter, Found]], owner: Owner) -> list[tuple[StoreWriter, Found]]:
        """Become the owner, store by store in the order of the configuration. Return the stores that could be reached.

        Two claims that meet therefore meet in the first store that both reach.
        """
        taken = []
        replies: _Replies[None] = _Replies()
        for writer, one in found:
            try:
                self._ask([writer], lambda one: one.take(self._key, owner), replies)
            except NotOwner as lost:
                raise (NotFound() if lost.retired else AlreadyClaimed()) from None
            if replies.results and replies.results[-1][0] is writer:
                taken.append((writer, one))
        if not taken:
            raise replies.missing()
        return taken

    def load(self, taken: Sequence[tuple[StoreWriter, Found]], owner: Owner) -> Transcript:
        """Return the longest verified transcript, and note in each store how much of it is there."""
        replies: _Replies[Loaded] = _Replies()
        longest: tuple[StoreWriter, Loaded] | None = None
        for writer, one in sorted(taken, key=lambda pair: -pair[1].records):
            if longest is not None and len(longest[1].checksums) >= one.records:
                break
            self._ask([writer], lambda source: source.reader.load(self._key), replies)
            longest = max(replies.results, key=lambda pair: len(pair[1].checksums), default=None)
        if longest is None:
            raise replies.missing()
        source, loaded = longest
        for writer, _ in taken:
            checksums = [] if writer in replies.damaged else loaded.checksums
            expires_at_s = loaded.transcript.opening.expires_at_s
            adopt = partial(writer.adopt, self._key, owner, expires_at_s, checksums, loaded=writer is source)
            wait([writer.executor.run(self._key, adopt)])
        return loaded.transcript

    def _ask(
        self, writers: Sequence[StoreWriter], work: Callable[[StoreWriter], T], replies: _Replies[T] | None = None
    ) -> _Replies[T]:
        """Run the work on each writer's executor, and add the results to `replies`."""
        replies = replies or _Replies()
        futures = [(writer, writer.executor.run(self._key, partial(work, writer))) for writer in writers]
        for writer, future in futures:
            try:
                replies.results.append((writer, future.result()))
            except Damaged as error:
                replies.damaged.append(writer)
                log.warning("journal_damaged store=%s session=%s reason=%s", writer.store.name, self._shown, error)
            except StoreError as error:
                replies.unavailable = True
                log.warning("journal_unreadable store=%s session=%s reason=%s", writer.store.name, self._shown, error)
            except CancelledError:  # the journal is closed
                replies.unavailable = True
        return replies
