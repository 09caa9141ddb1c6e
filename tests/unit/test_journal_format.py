"""The format on disk: journals of commit a10d9d0 load whole, and a hostile record is only ever damaged."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_sessions.chat.media import ClipSpan
from llava_sessions.chat.transcript import BlobPool, OpenRecord, Transcript, TurnRecord
from llava_sessions.journal import encoding
from llava_sessions.journal.encoding import (
    Damaged,
    Owner,
    OwnerRecord,
    decode_owner,
    encode,
    encode_owner,
    epoch_of,
    key_of,
    read_transcript,
)
from llava_sessions.journal.journal import Journal, Removal, StoredSession
from tests.support.journals import _closing, again, file_of, folder, resealed, stores, warnings

__all__ = ["_closing", "folder"]  # fixtures
pytestmark = pytest.mark.usefixtures("_closing")

FIXTURE = Path(__file__).parent / "fixtures" / "journal_a10d9d0"
OPENED_S = 1_790_000_000.25
EXPIRES_S = 4_000_000_000.5
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
FACTS = {"finish_reason": "stop", "usage": {"prompt_tokens": 11, "completion_tokens": 3}, "durable": True}
DIGEST = "0123456789abcdef" * 4


def written_by_a10d9d0(blobs: BlobPool) -> list[Transcript]:
    """What the fixture's write.py has saved."""
    picture = blobs.get(PNG)
    second = blobs.get(b"\x00\xff a second picture")
    image = Transcript(OpenRecord("ls-image", OPENED_S, EXPIRES_S, None, "image", (picture,), [1, 32000, 32000], 2))
    for number in range(3):
        shown = (picture, second) if number == 1 else ()
        words = f'answer {number}: ünï \u4f60\u597d \U0001f60a \ud800 "quoted"\n'
        image.append(TurnRecord([10 + number, 5], [9] * number, shown, None, words, FACTS))
    clip = Transcript(
        OpenRecord("ls-clip", OPENED_S, EXPIRES_S, None, "video", (picture, second, picture), [1, 32001], 1),
        [TurnRecord([7], [], (), None, "", {})],
    )
    bound = OpenRecord("ls-bound", OPENED_S, EXPIRES_S, DIGEST, "image", (second,), [1, 32000], 1, "open key")
    turns = [TurnRecord([4, 2], [8, 2**40], (), f"turn key {n}", f"n {n}", {"n": n}) for n in range(2)]
    return [image, clip, Transcript(bound, turns)]


@pytest.fixture
def old(folder: Path) -> Journal:
    """A journal over a copy of the fixture."""
    shutil.copytree(FIXTURE, folder, ignore=shutil.ignore_patterns("*.py", ".git*"))
    return again(folder)


def test_a_journal_of_a10d9d0_is_recovered_and_claimed_whole(old, caplog):
    expected = written_by_a10d9d0(old.blobs)
    recovered = old.recover(OPENED_S)
    assert recovered.expired == []
    assert sorted(recovered.live, key=lambda stored: stored.session_id) == [
        StoredSession("ls-bound", EXPIRES_S, DIGEST, "open key"),
        StoredSession("ls-clip", EXPIRES_S, None, None),
        StoredSession("ls-image", EXPIRES_S, None, None),
    ]
    for transcript in expected:
        opening = transcript.opening
        found = old.claim(opening.session_id, OPENED_S, opening.token_digest)
        assert found.records() == transcript.records()
        assert [picture.data for picture in found.opening.pictures] == [picture.data for picture in opening.pictures]
    assert warnings(caplog) == []


def test_a_session_of_a10d9d0_goes_on_and_its_records_stay(old, folder):
    before = [file_of(folder, "ls-image", number).read_bytes() for number in range(4)]
    story = old.claim("ls-image", OPENED_S, None)
    story.append(TurnRecord([3], [4], (), None, "new", {}))
    assert stores(old, story)
    assert [file_of(folder, "ls-image", number).read_bytes() for number in range(4)] == before
    assert again(folder).claim("ls-image", OPENED_S, None).records() == story.records()


def test_todays_records_differ_from_those_of_a10d9d0_by_the_epoch_only(old, folder):
    story = old.claim("ls-image", OPENED_S, None)
    story.append(story.turns[-1])
    assert stores(old, story)
    before, now = (json.loads(file_of(folder, "ls-image", n).read_bytes()[65:]) for n in (3, 4))
    assert now.pop("epoch") == 1
    assert list(now) == list(before)
    assert now["record"] == before["record"]


def test_a_session_of_a10d9d0_that_nobody_claimed_is_removed_whole(old, folder):
    old.recover(OPENED_S)
    assert old.forget("ls-clip").result(10) is Removal.REMOVED
    assert not (folder / key_of("ls-clip")).exists()
    assert old.sweep(EXPIRES_S + 121).result(10)
    assert old.flush(10)
    assert list(folder.iterdir()) == []


# --- hostile records ---

values: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "no base64!", "é", "AAAA", 10**400, float("nan"), float("inf"), -1, 2**60]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
blobs = BlobPool()
opening = OpenRecord("chat", 1.0, 2.0, None, "image", (blobs.get(b"picture"),), [1], 1)
turn = TurnRecord([1], [2], (), None, "text", {})


def sealed(whole: dict[str, Any]) -> bytes:
    body = json.dumps(whole).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([opening, turn]),
    st.dictionaries(
        st.sampled_from(["schema", "session_id", "number", "after", "epoch", "record"]), values, max_size=2
    ),
    st.dictionaries(
        st.sampled_from([*vars(opening), *vars(turn)]),
        values | st.lists(st.fixed_dictionaries(dict.fromkeys(["first", "blobs", "frames"], st.integers(0, 2)))),
        max_size=2,
    ),
)
def test_a_hostile_record_is_read_or_damaged_and_nothing_else(record, envelope, fields):
    first, digest = encode(opening, "chat", 0, "")
    number = 0 if record is opening else 1
    data, _ = encode(record, "chat", number, digest if number else "", 0)
    whole = json.loads(data[65:])
    whole["record"] |= fields
    hostile = sealed(whole | envelope)
    assert epoch_of(hostile) >= -1
    try:
        transcript, _ = read_transcript(key_of("chat"), [hostile] if number == 0 else [first, hostile], blobs.get)
    except Damaged:
        return
    for message in transcript.media:
        assert all(clip.blobs for clip in message.clips)
    for token in transcript.token_ids:
        assert type(token) is int
        assert token >= 0


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["schema", "key", "epoch", "instance", "since", "start", "retired"]), values, max_size=2
    )
)
def test_a_hostile_owner_record_is_read_or_damaged_and_nothing_else(fields):
    key = key_of("chat")
    whole = json.loads(encode_owner(OwnerRecord(Owner(3, "instance")), key)[65:])
    try:
        owner = decode_owner(sealed(whole | fields), key)
    except Damaged:
        return
    assert min(owner.owner.epoch, owner.since, owner.start) >= 0


@pytest.mark.parametrize("name", ["prompt_ids", "answer_ids", "pictures", "retry_key", "text", "facts"])
def test_a_missing_field_of_a_turn_is_damage(old, folder, name):
    resealed(file_of(folder, "ls-clip", 1), lambda whole: whole["record"].pop(name))
    records = [file_of(folder, "ls-clip", number).read_bytes() for number in range(2)]
    with pytest.raises(Damaged, match=f"field '{name}' is missing or malformed"):
        read_transcript(key_of("ls-clip"), records, blobs.get)


def test_a_field_that_is_not_known_is_ignored(old, folder):
    resealed(file_of(folder, "ls-clip", 0), lambda whole: whole.update(later="a field of a later version"))
    first = file_of(folder, "ls-clip", 0).read_bytes()
    assert read_transcript(key_of("ls-clip"), [first], blobs.get)[0].opening.session_id == "ls-clip"


@pytest.mark.parametrize(
    ("schema", "changes"),
    [
        (1, {}),
        (2, {"base_turns": 0}),
        (2, {"base_turns": -1}),
        (2, {"groups": (1, 1)}),
        (2, {"history_turns": 1}),
        (3, {"clips": (ClipSpan(0, 2),)}),
        (3, {"clips": (ClipSpan(1, 1, 8, DIGEST),), "groups": (1, 1)}),
        (3, {"clips": (ClipSpan(1, 1, 8, DIGEST),), "base_turns": 0}),
    ],
)
def test_what_an_older_version_would_misread_has_another_schema(schema: int, changes: dict[str, Any]) -> None:
    """Without these fields a record is another conversation: the older version is to reject it."""
    blobs = BlobPool()
    pictures = (blobs.get(PNG), blobs.get(b"another"))
    if {"history_turns", "groups", "clips"} >= changes.keys():
        record = replace(OpenRecord("ls-1", OPENED_S, EXPIRES_S, None, "image", pictures, [1, 32000], 1), **changes)
        data, _ = encode(record, "ls-1", 0, "")
        assert read_transcript(key_of("ls-1"), [data], blobs.get)[0].opening == record
    else:
        first, checksum = encode(opening, "chat", 0, "")
        added = TurnRecord([1], [2], pictures, None, "", {}, **changes)
        data, _ = encode(added, "chat", 1, checksum)
        assert read_transcript(key_of("chat"), [first, data], blobs.get)[0].log == (added,)
    assert json.loads(data[65:])["schema"] == schema


@pytest.mark.parametrize(
    "clips",
    [
        [{"first": 2, "blobs": 1}],  # outside the record
        [{"first": 0, "blobs": 2}],  # in two messages
        [{"first": 0, "blobs": 0}],
        [{"first": 1, "blobs": 1}, {"first": 0, "blobs": 1}],
        [{"first": -1, "blobs": 1}],
        [{"first": 0}],
        "clip",
    ],
)
def test_a_clip_that_is_not_within_a_message_is_damage(clips: Any) -> None:
    pictures = (blobs.get(PNG), blobs.get(b"another"))
    record = replace(opening, pictures=pictures, groups=(1, 1), clips=(ClipSpan(0, 1),))
    whole = json.loads(encode(record, "chat", 0, "")[0][65:])
    whole["record"]["clips"] = clips
    with pytest.raises(Damaged, match="field 'clips' is m"):
        read_transcript(key_of("chat"), [sealed(whole)], blobs.get)


def test_the_frames_of_a_file_are_one_blob() -> None:
    record = replace(opening, pictures=(blobs.get(PNG), blobs.get(b"another")), clips=(ClipSpan(0, 2, frames=8),))
    with pytest.raises(Damaged, match="field 'clips' is malformed"):
        read_transcript(key_of("chat"), [encode(record, "chat", 0, "")[0]], blobs.get)


@pytest.mark.parametrize("schema", [0, 4, None, "3"])
def test_a_record_of_a_schema_that_is_not_known_is_damage(schema: Any) -> None:
    whole = json.loads(encode(opening, "chat", 0, "")[0][65:])
    with pytest.raises(Damaged, match="another schema than 1 to 3"):
        read_transcript(key_of("chat"), [sealed({**whole, "schema": schema})], blobs.get)


def test_a_session_without_pictures_has_another_schema() -> None:
    data, _ = encode(OpenRecord("ls-1", OPENED_S, EXPIRES_S, None, "image", (), [], 0), "ls-1", 0, "")
    assert json.loads(data[65:])["schema"] == 2


def test_a_record_is_the_json_of_its_fields_and_is_made_in_pieces() -> None:
    blobs = BlobPool()
    sizes = (0, 1, 2, 3 * 2**16, 3 * 2**16 + 1, 500_000)
    pictures = tuple(blobs.get(bytes([size % 251]) * size) for size in sizes)
    facts = {"pictures": [], "quoted": '"pictures":[]'}
    turn = TurnRecord([1], [2], pictures, '"pictures":[]', '"pictures":[]', facts)
    data, checksum = encode(turn, '"pictures":[]', 1, "before")
    body = data.split(b"\n", 1)[1]
    assert hashlib.sha256(body).hexdigest() == checksum == data[:64].decode()
    record = json.loads(body)["record"]
    assert record["pictures"] == [base64.b64encode(picture.data).decode() for picture in pictures]
    assert (record["facts"], record["retry_key"], record["text"]) == (facts, turn.retry_key, turn.text)
    assert body == json.dumps(json.loads(body), separators=(",", ":")).encode()
    assert max(map(len, encoding._picture_array([one.data for one in pictures]))) <= 2**18
