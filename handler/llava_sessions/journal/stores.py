"""Store objects `<key>/<name>` in a directory or under an S3 prefix: the records of a session, and its owner record.

Each call blocks. Failures are raised as `StoreError`; an object that does not exist is not a failure. Thread-safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from . import locks

OWNER = "owner"
_RECORD = re.compile(r"([0-9]{6})\.rec")
_KEY = re.compile(r"[0-9a-f]{40}")
_NEW = re.compile(r"\.new-[0-9a-f]{16}")  # temporary files
_GONE = re.compile(r"\.gone-[0-9a-f]{16}")  # directories of removed sessions
_S3_PREFIX = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([A-Za-z0-9!_.*'()/-]*[A-Za-z0-9!_.*'()-])/?")
# Several workers may share a directory: a temporary file younger than this may still be in use.
_TEMPORARY_S = 600
_NOT_THERE = (FileNotFoundError, NotADirectoryError)
_DELETED_AT_ONCE = 1000  # the limit of S3 for one request
# S3's codes for "the condition does not hold": the object exists, has another ETag, or is being written.
_CONDITION_FAILED = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")


class StoreError(Exception):
    """The store could not do it now. The message gives a short reason."""


class Removed(StoreError):
    """Another process removed the object, and with it the session, after it had been found."""


class Store(Protocol):
    """`pause_s`: how long no write is tried after a failed one.

    A version identifies the content of an object. When `create` or `replace` returns, the object is durable.
    """

    name: str
    pause_s: float

    def create(self, key: str, name: str, data: bytes) -> bool:
        """Write an object, whole, if there is none. Return whether the object now holds `data`."""

    def replace(self, key: str, name: str, data: bytes, version: str) -> bool:
        """Write an object, whole, if it has this version. Return whether the object now holds `data`."""

    def read(self, key: str, name: str) -> tuple[bytes, str] | None:
        """Return the content and the version of an object; None if there is none."""

    def numbers(self, key: str) -> list[int]:
        """Return the numbers of the session's records, in order; empty if there is none."""

    def delete(self, key: str, name: str) -> None:
        """Remove an object, if there is one."""

    def remove(self, key: str) -> None:
        """Remove all objects of a session. A removal that is cut short leaves no readable session."""

    def remove_records(self, key: str) -> None:
        """Remove the records of a session, and leave its owner record."""

    def announce(self, instance: str) -> None:
        """Let other processes see in `has_ended` when this process, which is called `instance`, has ended."""

    def has_ended(self, instance: str) -> bool:
        """Return whether the process of an instance has certainly ended. False: it lives, or that is not known."""


class DirectoryStore:
    """Objects as files: directories 0700, files 0600, for the server's user alone.

    A file is written under a temporary name and synced; then it is linked or renamed to its name, and the directory is
    synced. The file system must have hard links and `flock`.
    """

    name = "directory"
    pause_s = 0.0  # a full disk fails at once

    def __init__(self, path: str) -> None:
        self._root = Path(path)
        self._instances = locks.InstanceFiles(self._root)

    def create(self, key: str, name: str, data: bytes) -> bool:
        """See `Store.create`."""
        folder = self._root / key
        with _os_errors("write"), self._temporary(data) as written:
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
                _sync(self._root)
            try:
                os.link(written, folder / name)
            except FileExistsError:
                if (folder / name).read_bytes() != data:
                    return False
            _sync(folder)
        return True

    def replace(self, key: str, name: str, data: bytes, version: str) -> bool:
        """See `Store.replace`."""
        folder = self._root / key
        with _os_errors("write"):
            try:
                with locks.locked(folder):
                    current = (folder / name).read_bytes()
                    if _version(current) != version:
                        return current == data
                    with self._temporary(data) as written:
                        os.replace(written, folder / name)
                    _sync(folder)
            except _NOT_THERE:
                return False
        return True

    def read(self, key: str, name: str) -> tuple[bytes, str] | None:
        """See `Store.read`."""
        with _os_errors("read"):
            try:
                data = (self._root / key / name).read_bytes()
            except _NOT_THERE:
                return None
        return data, _version(data)

    def numbers(self, key: str) -> list[int]:
        """See `Store.numbers`."""
        with _os_errors("read"):
            try:
                names = os.listdir(self._root / key)
            except _NOT_THERE:
                return []
        return _numbers(names)

    def delete(self, key: str, name: str) -> None:
        """See `Store.delete`."""
        with _os_errors("remove"), contextlib.suppress(*_NOT_THERE):
            os.unlink(self._root / key / name)

    def remove(self, key: str) -> None:
        """See `Store.remove`."""
        with _os_errors("remove"):
            gone = self._root / f".gone-{secrets.token_hex(8)}"
            try:
                os.rename(self._root / key, gone)
            except _NOT_THERE:
                return
            _sync(self._root)
            shutil.rmtree(gone)

    def remove_records(self, key: str) -> None:
        """See `Store.remove_records`."""
        for number in self.numbers(key):  # the first record first
            self.delete(key, record_name(number))
        with _os_errors("remove"), contextlib.suppress(*_NOT_THERE):
            _sync(self._root / key)

    def announce(self, instance: str) -> None:
        """See `Store.announce`."""
        with _os_errors("write"):
            self._instances.announce(instance)

    def has_ended(self, instance: str) -> bool:
        """See `Store.has_ended`."""
        return self._instances.has_ended(instance)

    def check(self) -> None:
        """Raise `StoreError` if files can't be written."""
        with _os_errors("write"), self._temporary(b"check"):
            pass

    def keys(self) -> list[str]:
        """Return the keys of all sessions."""
        with _os_errors("read"):
            try:
                return sorted(filter(_KEY.fullmatch, os.listdir(self._root)))
            except _NOT_THERE:
                return []

    def changed_at_s(self, key: str) -> float:
        """Return when a file of the session was last written or removed, in seconds since the epoch."""
        with _os_errors("read"):
            return (self._root / key).stat().st_mtime

    def tidy(self, now_s: float) -> None:
        """Remove the left-overs of writes and removals that were killed. Leave all names that no store makes."""
        with _os_errors("remove"), contextlib.suppress(*_NOT_THERE):
            with os.scandir(self._root) as entries:
                found = list(entries)
            for entry in found:
                with contextlib.suppress(FileNotFoundError):  # another worker tidies too
                    _tidy_entry(entry, now_s)

    @contextmanager
    def _temporary(self, data: bytes) -> Iterator[Path]:
        """A new file under the root with this content, synced. Removed at the end, unless it was renamed."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._root / f".new-{secrets.token_hex(8)}"
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)


class S3Store:
    """Objects under `s3://bucket/prefix/`. Conditional writes take the place of locks."""

    name = "s3"
    pause_s = 5.0  # a bucket that can't be reached takes seconds to fail

    def __init__(self, uri: str, client: Any = None) -> None:
        """`client`: a boto3 client; made here by default. Raise ValueError (`uri`), or what boto3 raises."""
        match = _S3_PREFIX.fullmatch(uri)
        if not match:
            raise ValueError("it must be s3://<bucket>/<prefix>")
        self._bucket, self._prefix = match.groups()
        self.client = client or _new_client()

    def create(self, key: str, name: str, data: bytes) -> bool:
        """See `Store.create`."""
        return self._put(key, name, data, IfNoneMatch="*")

    def replace(self, key: str, name: str, data: bytes, version: str) -> bool:
        """See `Store.replace`. The version is the ETag."""
        return self._put(key, name, data, IfMatch=version)

    def read(self, key: str, name: str) -> tuple[bytes, str] | None:
        """See `Store.read`."""
        from botocore.exceptions import ClientError

        with _s3_errors("read"):
            try:
                answer = self.client.get_object(Bucket=self._bucket, Key=self._path(key) + name)
            except ClientError as error:
                if _code(error) == "NoSuchKey":
                    return None
                raise
            return answer["Body"].read(), answer["ETag"]

    def numbers(self, key: str) -> list[int]:
        """See `Store.numbers`."""
        with _s3_errors("list"):
            path = self._path(key)
            return _numbers([found.removeprefix(path) for found in self._listed(path)])

    def delete(self, key: str, name: str) -> None:
        """See `Store.delete`."""
        with _s3_errors("remove"):
            self.client.delete_object(Bucket=self._bucket, Key=self._path(key) + name)

    def remove(self, key: str) -> None:
        """See `Store.remove`: without its first record a session is not readable."""
        self.remove_records(key)
        self.delete(key, OWNER)

    def remove_records(self, key: str) -> None:
        """See `Store.remove_records`."""
        self.delete(key, record_name(0))
        with _s3_errors("remove"):
            path = self._path(key)
            found = [name for name in self._listed(path) if name != path + OWNER]
            for start in range(0, len(found), _DELETED_AT_ONCE):
                objects = [{"Key": name} for name in found[start : start + _DELETED_AT_ONCE]]
                answer = self.client.delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
                for error in answer.get("Errors", []):
                    raise StoreError(f"can't remove: {error.get('Code')}")

    def announce(self, instance: str) -> None:
        """See `Store.announce`: S3 has no locks."""

    def has_ended(self, instance: str) -> bool:
        """See `Store.has_ended`: that is never known."""
        return False

    def _put(self, key: str, name: str, data: bytes, **condition: str) -> bool:
        from botocore.exceptions import ClientError

        with _s3_errors("write"):
            try:
                self.client.put_object(Bucket=self._bucket, Key=self._path(key) + name, Body=data, **condition)
            except ClientError as error:
                if _code(error) not in _CONDITION_FAILED:
                    raise
            else:
                return True
        # A retry finds what the first attempt wrote, if only the reply to it was lost.
        found = self.read(key, name)
        return found is not None and found[0] == data

    def _path(self, key: str) -> str:
        return f"{self._prefix}/{key}/"

    def _listed(self, path: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=path)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]


def record_name(number: int) -> str:
    """Return the name of a session's record."""
    return f"{number:06d}.rec"


def _numbers(names: list[str]) -> list[int]:
    return sorted(int(match[1]) for match in map(_RECORD.fullmatch, names) if match)


def _tidy_entry(entry: os.DirEntry[str], now_s: float) -> None:
    """Remove an entry of a directory store if it is a left-over."""
    is_folder = entry.is_dir(follow_symlinks=False)
    if _GONE.fullmatch(entry.name) and is_folder:
        shutil.rmtree(entry.path)
    elif now_s - entry.stat(follow_symlinks=False).st_mtime <= _TEMPORARY_S:
        return
    elif _NEW.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
        os.unlink(entry.path)
    elif locks.INSTANCE_FILE.fullmatch(entry.name) and locks.is_unlocked(Path(entry.path)):
        os.unlink(entry.path)  # no mark of the instance is valid for so long
    elif _KEY.fullmatch(entry.name) and is_folder:
        with contextlib.suppress(OSError):  # most are not empty
            os.rmdir(entry.path)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sync(folder: Path) -> None:
    """A new name of a file is durable only once its directory is synced."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_client() -> Any:
    """Return an S3 client with short time-outs; credentials and region are found in the usual way of the AWS SDK."""
    import boto3
    from botocore.config import Config

    retries = {"total_max_attempts": 2, "mode": "standard"}
    config = Config(connect_timeout=2, read_timeout=5, retries=retries, max_pool_connections=16)
    return boto3.session.Session().client("s3", config=config)


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code"))


@contextmanager
def _os_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"can't {what}: {error.strerror or type(error).__name__}") from error


@contextmanager
def _s3_errors(what: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        raise StoreError(f"can't {what}: {_code(error)}") from error
    except BotoCoreError as error:
        raise StoreError(f"can't {what}: {type(error).__name__}") from error
