"""Read sessions from one store. All methods block and raise `Damaged` and `StoreError`."""

from __future__ import annotations

from dataclasses import dataclass

from ..chat.transcript import BlobPool, OpenRecord, Transcript
from . import owners
from .encoding import Damaged, OwnerRecord, read_transcript
from .stores import Removed, Store, record_name


@dataclass(frozen=True)
class Found:
    """The owner record of a session in a store, and its number of records: 0 if the session is retired."""

    owned: OwnerRecord
    records: int


@dataclass(frozen=True)
class Loaded:
    """A verified transcript and the checksums of its records."""

    transcript: Transcript
    checksums: list[str]


class StoreReader:
    """The sessions of one store. `blobs` keeps equal pictures once."""

    def __init__(self, store: Store, blobs: BlobPool) -> None:
        self._store = store
        self._blobs = blobs

    def find(self, key: str) -> Found | None:
        """Return what the store has of a session; None if it has no record."""
        owned = owners.read_owner(self._store, key)
        if owned.retired:
            return Found(owned, 0)
        try:
            count = self.count(key)
        except Damaged:
            latest = owners.read_owner(self._store, key)
            if latest.retired:  # its removal has just begun
                return Found(latest, 0)
            raise
        return Found(owned, count) if count else None

    def count(self, key: str) -> int:
        """Return the number of records."""
        numbers = self._store.numbers(key)
        if numbers != list(range(len(numbers))):
            raise Damaged("a record is missing")
        return len(numbers)

    def record(self, key: str, number: int) -> bytes:
        """Return the bytes of a record, unverified."""
        found = self._store.read(key, record_name(number))
        if found is None:
            raise Removed("can't read: a record was just removed")
        return found[0]

    def opening(self, key: str) -> OpenRecord:
        """Return the first record."""
        return read_transcript(key, [self.record(key, 0)], self._blobs.restore)[0].opening

    def load(self, key: str, owned: OwnerRecord) -> Loaded:
        """Return the whole session. Only the records that are valid by `owned` belong to it."""
        count = self.count(key)
        if not count:
            raise Removed("can't read: the records were just removed")
        records = (self.record(key, number) for number in range(count))
        transcript, checksums = read_transcript(key, records, self._blobs.restore, owned.since, owned.start)
        return Loaded(transcript, checksums)
