"""The encoded pictures and clips of all sessions: equal ones are in memory once, within a budget."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field

from ..errors import Refused

# Sessions end, or expire, within seconds to minutes.
_RETRY_AFTER_S = 5


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Blob:
    """The encoded bytes of a picture or of a clip's file, as the client sent them; `sha256` (hex) identifies them."""

    sha256: str
    data: bytes = field(repr=False, compare=False)


class BlobPool:
    """Keeps one object for equal pictures or files, as long as any session holds it, within a budget. Thread-safe."""

    def __init__(self, max_bytes: int | None = None) -> None:
        """`max_bytes`: of all pictures and files in memory; None for no limit."""
        self._max_bytes = max_bytes
        self._blobs: dict[str, _BlobRef] = {}
        self._held_bytes = 0
        self._lock = threading.Lock()
        # A callback of the garbage collector may run while this thread holds the lock, so it only appends here.
        self._collected: deque[_BlobRef] = deque()

    def __len__(self) -> int:
        """Return the number of pictures and files in memory."""
        with self._lock:
            self._drop_collected()
            return len(self._blobs)

    @property
    def held_bytes(self) -> int:
        """Bytes of all pictures and files in memory."""
        with self._lock:
            self._drop_collected()
            return self._held_bytes

    def get(self, data: bytes) -> Blob:
        """Return the blob of these bytes. Raise `Refused` (capacity) if the budget cannot hold it."""
        return self._get(data, self._max_bytes)

    def restore(self, data: bytes) -> Blob:
        """Return the blob of a picture or file that a journal stored. It counts, and is never rejected.

        Its session was acknowledged, so it must not fail because other sessions hold too much.
        """
        return self._get(data, None)

    def _get(self, data: bytes, max_bytes: int | None) -> Blob:
        made = Blob(hashlib.sha256(data).hexdigest(), data)
        with self._lock:
            self._drop_collected()
            held = self._blobs.get(made.sha256)
            blob = None if held is None else held()
            if blob is not None:
                return blob
            if max_bytes is not None and self._held_bytes + len(data) > max_bytes:
                raise _pool_is_full(max_bytes, self._held_bytes, len(data))
            if held is not None:
                self._held_bytes -= held.size_bytes
            reference = self._blobs[made.sha256] = _BlobRef(made, self._collected.append)
            reference.sha256 = made.sha256
            reference.size_bytes = len(data)
            self._held_bytes += len(data)
            return made

    def _drop_collected(self) -> None:
        """Forget the blobs that no session holds any more. The caller holds the lock."""
        while self._collected:
            reference = self._collected.popleft()
            if self._blobs.get(reference.sha256) is reference:
                del self._blobs[reference.sha256]
                self._held_bytes -= reference.size_bytes


class _BlobRef(weakref.ref[Blob]):
    """A weak reference to a blob that keeps the blob's key and size."""

    sha256: str
    size_bytes: int


def _pool_is_full(max_bytes: int, held_bytes: int, needed_bytes: int) -> Refused:
    message = (
        f"The pictures and clips of all sessions must have at most {max_bytes:,} bytes together; {held_bytes:,} bytes "
        f"are held, and {needed_bytes:,} more are needed. Close a session or try again later."
    )
    return Refused("capacity", message, retry_after_s=_RETRY_AFTER_S)
