"""Locks of files in a directory: of a session that is being changed, and of each process while it lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WAIT_S = 2.0
_RETRY_S = 0.005
INSTANCE_FILE = re.compile(r"\.instance-[0-9a-f]{32}")


class InstanceFiles:
    """The files `.instance-<instance>` of a directory that several processes share. Thread-safe. Raises `OSError`.

    The kernel releases a lock when its process ends, also after SIGKILL. Other hosts that share the directory see the
    lock too.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._announced: set[str] = set()

    def announce(self, instance: str) -> None:
        """Lock the file of an instance of this process, until the process ends or this object is collected."""
        with self._lock:
            if instance in self._announced:
                return
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._root / _name(instance), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise
            weakref.finalize(self, os.close, descriptor)
            self._announced.add(instance)

    def has_ended(self, instance: str) -> bool:
        """Return whether the process of an instance has certainly ended. False: it lives, or that is not known."""
        is_ours = INSTANCE_FILE.fullmatch(_name(instance)) is not None  # the ID is from an owner record
        return is_ours and is_unlocked(self._root / _name(instance))


def _name(instance: str) -> str:
    return f".instance-{instance}"


def is_unlocked(path: Path) -> bool:
    """Return whether a file exists, and no process holds its lock. An error counts as locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two processes may look at once
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file. The kernel releases it if the process dies. Raise `OSError`."""
    path = folder / "lock"
    until_s = time.monotonic() + _WAIT_S
    while (descriptor := _try_lock(path)) is None:
        if time.monotonic() > until_s:
            raise TimeoutError(errno.ETIMEDOUT, "another process holds the lock")
        time.sleep(_RETRY_S)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()  # the next process makes its own
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    """Return the locked file's descriptor; None if another process holds the lock, or has just removed the file."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
