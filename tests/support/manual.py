"""An executor and a store whose work is done, or fails, when a test says so."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from llava_sessions.journal.stores import OWNER, DirectoryStore, StoreError

_RECORD = re.compile(r"([0-9]{6})\.rec")
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="manual")


class ManualExecutor(Executor):
    """Keeps jobs until `run`. While it is `live`, a thread runs new jobs at once, for callers that block on them."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._is_live = False

    @property
    def waiting(self) -> int:
        """The number of jobs."""
        return len(self._jobs)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Keep a job."""
        if self._is_live:
            return _THREAD.submit(fn, *args, **kwargs)
        future: Future[Any] = Future()
        self._jobs.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self, index: int = 0) -> None:
        """Run one of the jobs."""
        future, work = self._jobs.pop(index % len(self._jobs))
        if future.set_running_or_notify_cancel():
            try:
                result = work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    def run_all(self) -> None:
        """Run all jobs, those too that they add."""
        while self._jobs:
            self.run()

    @contextmanager
    def live(self) -> Iterator[None]:
        """Run all jobs, and new ones at once."""
        self.run_all()
        self._is_live = True
        try:
            yield
        finally:
            self._is_live = False


class MemoryStore(DirectoryStore):
    """A directory in memory. While `writes_fail` or `reads_fail` is set, such calls raise `StoreError`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__("/nowhere")
        self._clock = clock
        self.objects: dict[tuple[str, str], bytes] = {}
        self.writes_fail = False
        self.reads_fail = False
        self.has_failed = False

    def create(self, key: str, name: str, data: bytes) -> bool:
        """See `Store.create`."""
        self._check(self.writes_fail)
        return self.objects.setdefault((key, name), data) == data

    def replace(self, key: str, name: str, data: bytes, version: str) -> bool:
        """See `Store.replace`."""
        self._check(self.writes_fail)
        current = self.objects.get((key, name))
        if current is None or _version(current) != version:
            return current == data
        self.objects[key, name] = data
        return True

    def read(self, key: str, name: str) -> tuple[bytes, str] | None:
        """See `Store.read`."""
        self._check(self.reads_fail)
        data = self.objects.get((key, name))
        return None if data is None else (data, _version(data))

    def numbers(self, key: str) -> list[int]:
        """See `Store.numbers`."""
        self._check(self.reads_fail)
        names = (_RECORD.fullmatch(name) for folder, name in self.objects if folder == key)
        return sorted(int(match[1]) for match in names if match)

    def delete(self, key: str, name: str) -> None:
        """See `Store.delete`."""
        self._check(self.writes_fail)
        self.objects.pop((key, name), None)

    def remove(self, key: str) -> None:
        """See `Store.remove`."""
        self._check(self.writes_fail)
        self.objects = {place: data for place, data in self.objects.items() if place[0] != key}

    def remove_records(self, key: str) -> None:
        """See `Store.remove_records`."""
        self._check(self.writes_fail)
        kept = {place: data for place, data in self.objects.items() if place[0] != key or place[1] == OWNER}
        self.objects = kept

    def announce(self, instance: str) -> None:
        """See `Store.announce`."""

    def has_ended(self, instance: str) -> bool:
        """See `Store.has_ended`: as in S3, that is never known."""
        return False

    def check(self) -> None:
        """See `DirectoryStore.check`."""
        self._check(self.writes_fail)

    def keys(self) -> list[str]:
        """See `DirectoryStore.keys`."""
        self._check(self.reads_fail)
        return sorted({key for key, _ in self.objects})

    def changed_at_s(self, key: str) -> float:
        """See `DirectoryStore.changed_at_s`."""
        return self._clock()

    def tidy(self, now_s: float) -> None:
        """See `DirectoryStore.tidy`."""

    def _check(self, fails: bool) -> None:
        if fails:
            self.has_failed = True
            raise StoreError("a test")


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
