"""Owns where records lie: a directory, or a prefix in S3. A record is an object `<key>/<number>.rec` in either.

Must not know what is in a record, which session it is, or when to write it. Each call blocks; what goes wrong is a
`StoreError`. Thread-safe.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

_NAME = re.compile(r"([0-9]{6})\.rec")
_KEY = re.compile(r"[0-9a-f]{40}")
_S3_PREFIX = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([A-Za-z0-9!_.*'()/-]*[A-Za-z0-9!_.*'()-])/?")
# A file that is being written is younger than this. Several workers may share a directory, so a young one stays.
_BEING_WRITTEN_S = 600
_NOTHING_THERE = (FileNotFoundError, NotADirectoryError)
_DELETED_AT_ONCE = 1000  # what S3 takes in one request


class StoreError(Exception):
    """The store could not do it; the message says why in a few words."""


class Store(Protocol):
    """Where records lie. `pause_s`: after a failed write, so long nothing more is tried."""

    name: str
    pause_s: float

    def put(self, key: str, number: int, data: bytes) -> None:
        """Write a record whole or not at all; when this returns, it is safe. One that is there is replaced."""

    def get(self, key: str, number: int) -> bytes:
        """Read a record."""

    def numbers(self, key: str) -> list[int]:
        """Of the session's records, in order; none where nothing is known of it."""

    def remove(self, key: str) -> None:
        """Remove all of a session, so that what a crash leaves of it is no session any more."""


class DirectoryStore:
    """Records as files: directories 0700, files 0600, for the server's user alone.

    A record is written beside its place, synced and renamed, and the directory is synced after it.
    """

    name = "directory"
    pause_s = 0.0  # a full disk says so at once

    def __init__(self, path: str) -> None:
        self._root = Path(path)

    def put(self, key: str, number: int, data: bytes) -> None:
        """As `Store.put`."""
        with _os_errors("write"):
            written = self._write_beside(data)
            try:
                folder = self._root / key
                if not folder.is_dir():
                    folder.mkdir(mode=0o700, exist_ok=True)
                    _sync(self._root)
                os.replace(written, folder / _name(number))
                _sync(folder)
            except OSError:
                written.unlink(missing_ok=True)
                raise

    def get(self, key: str, number: int) -> bytes:
        """As `Store.get`."""
        with _os_errors("read"):
            return (self._root / key / _name(number)).read_bytes()

    def numbers(self, key: str) -> list[int]:
        """As `Store.numbers`."""
        with _os_errors("read"):
            try:
                names = os.listdir(self._root / key)
            except _NOTHING_THERE:
                return []
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)

    def remove(self, key: str) -> None:
        """As `Store.remove`."""
        with _os_errors("remove"):
            gone = self._root / f".gone-{secrets.token_hex(8)}"
            try:
                os.rename(self._root / key, gone)
            except _NOTHING_THERE:
                return
            _sync(self._root)
            shutil.rmtree(gone)

    def check(self) -> None:
        """Find out whether records can be written, before the first one is."""
        with _os_errors("write"):
            self._write_beside(b"check").unlink()

    def keys(self) -> list[str]:
        """All sessions there are."""
        with _os_errors("read"):
            try:
                return sorted(filter(_KEY.fullmatch, os.listdir(self._root)))
            except _NOTHING_THERE:
                return []

    def changed_at_s(self, key: str) -> float:
        """When a record of the session was last written, in seconds since the epoch."""
        with _os_errors("read"):
            return (self._root / key).stat().st_mtime

    def tidy(self, now_s: float) -> None:
        """Remove what writers and removals that were killed have left behind."""
        with _os_errors("remove"):
            for path in [*self._root.glob(".new-*"), *self._root.glob(".gone-*")]:
                try:
                    if path.name.startswith(".gone-"):
                        shutil.rmtree(path)
                    elif now_s - path.stat().st_mtime > _BEING_WRITTEN_S:
                        path.unlink()
                except FileNotFoundError:
                    continue  # another worker tidies too
            for folder in self._root.glob("*"):
                if folder.is_dir() and now_s - folder.stat().st_mtime > _BEING_WRITTEN_S:
                    with contextlib.suppress(OSError):  # most hold records
                        folder.rmdir()

    def _write_beside(self, data: bytes) -> Path:
        """The data in a new file under the root, synced."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._root / f".new-{secrets.token_hex(8)}"
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path


class S3Store:
    """Records as objects under `s3://bucket/prefix/`."""

    name = "s3"
    pause_s = 5.0  # a bucket that can't be reached takes seconds to say so

    def __init__(self, uri: str, client: Any = None) -> None:
        """`client`: boto3's, made here by default. Raises ValueError (`uri`) and what boto3 makes of its settings."""
        match = _S3_PREFIX.fullmatch(uri)
        if not match:
            raise ValueError("wanted s3://<bucket>/<prefix>")
        self._bucket, self._prefix = match.groups()
        self._client = client or _new_client()

    def put(self, key: str, number: int, data: bytes) -> None:
        """As `Store.put`."""
        with _s3_errors("write"):
            self._client.put_object(Bucket=self._bucket, Key=self._path(key) + _name(number), Body=data)

    def get(self, key: str, number: int) -> bytes:
        """As `Store.get`."""
        with _s3_errors("read"):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._path(key) + _name(number))
            return answer["Body"].read()

    def numbers(self, key: str) -> list[int]:
        """As `Store.numbers`."""
        with _s3_errors("list"):
            path = self._path(key)
            names = [_NAME.fullmatch(found.removeprefix(path)) for found in self._listed(path)]
        return sorted(int(match[1]) for match in names if match)

    def remove(self, key: str) -> None:
        """As `Store.remove`: the first record goes first, and what has no first record is no session."""
        with _s3_errors("remove"):
            path = self._path(key)
            self._client.delete_object(Bucket=self._bucket, Key=path + _name(0))
            found = self._listed(path)
            for start in range(0, len(found), _DELETED_AT_ONCE):
                objects = [{"Key": name} for name in found[start : start + _DELETED_AT_ONCE]]
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
                for error in answer.get("Errors", []):
                    raise StoreError(f"can't remove: {error.get('Code')}")

    def _path(self, key: str) -> str:
        return f"{self._prefix}/{key}/"

    def _listed(self, path: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=path)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]


def _name(number: int) -> str:
    return f"{number:06d}.rec"


def _sync(folder: Path) -> None:
    """A file's new name is safe only when its directory is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_client() -> Any:
    """An S3 client that finds its credentials and region the usual way of the AWS SDK, and does not wait long."""
    import boto3
    from botocore.config import Config

    retries = {"total_max_attempts": 2, "mode": "standard"}
    config = Config(connect_timeout=2, read_timeout=5, retries=retries, max_pool_connections=16)
    return boto3.session.Session().client("s3", config=config)


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
        raise StoreError(f"can't {what}: {error.response.get('Error', {}).get('Code')}") from error
    except BotoCoreError as error:
        raise StoreError(f"can't {what}: {type(error).__name__}") from error
