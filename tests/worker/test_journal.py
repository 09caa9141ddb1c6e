"""The journal: what was acknowledged is found again, whole and in its own session, or not at all; a store that fails
costs no more than that.

Files, kills, limits and full disks are real ones; S3 is moto's.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_sessions.chat.transcript import Blob, BlobPool, OpenRecord, Transcript, TurnRecord
from llava_sessions.config_file import ConfigError
from llava_sessions.journal.encoding import Damaged, encode, key_of, read_transcript
from llava_sessions.journal.journal import (
    Journal,
    JournalUnavailable,
    Removal,
    SaveOutcome,
    StoredSession,
    open_journal,
)
from llava_sessions.journal.stores import DirectoryStore, S3Store, record_name
from tests.support import journal_child
from tests.support.journals import (
    EXPIRES,
    LATER,
    NOW,
    PREFIX,
    TOKEN_DIGEST,
    _closing,
    add_turn,
    again,
    bucket,
    file_of,
    folder,
    journal,
    objects,
    opening,
    peek,
    read,
    records,
    resealed,
    saved,
    stores,
    warnings,
)
from tests.support.product_log import product_records

__all__ = ["_closing", "bucket", "folder", "journal"]  # fixtures

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
pytestmark = pytest.mark.usefixtures("_closing")


# --- what is written is found ---


def test_a_story_comes_back_as_it_was(journal, folder):
    story = saved(journal)
    assert read(again(folder), "chat-1").records() == story.records()
    assert read(journal, "chat-1").records() == story.records()


def test_one_save_of_many_turns_is_as_good_as_many_saves(journal, folder):
    story = opening(journal)
    for _ in range(4):
        add_turn(story, journal.blobs)
    assert stores(journal, story, 10)
    assert read(again(folder), "chat-1").records() == story.records()


def test_a_save_writes_what_the_story_was_when_it_was_asked_for(journal, folder):
    story = opening(journal)
    first = journal.save(story)
    add_turn(story, journal.blobs)
    assert first.result(10) is SaveOutcome.STORED
    assert read(again(folder), "chat-1").turns == ()


def test_a_story_that_was_read_goes_on_and_nothing_is_written_twice(journal, folder):
    saved(journal, turns=2)
    before = file_of(folder, "chat-1", 0).stat()
    journal = again(folder)
    story = add_turn(read(journal, "chat-1"), journal.blobs)
    assert stores(journal, story, 10)
    after = file_of(folder, "chat-1", 0).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert read(again(folder), "chat-1").records() == story.records()


def test_a_record_is_its_checksum_and_json(journal, folder):
    saved(journal, turns=1)
    digest, body = file_of(folder, "chat-1", 1).read_bytes().split(b"\n", 1)
    assert digest.decode() == hashlib.sha256(body).hexdigest()
    whole = json.loads(body)
    assert (whole["schema"], whole["session_id"], whole["number"]) == (1, "chat-1", 1)
    assert whole["after"] == file_of(folder, "chat-1", 0).read_bytes()[:64].decode()


def test_an_unknown_session_is_none_and_no_session_is_no_file(journal, folder):
    assert read(journal, "nobody") is None
    assert journal.recover(NOW).live == []
    assert not folder.exists()


def test_without_a_store_everything_is_fine_and_nothing_is_kept():
    journal = Journal()
    story = opening(journal)
    assert not journal.durable
    assert stores(journal, story, 0)
    assert journal.forget("chat-1").result(0) is Removal.REMOVED
    assert journal.sweep(NOW).result(0)
    assert read(journal, "chat-1") is None
    assert (journal.recover(NOW).live, journal.failures_total, journal.close(0)) == ([], 0, True)


def test_only_the_servers_user_may_read(journal, folder):
    umask = os.umask(0)
    try:
        saved(journal)
    finally:
        os.umask(umask)
    modes = {path.is_dir(): stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert modes == {True: 0o700, False: 0o600}
    assert not any("chat-1" in str(path) for path in folder.rglob("*"))


ids = st.lists(st.integers(0, 2**40), max_size=20)
texts = st.text(max_size=60)
facts = st.dictionaries(
    texts, st.none() | st.booleans() | st.integers() | texts | st.floats(allow_nan=False, allow_infinity=False)
)
pictures = st.lists(st.binary(max_size=200), max_size=3)


@settings(max_examples=80, deadline=None)
@given(
    st.from_regex(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,30}", fullmatch=True),
    st.tuples(st.none() | texts, pictures, ids),
    st.lists(st.tuples(ids, ids, pictures, st.none() | texts, texts, facts), max_size=4),
)
def test_any_story_survives_its_spelling(session_id, begin, turns):
    blobs = BlobPool()

    def of(data: list[bytes]) -> tuple[Blob, ...]:
        return tuple(blobs.get(one) for one in data)

    story = Transcript(OpenRecord(session_id, NOW, EXPIRES, begin[0], "video", of(begin[1]), begin[2], 3))
    for prompt, answer, shown, *rest in turns:
        story.append(TurnRecord(prompt, answer, of(shown), *rest))
    spelled, digests, digest = [], [], ""
    for number, record in enumerate(story.records()):
        data, digest = encode(record, session_id, number, digest)
        spelled.append(data)
        digests.append(digest)
    decoded, checksums = read_transcript(key_of(session_id), spelled, BlobPool().get)
    assert (decoded.records(), checksums) == (story.records(), digests)
    assert [picture.data for picture in decoded.opening.pictures] == begin[1]


def test_equal_pictures_are_one_object_while_any_story_holds_it(journal, folder):
    first, second = journal.blobs.get(b"same" * 100), journal.blobs.get(bytes(b"same" * 100))
    assert first is second
    assert journal.blobs.get(b"other") is not first
    assert first.sha256 == hashlib.sha256(b"same" * 100).hexdigest()
    assert "same" not in repr(first)
    story = opening(journal, pictures=(first,))
    assert stores(journal, story, 10)
    assert read(journal, "chat-1").opening.pictures[0] is first
    del first, second, story
    gc.collect()
    assert len(journal.blobs) == 0


# --- order ---


def test_many_sessions_at_once_are_each_written_in_order(journal, folder):
    stories = [opening(journal, f"chat-{n}") for n in range(16)]
    saves = []

    def chat(story: Transcript) -> None:
        saves.extend([journal.save(add_turn(story, journal.blobs)) for _ in range(12)])

    threads = [threading.Thread(target=chat, args=(story,)) for story in stories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.flush(60)
    assert all(save.result(0) is SaveOutcome.STORED for save in saves)
    reader = again(folder)
    assert [read(reader, story.opening.session_id).records() for story in stories] == [s.records() for s in stories]


class HeldStore(DirectoryStore):
    """A directory that writes when it is let."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.begun, self.let = threading.Event(), threading.Event()

    def create(self, key: str, name: str, data: bytes) -> bool:
        self.begun.set()
        assert self.let.wait(30)
        return super().create(key, name, data)


def test_a_slow_store_holds_no_caller_up_and_a_forget_waits_behind_its_saves(folder):
    store = HeldStore(str(folder))
    journal = Journal([store])
    save, forget = journal.save(opening(journal)), journal.forget("chat-1")
    assert not save.done()
    assert not journal.flush(0)
    store.let.set()
    assert save.result(10) is SaveOutcome.STORED
    assert forget.result(10)
    assert journal.flush(10)
    assert read(journal, "chat-1") is None
    assert list(folder.iterdir()) == []


def test_closing_gives_up_what_has_not_begun_and_tells_so(folder):
    store = HeldStore(str(folder))
    journal = Journal([store])
    story = opening(journal)
    first, second = journal.save(story), journal.save(add_turn(story, journal.blobs))
    assert store.begun.wait(10)
    assert not journal.close(0)
    assert second.result(10) is SaveOutcome.FAILED
    store.let.set()
    assert first.result(10) is SaveOutcome.STORED
    assert not stores(journal, story, 10)
    assert read(again(folder), "chat-1").turns == ()


# --- crashes ---


def child(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.support.journal_child", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def test_killed_while_it_saves_it_loses_nothing_acknowledged_and_tears_nothing(folder, caplog):
    moments, acknowledged = random.Random(4), {}
    for _ in range(8):
        with child("chat", str(folder)) as process:
            for _ in range(moments.randrange(1, 60)):
                session_id, turns = process.stdout.readline().split()
                acknowledged[session_id] = int(turns)
            process.kill()
            for line in process.stdout:  # what it said before it died counts too
                if line.endswith("\n"):
                    session_id, turns = line.split()
                    acknowledged[session_id] = int(turns)
            process.stderr.close()
    journal = again(folder)
    found = {head.session_id: read(journal, head.session_id, token_digest=None) for head in journal.recover(NOW).live}
    assert warnings(caplog) == []
    for session_id, turns in acknowledged.items():
        story = found[session_id]
        assert len(story.turns) in (turns, turns + 1)
        assert story.turns == tuple(journal_child.turn(session_id, number) for number in range(len(story.turns)))


@pytest.mark.parametrize(("moment", "turns"), [("fsync", 1), ("link", 1), ("after-link", 2)])
def test_killed_in_the_middle_of_a_save_its_record_is_there_or_not(folder, caplog, moment, turns):
    process = child("die", str(folder), moment)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    journal = again(folder)
    assert journal.recover(NOW).live == [StoredSession("chat", journal_child.EXPIRES_S, None, None)]
    story = read(journal, "chat", token_digest=None)
    assert story.turns == tuple(journal_child.turn("chat", number) for number in range(turns))
    assert stores(journal, add_turn(story, journal.blobs), 10)
    assert read(again(folder), "chat", token_digest=None).records() == story.records()
    assert warnings(caplog) == []


def test_what_a_killed_writer_left_is_tidied_once_no_living_one_can_own_it(journal, folder):
    story = opening(journal, expires_at_s=2.0**40)
    assert stores(journal, story, 10)
    young, old, gone = folder / f".new-{1:016x}", folder / f".new-{2:016x}", folder / f".gone-{3:016x}"
    for path in (young, old):
        path.write_bytes(b"half a rec")
    now = young.stat().st_mtime
    os.utime(old, (now - 601, now - 601))
    empty = folder / ("0" * 40)
    empty.mkdir()
    os.utime(empty, (now - 601, now - 601))
    gone.mkdir()
    (gone / "000001.rec").write_bytes(b"of a closed session")
    journal.recover(now)
    assert (young.exists(), old.exists(), empty.exists(), gone.exists()) == (True, False, False, False)
    assert read(again(folder), "chat-1", now).records() == story.records()


def test_tidying_leaves_what_no_store_has_made(folder):
    store = DirectoryStore(str(folder))
    assert store.create("a" * 40, "000000.rec", b"record")
    foreign = {
        name: folder / name for name in ("empty", ".new-theirs", ".gone-theirs", "0" * 39, "lost+found", "A" * 40)
    }
    for name, path in foreign.items():
        path.write_bytes(b"theirs") if name.startswith(".new") else path.mkdir()
    target = folder / "target"
    target.mkdir()
    link = folder / f".gone-{4:016x}"
    link.symlink_to(target)
    file = folder / ("b" * 40)
    file.write_bytes(b"theirs")
    left = folder / ("0" * 40)
    left.mkdir()
    now = left.stat().st_mtime
    for path in [*foreign.values(), target, file, left]:
        os.utime(path, (now - 10_000, now - 10_000))
    store.tidy(now)
    assert not left.exists()
    assert all(path.exists() for path in [*foreign.values(), target, link, file])
    assert store.numbers("a" * 40) == [0]
    DirectoryStore(str(folder / "absent")).tidy(now)


# --- damage ---


def assert_gone(folder: Path, caplog: pytest.LogCaptureFixture, reason: str, session_id: str = "chat-1") -> None:
    """The session is skipped by one line each, which tells no secret; others are untouched."""
    caplog.clear()
    journal = again(folder)
    assert session_id not in [head.session_id for head in journal.recover(NOW).live]
    assert read(journal, session_id) is None
    recovering, reading = warnings(caplog)
    for line in (recovering, reading):
        assert re.search(reason, line), line
        assert line.startswith("journal_damaged store=directory session=")
    assert session_id[:8] in reading
    assert session_id not in recovering + reading or len(session_id) <= 8


def test_a_flipped_bit_anywhere_is_noticed(journal, folder):
    saved(journal, turns=2)
    for number in range(3):
        path = file_of(folder, "chat-1", number)
        good = path.read_bytes()
        others = {n: file_of(folder, "chat-1", n).read_bytes() for n in range(3)}
        for position in range(len(good)):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            with pytest.raises(Damaged):
                read_transcript(
                    key_of("chat-1"), [bytes(bad) if n == number else others[n] for n in range(3)], BlobPool().get
                )


@pytest.mark.parametrize("position", [0, 40, 64, 65, 80, -1])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_session_with_a_flipped_bit_is_skipped(journal, folder, caplog, number, position):
    saved(journal, "a-long-session-id", turns=2)
    other = saved(journal, "chat-2")
    path = file_of(folder, "a-long-session-id", number)
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
    assert_gone(folder, caplog, f"record {number} does not match its checksum", "a-long-session-id")
    assert read(again(folder), "chat-2").records() == other.records()


@pytest.mark.parametrize("length", [0, 10, 64, 65, 200, -1])
def test_a_truncated_record_is_noticed(journal, folder, caplog, length):
    saved(journal)
    path = file_of(folder, "chat-1", 2)
    path.write_bytes(path.read_bytes()[:length])
    assert_gone(folder, caplog, "record 2 does not match its checksum")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_record_is_noticed(journal, folder, caplog, number):
    saved(journal)
    file_of(folder, "chat-1", number).unlink()
    assert_gone(folder, caplog, "a record is missing")


@pytest.mark.parametrize("number", [0, 1])
def test_records_that_changed_places_with_another_sessions_are_noticed(journal, folder, caplog, number):
    for session_id in ("chat-1", "chat-2"):
        saved(journal, session_id)
    here, there = (file_of(folder, session_id, number) for session_id in ("chat-1", "chat-2"))
    here.rename(folder / "aside")
    there.rename(here)
    (folder / "aside").rename(there)
    journal = again(folder)
    assert journal.recover(NOW).live == []
    caplog.clear()
    assert read(journal, "chat-1") is None
    assert read(journal, "chat-2") is None
    assert all(f"record {number} belongs to another session" in line for line in warnings(caplog))


def test_a_whole_session_under_anothers_name_is_noticed(journal, folder, caplog):
    for session_id in ("chat-1", "chat-2"):
        saved(journal, session_id)
    shutil.rmtree(folder / key_of("chat-1"))
    (folder / key_of("chat-2")).rename(folder / key_of("chat-1"))
    assert_gone(folder, caplog, "the owner record belongs to another session")
    (folder / key_of("chat-1") / "owner").unlink()
    assert_gone(folder, caplog, "record 0 belongs to another session")


def test_records_that_changed_places_within_a_session_are_noticed(journal, folder, caplog):
    saved(journal)
    first, second = file_of(folder, "chat-1", 1), file_of(folder, "chat-1", 2)
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    assert_gone(folder, caplog, "record 1 does not follow the one before")


def test_a_record_of_another_course_of_the_same_session_is_noticed(journal, folder, caplog, tmp_path):
    saved(journal, turns=1)
    elsewhere = Journal([DirectoryStore(str(tmp_path / "elsewhere"))])
    story = opening(elsewhere)
    story.append(TurnRecord([666], [], (), None, "", {}))
    assert stores(elsewhere, add_turn(story, elsewhere.blobs), 10)
    shutil.copy(file_of(tmp_path / "elsewhere", "chat-1", 2), file_of(folder, "chat-1", 2))
    assert_gone(folder, caplog, "record 2 does not follow the one before")


def test_another_schema_is_skipped(journal, folder, caplog):
    saved(journal, turns=0)
    resealed(file_of(folder, "chat-1", 0), lambda whole: whole.update(schema=4))
    assert_gone(folder, caplog, "record 0 has another schema than 1 to 3")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_ids", ["1"]),
        ("token_ids", [-1]),
        ("token_ids", [True]),
        ("token_ids", None),
        ("pictures", ["no base64!"]),
        ("pictures", [7]),
        ("expires_at_s", float("nan")),
        ("expires_at_s", 10**400),
        ("expires_at_s", True),
        ("expires_at_s", "soon"),
        ("token_digest", 5),
        ("kind", None),
        ("image_tokens", 1.5),
    ],
)
def test_a_field_of_the_wrong_kind_is_noticed(journal, folder, caplog, name, value):
    saved(journal, turns=0)
    resealed(file_of(folder, "chat-1", 0), lambda whole: whole["record"].update({name: value}))
    assert_gone(folder, caplog, f"field '{name}' is")


@pytest.mark.parametrize("body", [b"[]", b"7", b"{", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_what_is_no_record_at_all_is_noticed(journal, folder, caplog, body):
    saved(journal, turns=0)
    file_of(folder, "chat-1", 0).write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    assert_gone(folder, caplog, "record 0 (is no JSON|has another schema)")


def test_foreign_files_are_let_alone(journal, folder):
    story = saved(journal)
    (folder / "README").write_text("mine")
    (folder / key_of("chat-1") / "notes.txt").write_text("mine")
    reader = again(folder)
    assert [head.session_id for head in reader.recover(NOW).live] == ["chat-1"]
    assert read(reader, "chat-1").records() == story.records()
    assert (folder / "README").exists()


# --- time and forgetting ---


def test_recovering_tells_the_living_from_the_expired(journal, folder):
    saved(journal, "chat-1")
    assert stores(journal, opening(journal, "chat-2", expires_at_s=NOW - 1, token_digest=None), 10)
    recovered = again(folder).recover(NOW)
    assert recovered.live == [StoredSession("chat-1", EXPIRES, TOKEN_DIGEST, None)]
    assert recovered.expired == [StoredSession("chat-2", NOW - 1, None, None)]


def test_an_expired_session_is_not_read_and_its_records_go_soon_after(journal, folder):
    saved(journal)
    reader = again(folder)  # another worker, which did not write it
    assert read(reader, "chat-1", EXPIRES - 0.001) is not None
    assert read(reader, "chat-1", EXPIRES) is None
    assert reader.sweep(LATER - 2).result(10)
    assert reader.flush(10)
    assert file_of(folder, "chat-1", 0).exists(), "a running turn may still end"
    assert reader.sweep(LATER).result(10)
    assert reader.flush(10)
    assert list(folder.iterdir()) == []
    assert journal.sweep(LATER).result(10), "the one that wrote it finds nothing to do"


def test_records_that_expired_are_removed_at_start(journal, folder):
    saved(journal)
    reader = again(folder)
    assert reader.recover(LATER).live == []
    assert reader.flush(10)
    assert list(folder.iterdir()) == []


def test_what_cannot_be_read_goes_when_no_session_could_live_any_more(journal, folder):
    saved(journal)
    file_of(folder, "chat-1", 0).write_bytes(b"damaged")
    changed = (folder / key_of("chat-1")).stat().st_mtime
    reader = again(folder)
    for age, stays in [(86_400, True), (86_400 + 121, False)]:
        assert reader.sweep(changed + age).result(10)
        assert reader.flush(10)
        assert (folder / key_of("chat-1")).exists() is stays


def test_a_forgotten_session_is_nowhere_and_others_stay(journal, folder):
    saved(journal)
    other = saved(journal, "chat-2")
    assert journal.forget("chat-1").result(10) is Removal.REMOVED
    assert journal.forget("nobody").result(10) is Removal.REMOVED
    assert read(journal, "chat-1") is None
    reader = again(folder)
    assert [head.session_id for head in reader.recover(NOW).live] == ["chat-2"]
    assert read(reader, "chat-2").records() == other.records()
    assert [path.name for path in folder.iterdir()] == [key_of("chat-2")]


def test_nothing_of_a_forgotten_session_is_kept_in_memory(journal):
    for number in range(5):
        saved(journal, f"chat-{number}", turns=1)
        assert journal.forget(f"chat-{number}").result(10) is Removal.REMOVED
    assert journal.tracked_sessions == 0
    assert journal.flush(10)
    assert journal.flush(0)


# --- a directory that fails ---


def test_a_file_size_limit_is_met_with_one_warning_and_caught_up_behind_it(folder):
    process = child("limit", str(folder))
    output, log = process.communicate(timeout=60)
    assert output.strip() == "[True, False, False, False, True] 3 []"
    warning, works = log.strip().splitlines()
    assert re.match(r"WARNING journal_failing store=directory work=write reason=can't write: File too large", warning)
    assert works.startswith("INFO journal_works_again store=directory")
    story = read(again(folder), "chat", token_digest=None)
    assert [turn.prompt_ids for turn in story.turns] == [[0], [1], [2]]


def test_a_full_disk_is_no_acknowledgement(tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        journal = Journal([DirectoryStore(str(disk / "journal"))])
        story = saved(journal, turns=1)
        for _ in range(3):
            large = (journal.blobs.get(os.urandom(60_000)),)
            tried = Transcript(story.opening, [*story.turns, TurnRecord([1], [2], large, None, "", {})])
            assert not stores(journal, tried, 10)
        (warning,) = warnings(caplog)
        assert "No space left on device" in warning
        assert journal.failures_total == 3
        assert len(peek(DirectoryStore(str(disk / "journal")), "chat-1").turns) == 1, (
            "what was acknowledged is still there"
        )
        story.append(TurnRecord([1], [2], (), None, "", {}))
        assert stores(journal, story, 10)
        assert read(again(disk / "journal"), "chat-1").records() == story.records()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_directory_that_cannot_be_is_a_warning_at_start_and_no_acknowledgement(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    place = tmp_path / "place"
    place.write_text("a file")
    journal = open_journal(str(place / "journal"), None)
    (warning,) = warnings(caplog)
    assert warning.startswith("journal_failing store=directory work=write reason=can't write: Not a directory; chats")
    story = opening(journal)
    assert journal.recover(NOW).live == []
    for _ in range(3):
        assert not stores(journal, add_turn(story, journal.blobs), 10)
    assert read(journal, "chat-1") is None
    assert journal.failures_total == 4
    assert len(warnings(caplog)) == 1, "one for the whole outage"
    place.unlink()
    assert stores(journal, story, 10)
    assert read(again(place / "journal"), "chat-1").records() == story.records()
    assert [record.levelname for record in product_records(caplog)] == ["WARNING", "INFO"]
    shutil.rmtree(place)
    place.write_text("a file again")
    assert not stores(journal, add_turn(story, journal.blobs), 10)
    assert len(warnings(caplog)) == 2, "the next outage is told again"


def test_a_save_that_ends_half_way_is_caught_up_from_there(journal, folder):
    story = opening(journal)
    for _ in range(3):
        add_turn(story, journal.blobs)
    in_the_way = file_of(folder, "chat-1", 2)
    in_the_way.mkdir(parents=True)
    assert not stores(journal, story, 10)
    in_the_way.rmdir()
    assert peek(DirectoryStore(str(folder)), "chat-1").records() == story.records()[:2]
    assert stores(journal, story, 10)
    assert read(again(folder), "chat-1").records() == story.records()


def test_a_directory_that_is_fine_is_no_warning_and_a_bad_spelling_is_every_problem(folder, caplog):
    assert open_journal(str(folder), None).durable
    assert not open_journal(None, None).durable
    assert list(folder.iterdir()) == []
    assert warnings(caplog) == []
    with pytest.raises(ConfigError) as caught:
        open_journal("not/absolute", "https://bucket/prefix")
    first, second = caught.value.problems
    assert first == "`llava.journal_dir` must be an absolute path, got a string of length 12"
    assert second == "`llava.journal_s3_prefix` must be s3://<bucket>/<prefix>, got a string of length 21"


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/", "s3:///prefix", "s3://B/prefix", "bucket/prefix"])
def test_a_malformed_s3_prefix_is_refused(uri):
    with pytest.raises(ConfigError, match="must be s3://<bucket>/<prefix>"):
        open_journal(None, uri)


# --- S3 ---


def test_another_instance_carries_on_from_s3(bucket):
    story = saved(open_journal(None, PREFIX))
    assert records(bucket) == [f"a/prefix/{key_of('chat-1')}/{number:06d}.rec" for number in range(4)]
    second = open_journal(None, PREFIX.rstrip("/"))
    assert second.recover(NOW).live == [], "other instances' sessions are not this one's"
    found = read(second, "chat-1")
    assert found.records() == story.records()
    taken_over = Transcript(replace(found.opening, session_id="chat-9"), found.turns)
    assert stores(second, taken_over, 30)
    assert second.forget("chat-1").result(30) is Removal.REMOVED
    third = open_journal(None, PREFIX)
    assert read(third, "chat-1") is None
    assert read(third, "chat-9").records() == taken_over.records()
    assert read(second, "chat-9", EXPIRES) is None


def test_a_damaged_object_is_skipped(bucket, caplog):
    saved(open_journal(None, PREFIX))
    name = objects(bucket)[2]
    data = bytearray(bucket.get_object(Bucket="my-journal", Key=name)["Body"].read())
    data[100] ^= 1
    bucket.put_object(Bucket="my-journal", Key=name, Body=bytes(data))
    assert read(open_journal(None, PREFIX), "chat-1") is None
    assert warnings(caplog) == ["journal_damaged store=s3 session=chat-1 reason=record 2 does not match its checksum"]


def test_a_session_of_more_records_than_one_page_is_read_and_forgotten(bucket, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "7")
    journal = open_journal(None, PREFIX)
    story = opening(journal)
    for n in range(20):
        story.append(TurnRecord([n], [], (), None, "", {}))
    assert stores(journal, story, 60)
    assert len(objects(bucket)) == 7
    assert peek(S3Store(PREFIX), "chat-1").records() == story.records()
    assert journal.forget("chat-1").result(60) is Removal.REMOVED
    assert objects(bucket) == []


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_that_fails_is_no_acknowledgement_is_let_alone_a_while_and_is_caught_up(bucket, caplog):
    caplog.set_level(logging.INFO)
    clock, client = Clock(), boto3.client("s3")
    calls: list[str] = []
    client.meta.events.register("before-send.s3.*", lambda request, **_: calls.append(request.method))
    journal = Journal([S3Store(PREFIX, client)], clock)
    story = saved(journal, turns=1)
    for name in objects(bucket):
        bucket.delete_object(Bucket="my-journal", Key=name)
    bucket.delete_bucket(Bucket="my-journal")
    calls.clear()
    for _ in range(3):
        assert not stores(journal, add_turn(story, journal.blobs), 30)
    assert calls == ["PUT"], "during the pause nothing is tried"
    assert warnings(caplog) == [
        "journal_failing store=s3 work=write reason=can't write: NoSuchBucket; chats go on, turns are not durable"
    ]
    assert journal.failures_total == 3
    clock.now_s += 5
    assert not stores(journal, story, 30)
    assert calls == ["PUT", "PUT"]
    bucket.create_bucket(Bucket="my-journal")
    clock.now_s += 5
    assert stores(journal, story, 30)
    assert len(records(bucket)) == 5, "all of it: what was written before was lost with the bucket"
    assert [record.levelname for record in product_records(caplog)] == ["WARNING", "INFO"]


def refusing(client: Any, operation: str, times: int) -> None:
    """S3 does it so many times not, and says "slow down"; that is behind botocore's own retries."""
    error = {"Error": {"Code": "SlowDown", "Message": "Reduce your request rate."}}
    answers = [error] * times

    def answer(**_: Any) -> tuple[AWSResponse, dict] | None:
        return (AWSResponse("", 503, {}, None), answers.pop()) if answers else None

    client.meta.events.register(f"before-call.s3.{operation}", answer)


def test_a_bucket_that_throttles_once_is_tried_again_at_once(bucket, caplog):
    store, sent = S3Store(PREFIX), []

    def answer(request: Any, **_: Any) -> AWSResponse | None:
        sent.append(request.url)
        response = AWSResponse(request.url, 503, {}, None)
        response._content = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
        return response if len(sent) == 1 else None

    store.client.meta.events.register_first("before-send.s3.PutObject", answer)
    journal = Journal([store])
    story = saved(journal, turns=0)
    assert sent[0] == sent[1]
    assert len(sent) == 3, "the owner record, again, and the session's first record"
    assert read(open_journal(None, PREFIX), "chat-1").records() == story.records()
    assert warnings(caplog) == []


def test_a_bucket_that_keeps_throttling_is_no_acknowledgement(bucket, caplog):
    clock, store = Clock(), S3Store(PREFIX)
    refusing(store.client, "PutObject", 1)
    journal = Journal([store], clock)
    story = opening(journal)
    assert not stores(journal, story, 30)
    assert "can't write: SlowDown" in warnings(caplog)[0]
    assert objects(bucket) == []
    clock.now_s += 5
    assert stores(journal, story, 30)


def test_a_session_that_could_not_be_forgotten_is_not_read_and_goes_later(bucket, caplog):
    clock, store = Clock(), S3Store(PREFIX)
    journal = Journal([store], clock)
    saved(journal)
    refusing(store.client, "DeleteObject", 1)
    assert journal.forget("chat-1").result(30) is Removal.FAILED
    assert len(records(bucket)) == 4
    assert read(journal, "chat-1") is None
    assert warnings(caplog) == [
        "journal_failing store=s3 work=remove reason=can't remove: SlowDown; chats go on, it is tried again"
    ]
    clock.now_s += 5
    journal.sweep(NOW).result(10)
    assert journal.flush(30)
    assert objects(bucket) == []


def test_a_bucket_that_cannot_be_read_is_unavailable_and_a_line(bucket, caplog):
    saved(open_journal(None, PREFIX))
    store = S3Store(PREFIX)
    refusing(store.client, "ListObjectsV2", 1)
    with pytest.raises(JournalUnavailable):
        read(Journal([store]), "chat-1")
    assert warnings(caplog) == ["journal_unreadable store=s3 session=chat-1 reason=can't list: SlowDown"]
    assert store.read(key_of("nobody"), record_name(0)) is None


# --- both ---


def test_with_two_stores_both_hold_every_record(bucket, folder):
    journal = open_journal(str(folder), PREFIX)
    story = saved(journal)
    assert peek(DirectoryStore(str(folder)), "chat-1").records() == story.records()
    assert peek(S3Store(PREFIX), "chat-1").records() == story.records()
    assert journal.forget("chat-1").result(30) is Removal.REMOVED
    assert (list(folder.iterdir()), objects(bucket)) == ([], [])


def test_one_of_two_that_fails_is_no_acknowledgement_and_the_other_is_read(bucket, tmp_path, caplog):
    place = tmp_path / "place"
    place.write_text("a file")
    journal = open_journal(str(place / "journal"), PREFIX)
    story = opening(journal)
    assert not stores(journal, story, 30)
    assert peek(S3Store(PREFIX), "chat-1").records() == story.records()
    place.unlink()
    assert stores(journal, story, 30)
    assert read(again(place / "journal"), "chat-1").records() == story.records()


def test_the_store_that_knows_more_is_read_and_the_other_catches_up(bucket, folder):
    story = saved(open_journal(None, PREFIX), turns=3)
    behind = Transcript(story.opening, story.turns[:1])
    assert stores(again(folder), behind, 10)
    journal = open_journal(str(folder), PREFIX)
    found = read(journal, "chat-1")
    assert found.records() == story.records()
    before = file_of(folder, "chat-1", 0).stat().st_ino
    assert stores(journal, add_turn(found, journal.blobs), 30)
    assert file_of(folder, "chat-1", 0).stat().st_ino == before
    assert read(again(folder), "chat-1").records() == found.records()
    assert read(open_journal(None, PREFIX), "chat-1").records() == found.records()


@pytest.mark.parametrize("number", [1, 3])
def test_a_damaged_copy_is_replaced_by_the_good_one(bucket, folder, caplog, number):
    story = saved(open_journal(str(folder), PREFIX))
    file_of(folder, "chat-1", number).write_bytes(b"damaged")
    journal = open_journal(str(folder), PREFIX)
    found = read(journal, "chat-1")
    assert found.records() == story.records()
    assert len(warnings(caplog)) == 1
    assert stores(journal, add_turn(found, journal.blobs), 30)
    assert read(again(folder), "chat-1").records() == found.records()


def test_a_copy_that_took_another_course_does_not_mix_with_the_one_that_is_read(bucket, folder):
    elsewhere = open_journal(None, PREFIX)
    story = opening(elsewhere)
    for n in range(4):
        story.append(TurnRecord([n], [n], (), None, "s3", {}))
    assert stores(elsewhere, story, 30)
    other = Transcript(story.opening, [TurnRecord([n], [n], (), None, "disk", {}) for n in range(3)])
    assert stores(again(folder), other, 10)
    journal = open_journal(str(folder), PREFIX)
    found = read(journal, "chat-1")
    assert found.records() == story.records()
    assert stores(journal, found, 30)
    assert read(again(folder), "chat-1").records() == story.records()
