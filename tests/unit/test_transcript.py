"""A transcript derives lengths, spans and answers from its records."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from llava_sessions.chat.media import ClipSpan, MessageMedia, StoredClip, by_message, flattened
from llava_sessions.chat.transcript import (
    BEFORE_OPENING,
    BlobPool,
    OpenRecord,
    Transcript,
    TurnRecord,
    short_id,
)
from llava_sessions.errors import Refused
from llava_sessions.text.chat_template import OpenedOn


def turn(number: int, retry_key: str | None = None) -> TurnRecord:
    return TurnRecord([number, number], [number + 100], (), retry_key, f"answer {number}", {})


@pytest.fixture
def transcript() -> Transcript:
    picture = BlobPool().get(b"picture")
    return Transcript(OpenRecord("s", 0.0, 60.0, None, "image", (picture, picture), [1, 2, 2], 2))


def test_lengths_and_spans_follow_from_the_records(transcript):
    for number in (5, 6):
        transcript.append(turn(number))
    assert transcript.token_ids == [1, 2, 2, 5, 5, 105, 6, 6, 106]
    assert transcript.token_count == len(transcript.token_ids)
    assert [transcript.token_ids[start:end] for start, end in transcript.answer_spans] == [[105], [106]]


def test_the_first_prompt_follows_the_pictures_and_later_ones_do_not(transcript):
    assert transcript.opened_on == OpenedOn("image", 2)
    transcript.append(turn(5))
    assert transcript.opened_on is None


def test_a_clip_is_one_medium_however_many_frames_it_has() -> None:
    frame = BlobPool().get(b"frame")
    opened = Transcript(OpenRecord("s", 0.0, 60.0, None, "video", (frame,) * 8, [1, 2, 2], 2))
    assert opened.opened_on == OpenedOn("video", 1)
    assert opened.media == (MessageMedia(clips=(StoredClip((frame,) * 8),)),)


def test_pictures_and_clips_are_grouped_by_message() -> None:
    pool = BlobPool()
    one, two, file = (pool.get(data) for data in (b"one", b"two", b"file"))
    messages = (
        MessageMedia((one, two)),
        MessageMedia((two,), (StoredClip((one, one)), StoredClip((file,), 8, "digest"))),
        MessageMedia((), (StoredClip((one, two, one)),)),
    )
    flat = flattened([MessageMedia(), *messages])
    assert flat.pictures == (one, two, two, one, one, file, one, two, one)
    assert flat.groups == (2, 4, 3)
    assert flat.clips == (ClipSpan(3, 2), ClipSpan(5, 1, 8, "digest"), ClipSpan(6, 3))
    assert by_message(flat) == messages
    for message in messages:
        assert by_message(flattened([message])) == (message,)
        assert flattened([message]).groups == ()


def test_a_turn_that_replaces_the_opening_replaces_its_clip() -> None:
    pool = BlobPool()
    frame, file = pool.get(b"frame"), pool.get(b"file")
    transcript = Transcript(OpenRecord("s", 0.0, 60.0, None, "video", (frame, frame), [1, 2, 2], 2))
    shown = TurnRecord([3], [4], (file,), None, "", {}, clips=(ClipSpan(0, 1, 4),))
    transcript.append(shown)
    clip = MessageMedia(clips=(StoredClip((file,), 4),))
    assert transcript.media == (MessageMedia(clips=(StoredClip((frame, frame)),)), clip)
    transcript.append(replace(shown, base_turns=BEFORE_OPENING))
    assert transcript.media == (clip,)
    assert transcript.replaced_bytes == len(b"file")
    assert transcript.log[0].media == ()


def test_records_are_a_snapshot(transcript):
    before = transcript.records()
    transcript.append(turn(5))
    assert before == (transcript.opening,)
    assert transcript.records() == (transcript.opening, turn(5))


def test_a_retry_finds_the_latest_eight_keyed_turns(transcript):
    for number in range(9):
        transcript.append(turn(number, f"key {number}"))
        transcript.append(turn(number))
    assert transcript.find_answer("key 0") is None
    assert [transcript.find_answer(f"key {number}") for number in range(1, 9)] == list(range(2, 18, 2))
    transcript.append(turn(50, "key 8"))
    assert transcript.find_answer("key 8") == 18
    assert transcript.find_answer("key 1") is None


def test_held_bytes_follow_the_blobs_that_are_alive() -> None:
    pool = BlobPool(max_bytes=10)
    first = pool.get(b"aaaa")
    assert pool.get(b"aaaa") is first
    second = pool.get(b"bbbbbb")
    assert (pool.held_bytes, len(pool)) == (10, 2)
    with pytest.raises(Refused) as caught:
        pool.get(b"c")
    assert (caught.value.code, caught.value.status) == ("capacity", 429)
    assert pool.restore(b"cc").data == b"cc"  # it counts while it is alive
    assert pool.held_bytes == 10
    stored = pool.restore(b"cc")
    assert pool.held_bytes == 12
    del second, stored
    assert (pool.held_bytes, len(pool)) == (4, 1)
    again = pool.get(b"bbbbbb")
    assert pool.held_bytes == 10
    del first, again
    assert (pool.held_bytes, len(pool)) == (0, 0)


def test_blobs_are_counted_right_in_many_threads() -> None:
    pool = BlobPool()

    def use(number: int) -> None:
        for round_ in range(200):
            assert pool.get(bytes([number % 3, round_ % 5])).data
            assert pool.held_bytes % 2 == 0

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(8)))
    assert (pool.held_bytes, len(pool)) == (0, 0)


@pytest.mark.parametrize("prefix", ["ts-seq-", "implicit-", ""])
def test_a_short_id_has_eight_characters_of_the_random_part(prefix: str) -> None:
    assert short_id(f"{prefix}0123456789ab-cdef") == "01234567"
