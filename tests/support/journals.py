"""Helpers of the journal's tests: transcripts, journals over a directory or a bucket, and damage."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from llava_sessions.chat.media import MessageMedia, RecordMedia, StoredClip, flattened
from llava_sessions.chat.transcript import BlobPool, OpenRecord, Transcript, TurnRecord
from llava_sessions.journal.encoding import key_of, read_transcript
from llava_sessions.journal.journal import Journal, NotFound, SaveOutcome
from llava_sessions.journal.owners import read_owner
from llava_sessions.journal.stores import DirectoryStore, Store, record_name
from tests.support.product_log import product_records

NOW = 1_500_000_000.0  # before any file of today
EXPIRES = NOW + 600
LATER = EXPIRES + 121  # past what is kept past an expiry
TOKEN_DIGEST = "ab" * 32
PREFIX = "s3://my-journal/a/prefix/"


def opening(journal: Journal, session_id: str = "chat-1", **changes: Any) -> Transcript:
    pictures = tuple(journal.blobs.get(f"{session_id} picture {n}".encode()) for n in range(2))
    first = OpenRecord(session_id, NOW, EXPIRES, TOKEN_DIGEST, "image", pictures, [1, 32000, 32000], 2)
    return Transcript(replace(first, **changes))


def add_turn(story: Transcript, blobs: BlobPool) -> Transcript:
    number = len(story.turns)
    words = f"{story.opening.session_id} says {number} — ünï\ud800"
    picture = blobs.get(f"{story.opening.session_id} shows {number}".encode())
    media = [MessageMedia((picture,), (StoredClip((picture, picture)), StoredClip((picture,), 8, TOKEN_DIGEST)))]
    shown = flattened(media) if number % 2 else RecordMedia()
    turn = TurnRecord([number, 5], [9] * number, shown.pictures, f"key {number}", words, {"usage": {"n": number}})
    story.append(replace(turn, clips=shown.clips))
    return story


def stores(journal: Journal, story: Transcript, timeout_s: float = 30) -> bool:
    """Save the transcript; return whether every store has it. The session must not have been lost."""
    outcome = journal.save(story).result(timeout_s)
    assert outcome is not SaveOutcome.NOT_OWNER
    return outcome is SaveOutcome.STORED


def saved(journal: Journal, session_id: str = "chat-1", turns: int = 3) -> Transcript:
    """A transcript that was saved turn by turn."""
    story = opening(journal, session_id)
    assert stores(journal, story)
    for _ in range(turns):
        assert stores(journal, add_turn(story, journal.blobs))
    return story


def read(
    journal: Journal, session_id: str, now_s: float = NOW, token_digest: str | None = TOKEN_DIGEST
) -> Transcript | None:
    """Claim a session. None: it is not found."""
    try:
        return journal.claim(session_id, now_s, token_digest)
    except NotFound:
        return None


def peek(store: Store, session_id: str) -> Transcript | None:
    """Read a session without a claim. None: it has no record."""
    key = key_of(session_id)
    owned = read_owner(store, key)
    records = [store.read(key, record_name(number)) for number in store.numbers(key)]
    if not records:
        return None
    return read_transcript(key, [data for data, _ in records], BlobPool().get, owned.since, owned.start)[0]


def again(folder: Path) -> Journal:
    """The journal of the next process."""
    return Journal([DirectoryStore(str(folder))])


def file_of(folder: Path, session_id: str, number: int) -> Path:
    return folder / key_of(session_id) / f"{number:06d}.rec"


def objects(client: Any) -> list[str]:
    return [found["Key"] for found in client.list_objects_v2(Bucket="my-journal").get("Contents", [])]


def records(client: Any) -> list[str]:
    return [name for name in objects(client) if name.endswith(".rec")]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in product_records(caplog) if record.levelno >= logging.WARNING]


def resealed(path: Path, change: Any) -> None:
    """Change the JSON of a record or an owner record, and give it the right checksum again."""
    whole = json.loads(path.read_bytes().split(b"\n", 1)[1])
    change(whole)
    body = json.dumps(whole).encode()
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


class MemoryStore:
    """A store in memory. `before` is called with the name of each operation before it is done.

    Several stores may share `contents`.
    """

    name = "memory"
    pause_s = 0.0

    def __init__(self, contents: dict[tuple[str, str], bytes], before: Callable[[str], None] | None = None) -> None:
        self._contents = contents
        self.before = before or (lambda operation: None)

    def create(self, key: str, name: str, data: bytes) -> bool:
        self.before("create")
        return self._contents.setdefault((key, name), data) == data

    def replace(self, key: str, name: str, data: bytes, version: str) -> bool:
        self.before("replace")
        if self._contents.get((key, name), b"").hex() != version:
            return False
        self._contents[key, name] = data
        return True

    def read(self, key: str, name: str) -> tuple[bytes, str] | None:
        self.before("read")
        data = self._contents.get((key, name))
        return None if data is None else (data, data.hex())

    def numbers(self, key: str) -> list[int]:
        self.before("numbers")
        return sorted(int(name[:6]) for found, name in self._contents if found == key and name.endswith(".rec"))

    def delete(self, key: str, name: str) -> None:
        self.before("delete")
        self._contents.pop((key, name), None)

    def remove(self, key: str) -> None:
        self.remove_records(key)
        self.delete(key, "owner")

    def remove_records(self, key: str) -> None:
        for number in self.numbers(key):
            self.delete(key, record_name(number))

    def announce(self, instance: str) -> None:
        pass

    def has_ended(self, instance: str) -> bool:
        return False


@pytest.fixture
def _closing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close every journal that a test makes."""
    made: list[Journal] = []
    begin = Journal.__init__

    def remembered(self: Journal, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        made.append(self)

    monkeypatch.setattr(Journal, "__init__", remembered)
    yield
    for journal in made:
        journal.close(10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def journal(folder: Path) -> Journal:
    return again(folder)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="my-journal")
        yield client
