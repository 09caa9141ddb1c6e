"""Keep one owner for each session of a store, although several instances can reach it.

The object `<key>/owner` names the instance that may append to the session, and its epoch. All its changes are
compare-and-swaps. A claim has three steps:

1. `take` writes the next epoch. Of two claims of one epoch exactly one succeeds.
2. The claimer reads the records.
3. `seal` writes how many records the claimer has adopted (`start`). From that number on, only records of its epoch or a
   later one are valid. A claimer whose epoch was taken meanwhile fails here, and may not append.

An owner appends as follows:

1. It writes the record, and replaces at most a damaged record or a record of its own or an earlier epoch. The adopted
   records of a later owner are safe: from this owner's `start` on they have at least this owner's epoch.
2. It reads the owner record. Only if it is still the owner may the record be acknowledged.

While a turn runs, the owner record has the time until which it may run (`mark`). A claim can leave such a session to
its owner (`Busy`). The mark is removed after the turn, and expires if the owner has died. A claim may ignore it, as it
does if the owner's process has certainly ended (`Store.has_ended`).

Thus a claimer reads each record that was acknowledged before its claim, and the writer of a record that was written
after the claim finds out. Such a record is stale: readers ignore it, and the next owner replaces it.

A removal first marks the owner record as retired, so that a claim and a removal can't both succeed. The owner record of
a session that was ever claimed is kept, retired, until the session's expiry: an earlier owner, or another store's copy
of the session, must not revive it. Journals of version 0.1 have no owner records; their sessions have epoch 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from enum import Enum

from .encoding import Owner, OwnerRecord, decode_owner, encode_owner, epoch_of
from .stores import OWNER, Removed, Store, StoreError, record_name

NO_OWNER = Owner(0, "")
# Sessions start in this epoch.
FIRST_EPOCH = 1
# A mark fails only if the record changes at the same moment; the next attempt sees the change.
_MARK_ATTEMPTS = 2


class Removal(Enum):
    """What came of a removal."""

    REMOVED = "removed"
    FAILED = "failed"
    NOT_OWNER = "not owner"


class NotOwner(Exception):
    """Another instance owns the session, or it was removed (`retired`)."""

    def __init__(self, retired: bool = False) -> None:
        super().__init__()
        self.retired = retired


class Busy(Exception):
    """A turn of the session's owner runs."""


def read_owner(store: Store, key: str) -> OwnerRecord:
    """Return the owner record of a session; that of `NO_OWNER` if there is none. Raise `Damaged`, `StoreError`."""
    found = store.read(key, OWNER)
    return OwnerRecord(NO_OWNER) if found is None else decode_owner(found[0], key)


def take(store: Store, key: str, owner: Owner, check: Callable[[OwnerRecord], None] = lambda _: None) -> OwnerRecord:
    """Make `owner` the owner, to read the session and then `seal` it. Return the record, which marks the valid records.

    `check` receives the record that is to be replaced, and raises to keep it. Raise `NotOwner` if the recorded epoch is
    not lower; `Damaged`, `StoreError`.
    """

    def change(current: OwnerRecord) -> OwnerRecord:
        check(current)
        return OwnerRecord(owner, current.since, current.start)

    return _swap(store, key, owner, change)


def check_idle(record: OwnerRecord, now_s: float, ended: Collection[str]) -> None:
    """Raise `Busy` if a turn may run now, in seconds since the epoch. Marks of the instances `ended` do not count."""
    if record.busy_until_s > now_s and record.owner.instance not in ended:
        raise Busy


def mark(store: Store, key: str, owner: Owner, busy_until_s: float) -> None:
    """Note that a turn of `owner` runs until then at most, or that none runs (0).

    A store that has no owner record, or that of an earlier epoch, is left as it is: the next save takes it.
    Raise `NotOwner` if there is a later owner or the session was removed; `Damaged`, `StoreError`.
    """
    for _ in range(_MARK_ATTEMPTS):
        found = store.read(key, OWNER)
        if found is None:
            return
        current = decode_owner(found[0], key)
        if current.retired or (current.owner != owner and current.owner.epoch >= owner.epoch):
            raise NotOwner(current.retired)
        if current.owner != owner or current.busy_until_s == busy_until_s:
            return
        marked = encode_owner(replace(current, busy_until_s=busy_until_s), key)
        if store.replace(key, OWNER, marked, found[1]):
            return
    raise StoreError("can't write: the owner record was just replaced")


def take_empty(store: Store, key: str, owner: Owner) -> None:
    """Make `owner` the owner of a session that it writes from the first record on. Raise as `take`."""
    _swap(store, key, owner, lambda _: OwnerRecord(owner, since=owner.epoch))


def seal(store: Store, key: str, owner: Owner, start: int) -> None:
    """Make `start` records those of the session, of whatever epoch. Raise `NotOwner`, `Damaged`, `StoreError`."""
    found = store.read(key, OWNER)
    if found is None:
        raise NotOwner
    current = decode_owner(found[0], key)
    sealed = encode_owner(OwnerRecord(owner, since=owner.epoch, start=start), key)
    if current.owner != owner or current.retired:
        raise NotOwner(current.retired)
    if not store.replace(key, OWNER, sealed, found[1]):
        raise NotOwner


def _swap(store: Store, key: str, owner: Owner, change: Callable[[OwnerRecord], OwnerRecord]) -> OwnerRecord:
    record = change(OwnerRecord(NO_OWNER))
    if store.create(key, OWNER, encode_owner(record, key)):
        return record
    found = store.read(key, OWNER)
    if found is None:
        raise Removed("can't write: the owner record was just removed")
    current = decode_owner(found[0], key)
    if current.retired or (current.owner != owner and current.owner.epoch >= owner.epoch):
        raise NotOwner(current.retired)
    record = change(current)
    if not store.replace(key, OWNER, encode_owner(record, key), found[1]):
        raise NotOwner
    return record


def append(store: Store, key: str, number: int, data: bytes, epoch: int) -> None:
    """Write a record. Raise `NotOwner` if a later epoch has written that record; `StoreError`."""
    name = record_name(number)
    if store.create(key, name, data):
        return
    found = store.read(key, name)
    if found is None:
        raise StoreError("can't write: the record was just removed")
    if epoch_of(found[0]) > epoch:
        raise NotOwner
    if not store.replace(key, name, data, found[1]):
        raise StoreError("can't write: the record was just replaced")


def check(store: Store, key: str, owner: Owner) -> bool:
    """Return whether an owner is recorded. Raise `NotOwner` if it is not `owner`; `Damaged`, `StoreError`."""
    current = read_owner(store, key)
    if current.owner == NO_OWNER:
        return False
    if current.owner != owner or current.retired:
        raise NotOwner(current.retired)
    return True


def remove(store: Store, key: str, owner: Owner) -> Removal:
    """Remove a session if `owner` is its owner, or no owner is recorded. Raise `Damaged`, `StoreError`.

    Call it again after an error.
    """
    found = store.read(key, OWNER)
    if found is not None:
        current = decode_owner(found[0], key)
        if current.owner != owner:
            return Removal.NOT_OWNER
        retired = encode_owner(replace(current, retired=True), key)
        if not current.retired and not store.replace(key, OWNER, retired, found[1]):
            return Removal.NOT_OWNER
    if owner.epoch > FIRST_EPOCH:
        store.remove_records(key)
    else:
        store.remove(key)
    return Removal.REMOVED
