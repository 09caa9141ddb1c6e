"""Owns what rebuilds a session after a crash, and how it is spelled as bytes: one record for the open, one for each
finished turn.

Must not know where records lie, threads, or what the pump does with them. Pure; plain data only.

A record is `<sha256 of the rest, hex>\\n<JSON>`. The JSON names the schema, the session, the record's number in it and
the checksum of the record before, so that a damaged, missing, exchanged or left-over record is told from a good one and
never becomes part of another conversation. Never pickle: what lies in a store is data.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..chat.transcript import Blob, OpenRecord, Transcript, TurnRecord

SCHEMA = 1
_DIGEST_CHARS = 64


class Damaged(Exception):
    """A record that can't be trusted. The message says why, and nothing of what is in it."""


def key_of(session_id: str) -> str:
    """The name of a session in a store. Ids are secrets, and names are seen by whoever may list."""
    return hashlib.sha256(session_id.encode()).hexdigest()[:40]


def encode(record: OpenRecord | TurnRecord, session_id: str, number: int, after: str) -> tuple[bytes, str]:
    """The record's bytes and their checksum. `number` is its place in the session, from 0; `after` is the checksum of
    the record before, "" where there is none.
    """
    fields = _open_fields(record) if isinstance(record, OpenRecord) else _turn_fields(record)
    whole = {"schema": SCHEMA, "session_id": session_id, "number": number, "after": after, "record": fields}
    body = json.dumps(whole, separators=(",", ":"), allow_nan=False).encode("ascii")
    digest = hashlib.sha256(body).hexdigest()
    return digest.encode("ascii") + b"\n" + body, digest


def read_story(key: str, records: Iterable[bytes], blob: Callable[[bytes], Blob]) -> tuple[Transcript, list[str]]:
    """The story that lies under `key`, and the checksums of its records. Raises `Damaged`.

    `records` are all of them in order; `blob` makes pictures of bytes.
    """
    verified = _verified(key, records)
    try:
        session_id, fields, digest = next(verified)
    except StopIteration:
        raise Damaged("there is no record") from None
    story, digests = Transcript(_open_record(session_id, fields, blob)), [digest]
    for _, fields, digest in verified:
        story.turns.append(_turn_record(fields, blob))
        digests.append(digest)
    return story, digests


def checksum_of(data: bytes) -> str:
    """The checksum that a record claims; its content is not looked at."""
    return data[:_DIGEST_CHARS].decode("ascii", errors="replace")


def _verified(key: str, records: Iterable[bytes]) -> Iterator[tuple[str, dict, str]]:
    """Of each record the session id, the fields and the checksum, once all that surrounds the fields is right."""
    after = ""
    for number, data in enumerate(records):
        digest, body = data[:_DIGEST_CHARS], data[_DIGEST_CHARS + 1 :]
        whole_line = data[_DIGEST_CHARS : _DIGEST_CHARS + 1] == b"\n"
        if not whole_line or hashlib.sha256(body).hexdigest().encode("ascii") != digest:
            raise Damaged(f"record {number} does not match its checksum")
        try:
            whole = json.loads(body)
        except (ValueError, RecursionError):
            raise Damaged(f"record {number} is no JSON") from None
        if not isinstance(whole, dict) or whole.get("schema") != SCHEMA:
            raise Damaged(f"record {number} has another schema than {SCHEMA}")
        session_id = _get(whole, "session_id", str)
        if key_of(session_id) != key:
            raise Damaged(f"record {number} belongs to another session")
        if (_get(whole, "number", int), _get(whole, "after", str)) != (number, after):
            raise Damaged(f"record {number} does not follow the one before")
        after = digest.decode("ascii")
        yield session_id, _get(whole, "record", dict), after


def _open_fields(record: OpenRecord) -> dict[str, Any]:
    return {
        "opened_at_s": record.opened_at_s,
        "expires_at_s": record.expires_at_s,
        "token_digest": record.token_digest,
        "kind": record.kind,
        "pictures": _spelled(record.pictures),
        "token_ids": record.token_ids,
        "image_tokens": record.image_tokens,
        "retry_key": record.retry_key,
    }


def _open_record(session_id: str, fields: dict, blob: Callable[[bytes], Blob]) -> OpenRecord:
    return OpenRecord(
        session_id=session_id,
        opened_at_s=_time(fields, "opened_at_s"),
        expires_at_s=_time(fields, "expires_at_s"),
        token_digest=_get(fields, "token_digest", str | None),
        kind=_get(fields, "kind", str),
        pictures=_pictures(fields, blob),
        token_ids=_ids(fields, "token_ids"),
        image_tokens=_get(fields, "image_tokens", int),
        retry_key=_get(fields, "retry_key", str | None),
    )


def _turn_fields(record: TurnRecord) -> dict[str, Any]:
    return {
        "prompt_ids": record.prompt_ids,
        "answer_ids": record.answer_ids,
        "pictures": _spelled(record.pictures),
        "retry_key": record.retry_key,
        "text": record.text,
        "facts": record.facts,
    }


def _turn_record(fields: dict, blob: Callable[[bytes], Blob]) -> TurnRecord:
    return TurnRecord(
        prompt_ids=_ids(fields, "prompt_ids"),
        answer_ids=_ids(fields, "answer_ids"),
        pictures=_pictures(fields, blob),
        retry_key=_get(fields, "retry_key", str | None),
        text=_get(fields, "text", str),
        facts=_get(fields, "facts", dict),
    )


def _spelled(pictures: tuple[Blob, ...]) -> list[str]:
    return [base64.b64encode(picture.data).decode("ascii") for picture in pictures]


def _pictures(fields: dict, blob: Callable[[bytes], Blob]) -> tuple[Blob, ...]:
    try:
        return tuple(blob(base64.b64decode(text, validate=True)) for text in _get(fields, "pictures", list))
    except (TypeError, ValueError, binascii.Error):
        raise Damaged("field 'pictures' is malformed") from None


def _ids(fields: dict, name: str) -> list[int]:
    ids = _get(fields, name, list)
    if not all(type(one) is int and one >= 0 for one in ids):
        raise Damaged(f"field '{name}' is malformed")
    return ids


def _time(fields: dict, name: str) -> float:
    value = _get(fields, name, int | float)
    if not 0 <= value <= 2**53:  # nor is NaN
        raise Damaged(f"field '{name}' is malformed")
    return float(value)


def _get(fields: dict, name: str, kind: Any) -> Any:
    if name not in fields or not isinstance(fields[name], kind) or isinstance(fields[name], bool):
        raise Damaged(f"field '{name}' is missing or malformed")
    return fields[name]
