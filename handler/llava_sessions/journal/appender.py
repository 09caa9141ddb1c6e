"""Append the records of one session to one store, as its owner (owners.py)."""

from __future__ import annotations

import contextlib

from ..chat.transcript import OpenRecord, TurnRecord
from . import owners
from .encoding import Damaged, Owner, checksum_of, encode
from .owners import NotOwner
from .reader import StoreReader
from .stores import Store, StoreError, record_name

Records = tuple[OpenRecord, *tuple[TurnRecord, ...]]


class Appender:
    """The first `count` records of the session are stored. Its methods block and raise `Damaged` and `StoreError`."""

    def __init__(self, store: Store, reader: StoreReader, key: str, owner: Owner, expires_at_s: float) -> None:
        self.owner = owner
        self.expires_at_s = expires_at_s
        self.count = 0
        self._store = store
        self._reader = reader
        self._key = key
        self._checksum = ""  # of the last stored record

    def adopt(self, checksums: list[str], loaded: bool) -> None:
        """Continue behind a transcript, of which these are the checksums, as far as it is stored.

        `loaded`: all of it is. The rest is written with the next save. Raise `NotOwner`.
        """
        count = len(checksums) if loaded else min(self._reader.count(self._key), len(checksums))
        if count and (loaded or checksum_of(self._reader.record(self._key, count - 1)) == checksums[count - 1]):
            self.count = count
            self._checksum = checksums[count - 1]
        owners.seal(self._store, self._key, self.owner, self.count)

    def write(self, records: Records) -> None:
        """Write the missing records. Raise `NotOwner`.

        If the session was removed meanwhile, the records that this call wrote are removed too.
        """
        written: list[int] = []
        try:
            self._append(records, written)
            if not owners.check(self._store, self._key, self.owner):
                self._restart()
                self._append(records, written)
        except NotOwner as lost:
            with contextlib.suppress(StoreError):
                for number in written if lost.retired else ():
                    self._store.delete(self._key, record_name(number))
            raise

    def _append(self, records: Records, written: list[int]) -> None:
        epoch = self.owner.epoch
        for number, record in enumerate(records[self.count :], self.count):
            data, checksum = encode(record, records[0].session_id, number, self._checksum, epoch)
            owners.append(self._store, self._key, number, data, epoch)
            written.append(number)
            self.count = number + 1
            self._checksum = checksum

    def _restart(self) -> None:
        """Begin again in a store that has lost the owner record, unless all records are still there."""
        owners.take_empty(self._store, self._key, self.owner)
        with contextlib.suppress(Damaged):
            complete = self.count > 0 and self._reader.count(self._key) == self.count
            if complete and checksum_of(self._reader.record(self._key, self.count - 1)) == self._checksum:
                owners.seal(self._store, self._key, self.owner, self.count)
                return
        self.count = 0
        self._checksum = ""
