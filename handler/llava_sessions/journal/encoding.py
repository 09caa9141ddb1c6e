"""Encode the records of a session as bytes and decode them.

A record is `<sha256 of the rest, hex>\\n<JSON>`. The JSON holds the schema, the session ID, the number of the record,
the checksum of the previous record, and the epoch of the owner that wrote it. A damaged, missing, swapped or stale
record is therefore detected, and never becomes part of another transcript. Data in a store is never unpickled.

The epoch is optional: records of version 0.1 have none and count as epoch 0. Unknown fields are ignored, so that an
older version can read the journal of a newer one. A record that an older version would take for another conversation
has a later schema, which makes it damaged for that version.

A stale record was written by an instance that had lost the session (owners.py). It was never acknowledged, and its
epoch distinguishes it from the owner's records.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..chat.media import ClipSpan, RecordMedia, by_message
from ..chat.transcript import BEFORE_OPENING, Blob, OpenRecord, Transcript, TurnRecord

SCHEMA = 1
# Of sessions without pictures, sessions with a history, and turns that replace others or show pictures in groups.
CONVERSATION_SCHEMA = 2
_CONVERSATION_FIELDS = {"history_turns", "groups", "base_turns"}
# Of records with clips that are more than the frames of an opening.
CLIP_SCHEMA = 3
_CLIP_FIELDS = {"clips"}
_SCHEMAS = (SCHEMA, CONVERSATION_SCHEMA, CLIP_SCHEMA)
_DIGEST_CHARS = 64
_NO_PICTURES = b'"pictures":[]'
_PIECE_BYTES = 3 * 2**16  # a multiple of 3, so that no base64 in the middle is padded
# Times above this many seconds are not exact in a float.
_MAX_TIME_S = 2**53


class Damaged(Exception):
    """Data that can't be trusted. The message gives the reason, and no content."""


@dataclass(frozen=True)
class Owner:
    """Who may append to a session: a process (`instance`, random) in its `epoch`. Each claim takes the next epoch."""

    epoch: int
    instance: str


@dataclass(frozen=True)
class OwnerRecord:
    """The owner of a session, and which records are valid: from number `start` on, those of epoch `since` or later.

    `retired`: the session was removed. `busy_until_s`: a turn of the owner runs, and keeps the session until then, in
    seconds since the epoch; 0 without a turn.
    """

    owner: Owner
    since: int = 0
    start: int = 0
    retired: bool = False
    busy_until_s: float = 0.0


def _from_base64(text: object) -> bytes:
    if not isinstance(text, str):
        raise ValueError("must be a string")
    return base64.b64decode(text, validate=True)  # its error is a ValueError


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


_Picture = Annotated[bytes, BeforeValidator(_from_base64)]
_Count = Annotated[int, Field(ge=0)]
_Groups = Annotated[tuple[_Count, ...], BeforeValidator(_as_tuple)]
_Time = Annotated[float, Field(ge=0, le=_MAX_TIME_S)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True)


class _Envelope(_Fields):
    """What surrounds a record."""

    session_id: str
    number: _Count
    after: str
    epoch: _Count = 0
    record: dict[str, Any]


class _ClipFields(_Fields):
    first: _Count
    blobs: _Count
    frames: _Count = 0
    digest: str = ""


_Clips = Annotated[tuple[_ClipFields, ...], BeforeValidator(_as_tuple)]


class _OpenFields(_Fields):
    opened_at_s: _Time
    expires_at_s: _Time
    token_digest: str | None
    kind: str
    pictures: list[_Picture]
    token_ids: list[_Count]
    image_tokens: int
    retry_key: str | None
    history_turns: _Count = 0
    groups: _Groups = ()
    clips: _Clips = ()


class _TurnFields(_Fields):
    prompt_ids: list[_Count]
    answer_ids: list[_Count]
    pictures: list[_Picture]
    retry_key: str | None
    text: str
    facts: dict[str, Any]
    base_turns: Annotated[int, Field(ge=BEFORE_OPENING)] | None = None
    groups: _Groups = ()
    clips: _Clips = ()


class _OwnerFields(_Fields):
    key: str
    epoch: _Count
    instance: str
    since: _Count
    start: _Count
    retired: bool
    busy_until_s: _Time = 0.0


_Model = TypeVar("_Model", bound=_Fields)


def key_of(session_id: str) -> str:
    """Return the name of a session in a store. IDs are secrets, and names are visible in listings."""
    return hashlib.sha256(session_id.encode()).hexdigest()[:40]


def encode(
    record: OpenRecord | TurnRecord, session_id: str, number: int, after: str, epoch: int = 0
) -> tuple[bytes, str]:
    """Return the bytes of a record and their checksum.

    `number` counts the records of the session from 0. `after` is the checksum of the previous record, or "".
    """
    model = _OpenFields if isinstance(record, OpenRecord) else _TurnFields
    clips = tuple(_ClipFields.model_construct(**vars(span)) for span in record.clips)
    fields = model.model_construct(**{**vars(record), "pictures": [], "clips": clips})
    # Fields of later versions are left out at their defaults, so that those records are as in earlier versions.
    dumped = fields.model_dump(exclude_defaults=True)
    is_empty = isinstance(record, OpenRecord) and not record.pictures
    schema = CONVERSATION_SCHEMA if is_empty or _CONVERSATION_FIELDS & dumped.keys() else SCHEMA
    schema = CLIP_SCHEMA if _CLIP_FIELDS & dumped.keys() else schema
    whole: dict[str, Any] = {"schema": schema, "session_id": session_id, "number": number, "after": after}
    if epoch:
        whole["epoch"] = epoch
    return _seal({**whole, "record": dumped}, [picture.data for picture in record.pictures])


def read_transcript(
    key: str, records: Iterable[bytes], blob: Callable[[bytes], Blob], since: int = 0, start: int = 0
) -> tuple[Transcript, list[str]]:
    """Return the transcript stored under `key`, and the checksums of its records. Raise `Damaged`.

    `records` are all records in order; `blob` makes a picture of its bytes. The transcript ends before the first stale
    record: one from number `start` on with an epoch before `since`, or one with an epoch before its predecessor's.
    """
    transcript: Transcript | None = None
    checksums: list[str] = []
    epoch = 0
    for number, data in enumerate(records):
        body, checksum = _unseal(data, f"record {number}")
        envelope = _envelope(body, number, key)
        if envelope.epoch < (max(epoch, since) if number >= start else epoch):
            break
        epoch = envelope.epoch
        if (envelope.number, envelope.after) != (number, checksums[-1] if checksums else ""):
            raise Damaged(f"record {number} does not follow the one before")
        if transcript is None:
            transcript = Transcript(_open_record(envelope, blob))
        else:
            transcript.append(_turn_record(envelope, blob))
        checksums.append(checksum)
    if transcript is None:
        raise Damaged("there is no record")
    return transcript, checksums


def checksum_of(data: bytes) -> str:
    """Return the checksum that a record claims, without verifying it."""
    return data[:_DIGEST_CHARS].decode("ascii", errors="replace")


def epoch_of(data: bytes) -> int:
    """Return the epoch that a record was written in. -1: the record is damaged."""
    try:
        body, _ = _unseal(data, "record")
        return _validate(_Envelope, body).epoch
    except Damaged:
        return -1


def encode_owner(record: OwnerRecord, key: str) -> bytes:
    """Return the bytes of the owner record of a session."""
    fields: dict[str, Any] = {"since": record.since, "start": record.start, "retired": record.retired}
    if record.busy_until_s:
        fields["busy_until_s"] = record.busy_until_s
    return _seal({"schema": SCHEMA, "key": key, **vars(record.owner), **fields})[0]


def decode_owner(data: bytes, key: str) -> OwnerRecord:
    """Return the owner record of the session `key`. Raise `Damaged`."""
    body, _ = _unseal(data, "the owner record")
    fields = _validate(_OwnerFields, body)
    if fields.key != key:
        raise Damaged("the owner record belongs to another session")
    owner = Owner(fields.epoch, fields.instance)
    return OwnerRecord(owner, fields.since, fields.start, fields.retired, fields.busy_until_s)


def _seal(whole: dict[str, Any], pictures: Sequence[bytes] = ()) -> tuple[bytes, str]:
    """Return the bytes of a record, with `pictures` in place of its empty array of pictures, and their checksum."""
    body = json.dumps(whole, separators=(",", ":"), allow_nan=False).encode("ascii")
    # The first one is that of the record: no field before it can have it, since quotes in strings are escaped.
    head, place, tail = body.partition(_NO_PICTURES) if pictures else (body, b"", b"")
    parts = [head, *(_picture_array(pictures) if place else ()), tail]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    checksum = digest.hexdigest()
    return b"".join([checksum.encode("ascii"), b"\n", *parts]), checksum


def _picture_array(pictures: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the JSON of the pictures, piece by piece: one call over 80 MB of pictures would hold the GIL for long."""
    yield _NO_PICTURES[:-1]
    for index, data in enumerate(pictures):
        yield b',"' if index else b'"'
        for start in range(0, len(data), _PIECE_BYTES):
            yield binascii.b2a_base64(data[start : start + _PIECE_BYTES], newline=False)
        yield b'"'
    yield b"]"


def _unseal(data: bytes, name: str) -> tuple[dict[str, Any], str]:
    """Return the JSON and the checksum of a record of a known schema."""
    checksum = data[:_DIGEST_CHARS]
    body = data[_DIGEST_CHARS + 1 :]
    has_newline = data[_DIGEST_CHARS : _DIGEST_CHARS + 1] == b"\n"
    if not has_newline or hashlib.sha256(body).hexdigest().encode("ascii") != checksum:
        raise Damaged(f"{name} does not match its checksum")
    try:
        whole = json.loads(body)
    except (ValueError, RecursionError):
        raise Damaged(f"{name} is no JSON") from None
    if not isinstance(whole, dict) or whole.get("schema") not in _SCHEMAS:
        raise Damaged(f"{name} has another schema than {SCHEMA} to {CLIP_SCHEMA}")
    return whole, checksum.decode("ascii")


def _envelope(body: dict[str, Any], number: int, key: str) -> _Envelope:
    envelope = _validate(_Envelope, body)
    try:
        belongs = key_of(envelope.session_id) == key
    except UnicodeEncodeError:
        belongs = False
    if not belongs:
        raise Damaged(f"record {number} belongs to another session")
    return envelope


def _open_record(envelope: _Envelope, blob: Callable[[bytes], Blob]) -> OpenRecord:
    fields = _validate(_OpenFields, envelope.record)
    return OpenRecord(**{**dict(fields), "session_id": envelope.session_id, **_media_of(fields, blob)})


def _turn_record(envelope: _Envelope, blob: Callable[[bytes], Blob]) -> TurnRecord:
    fields = _validate(_TurnFields, envelope.record)
    return TurnRecord(**{**dict(fields), **_media_of(fields, blob)})


def _media_of(fields: _OpenFields | _TurnFields, blob: Callable[[bytes], Blob]) -> dict[str, Any]:
    """Return the fields of a record's media. Raise `Damaged` for a clip that is not within a message."""
    pictures = tuple(blob(picture) for picture in fields.pictures)
    clips = tuple(ClipSpan(**dict(span)) for span in fields.clips)
    try:
        by_message(RecordMedia(pictures, fields.groups, clips))
    except ValueError:
        raise Damaged("field 'clips' is malformed") from None
    return {"pictures": pictures, "clips": clips}


def _validate(model: type[_Model], fields: dict[str, Any]) -> _Model:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        name = error.errors(include_input=False, include_context=False)[0]["loc"][0]
        raise Damaged(f"field '{name}' is missing or malformed") from None
