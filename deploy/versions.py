"""Versions of packed models: a model store holds immutable folders, and a symbolic link to the current one per archive.

    model_store/llava -> .versions/llava/20261126-101500-x7k2/llava
    model_store/.versions/llava/20261126-101500-x7k2/lock

A server resolves the link once and holds a shared lock on its version for as long as it runs. Packing switches the link
atomically, then removes versions without a lock. A lock ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

VERSIONS = ".versions"
LOCK = "lock"
SCRATCH = ".packing-"


@dataclass(frozen=True)
class HeldArchive:
    """An archive that stays on the disk until `release`. `path` names its version, not the link to it."""

    path: Path
    lock: IO[bytes] | None

    def release(self) -> None:
        """Let packing remove this version once it is not current. May be called again."""
        if self.lock is not None:
            self.lock.close()


def hold(archive: Path) -> HeldArchive:
    """Return what an archive of a model store is now, and keep it. Raise FileNotFoundError if there is none.

    An archive without versions, as in a container, is returned as it is.
    """
    while True:
        path = archive.resolve(strict=True)
        try:
            lock = (path.parent / LOCK).open("rb")
        except FileNotFoundError:
            if path.exists():
                return HeldArchive(archive.absolute(), None)
            continue  # the version has been removed since the link was read
        fcntl.flock(lock, fcntl.LOCK_SH)
        if path.exists():
            return HeldArchive(path, lock)
        lock.close()


@contextlib.contextmanager
def scratch(store: Path) -> Iterator[Path]:
    """Make a folder for packing in the store. Remove it at the end, and those of packers that were killed.

    In the store, not in /tmp: on one file system, hard links and the last rename work.
    """
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=store) as made:
        folder = Path(made).resolve()
        with (folder / LOCK).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for other in store.glob(f"{SCRATCH}*"):
                _remove_if_unused(other)
            yield folder


def publish(made: Path, archive: Path, replaced: Sequence[Path] = ()) -> None:
    """Move the new archive `made` into a version of its own, and point `archive` to it, atomically.

    Then removes the archives in `replaced`, and each version that neither a link names nor a server uses. `made` must
    be in the store's file system.
    """
    versions = archive.parent / VERSIONS
    versions.mkdir(exist_ok=True)
    with (versions / LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another packer might remove this version before the link names it
        of_archive = versions / archive.name
        of_archive.mkdir(exist_ok=True)
        version = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-", time.gmtime()), dir=of_archive))
        version.chmod(0o755)
        (version / LOCK).touch()
        made.rename(version / archive.name)
        _switch(archive, version / archive.name)
        for other in replaced:
            _remove_archive(other)
        _remove_unused(versions, archive.parent)


def _switch(archive: Path, target: Path) -> None:
    link = target.parent / "link"
    link.symlink_to(os.path.relpath(target, archive.parent))
    if archive.is_dir() and not archive.is_symlink():
        _remove_archive(archive)  # packed by a release without versions; a link can't replace a folder
    link.replace(archive)


def _remove_archive(archive: Path) -> None:
    if archive.is_symlink() or archive.is_file():
        archive.unlink()
    else:
        shutil.rmtree(archive)


def _remove_unused(versions: Path, store: Path) -> None:
    current = {link.resolve().parent for link in store.iterdir() if link.is_symlink()}
    for version in versions.glob("*/*"):
        if version.is_dir() and version.resolve() not in current:
            _remove_if_unused(version)
    for of_archive in versions.iterdir():
        if of_archive.is_dir():
            with contextlib.suppress(OSError):  # not empty
                of_archive.rmdir()


def _remove_if_unused(folder: Path) -> None:
    """Remove a folder unless a process holds its lock."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), (folder / LOCK).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
