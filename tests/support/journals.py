"""Helpers of the journal's tests: transcripts, journals over a directory or a bucket, and damage."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from llava_sessions.chat.transcript import BlobPool, OpenRecord, Transcript, TurnRecord
from llava_sessions.journal.encoding import key_of, read_transcript
from llava_sessions.journal.journal import Journal, NotFound, SaveOutcome
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
    shown = (blobs.get(f"{story.opening.session_id} shows {number}".encode()),) if number % 2 else ()
    story.append(TurnRecord([number, 5], [9] * number, shown, f"key {number}", words, {"usage": {"n": number}}))
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
    records = [store.read(key, record_name(number)) for number in store.numbers(key)]
    return read_transcript(key, [data for data, _ in records], BlobPool().get)[0] if records else None


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
