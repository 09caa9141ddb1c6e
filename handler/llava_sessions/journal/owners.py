"""Keep one owner for each session of a store, although several instances can reach it.

The object `<key>/owner` names the instance that may append to the session, and its epoch. A claim writes the next epoch
by compare-and-swap, so of two claims of one epoch exactly one succeeds. An owner appends as follows:

1. It writes the record, and replaces at most a damaged record or a record of its own or an earlier epoch.
2. It reads the owner record. Only if it is still the owner may the record be acknowledged.

A claimer reads the records after its claim. Thus it reads a record that was written before the claim; and the writer of
a record that was written after the claim finds out in step 2. What such a writer leaves behind has a lower epoch:
readers ignore it and the next owner replaces it.

A removal first marks the owner record as retired, by compare-and-swap, so that a claim and a removal can't both
succeed. The owner record of a session that was ever claimed is kept, retired, until the session's expiry: an earlier
owner, or another store's copy of the session, must not revive it. Journals of version 0.1 have no owner records; their
sessions have epoch 0.
"""

from __future__ import annotations

from enum import Enum

from .encoding import Owner, decode_owner, encode_owner, epoch_of
from .stores import OWNER, Store, StoreError, record_name

NOBODY = Owner(0, "")
# Sessions start in this epoch.
FIRST_EPOCH = 1


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


def read_owner(store: Store, key: str) -> Owner | None:
    """Return the owner of a session; None if none is recorded. Raise `Damaged`, `StoreError`."""
    found = store.read(key, OWNER)
    return None if found is None else decode_owner(found[0], key)


def take(store: Store, key: str, owner: Owner) -> None:
    """Make `owner` the owner. Raise `NotOwner` if the recorded epoch is not lower; `Damaged`, `StoreError`."""
    data = encode_owner(owner, key)
    if store.create(key, OWNER, data):
        return
    found = store.read(key, OWNER)
    if found is None:
        raise StoreError("can't write: the owner record was just removed")
    current = decode_owner(found[0], key)
    if current.retired or current.epoch >= owner.epoch:
        raise NotOwner(current.retired)
    if not store.replace(key, OWNER, data, found[1]):
        raise NotOwner


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
    if current is not None and current != owner:
        raise NotOwner(current.retired)
    return current is not None


def remove(store: Store, key: str, owner: Owner) -> Removal:
    """Remove a session if `owner` is its owner, or nobody is recorded. Raise `Damaged`, `StoreError`.

    Call it again after an error.
    """
    found = store.read(key, OWNER)
    if found is not None:
        current = decode_owner(found[0], key)
        if not current.is_same(owner):
            return Removal.NOT_OWNER
        retired = encode_owner(Owner(owner.epoch, owner.instance, retired=True), key)
        if not current.retired and not store.replace(key, OWNER, retired, found[1]):
            return Removal.NOT_OWNER
    if owner.epoch > FIRST_EPOCH:
        store.remove_records(key)
    else:
        store.remove(key)
    return Removal.REMOVED
