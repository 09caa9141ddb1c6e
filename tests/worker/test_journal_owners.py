"""A session has one owner: of instances that claim it one wins, and an owner that lost it finds out and harms nothing.

Most tests run over a directory and over S3 (moto, whose conditional writes behave as S3's).
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_sessions.chat.transcript import OpenRecord, Transcript, TurnRecord
from llava_sessions.journal import locks
from llava_sessions.journal.encoding import key_of
from llava_sessions.journal.journal import (
    AlreadyClaimed,
    Journal,
    JournalError,
    JournalUnavailable,
    NotFound,
    Removal,
    SaveOutcome,
)
from llava_sessions.journal.owners import read_owner
from llava_sessions.journal.stores import DirectoryStore, S3Store, Store, record_name
from tests.support import journal_child
from tests.support.journals import (
    EXPIRES,
    NOW,
    PREFIX,
    TOKEN_DIGEST,
    MemoryStore,
    _closing,
    add_turn,
    again,
    bucket,
    file_of,
    folder,
    opening,
    peek,
    records,
    saved,
    stores,
    warnings,
)

__all__ = ["_closing", "bucket", "folder"]  # fixtures
pytestmark = pytest.mark.usefixtures("_closing")

KEY = key_of("chat-1")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(params=["directory", "s3"])
def make_store(request: pytest.FixtureRequest) -> Callable[[], Store]:
    """Makes stores over one place, as each instance has one."""
    if request.param == "directory":
        path = request.getfixturevalue("folder")
        return lambda: DirectoryStore(str(path))
    request.getfixturevalue("bucket")
    return lambda: S3Store(PREFIX)


def epoch_in(store: Store) -> int:
    return read_owner(store, KEY).owner.epoch


def save(journal: Journal, story: Transcript) -> SaveOutcome:
    """Save one turn more."""
    return journal.save(add_turn(story, journal.blobs)).result(30)


def during(
    store: Store, operation: str, event: Callable[[], None], name: str | None = None, behind: bool = False
) -> None:
    """Have `event` happen once, just before (or `behind`) an operation of the store (on the object `name`)."""
    real = getattr(store, operation)
    happened = []

    def instead(key: str, *arguments: Any) -> Any:
        meant = name is None or arguments[0] == name
        result = real(key, *arguments) if behind and meant and not happened else None
        if meant and not happened:
            happened.append(True)
            event()
            if behind:
                return result
        return real(key, *arguments)

    setattr(store, operation, instead)


# --- epochs ---


def test_a_session_begins_in_epoch_1_and_each_claim_takes_the_next(make_store):
    store = make_store()
    story = saved(Journal([store]), turns=1)
    assert epoch_in(store) == 1
    whole = json.loads(store.read(KEY, record_name(1))[0][65:])
    assert whole["epoch"] == 1
    for epoch in (2, 3):
        journal = Journal([make_store()])
        found = journal.claim("chat-1", NOW, TOKEN_DIGEST)
        assert found.records() == story.records()
        assert epoch_in(store) == epoch
        assert save(journal, found) is SaveOutcome.STORED
        story = found
    assert peek(store, "chat-1").records() == story.records()


def test_a_claim_by_its_owner_goes_on(make_store):
    journal = Journal([make_store()])
    saved(journal)
    story = journal.claim("chat-1", NOW, TOKEN_DIGEST)
    assert save(journal, story) is SaveOutcome.STORED
    assert journal.retire("chat-1").result(30)


def test_the_token_is_checked_before_the_claim(make_store):
    store = make_store()
    saved(Journal([store]))
    for digest in (None, "", "cd" * 32, TOKEN_DIGEST[:-1]):
        with pytest.raises(NotFound) as caught:
            Journal([make_store()]).claim("chat-1", NOW, digest)
        assert not caught.value.damaged
    assert epoch_in(store) == 1


def test_a_session_without_a_token_is_not_found_with_one(make_store):
    journal = Journal([make_store()])
    assert stores(journal, opening(journal, token_digest=None))
    with pytest.raises(NotFound):
        journal.claim("chat-1", NOW, TOKEN_DIGEST)
    assert journal.claim("chat-1", NOW, None).turns == ()


def test_an_expired_session_is_not_claimed(make_store):
    store = make_store()
    saved(Journal([store]))
    with pytest.raises(NotFound):
        Journal([make_store()]).claim("chat-1", EXPIRES, TOKEN_DIGEST)
    assert epoch_in(store) == 1


# --- an owner that lost its session ---


def test_an_owner_that_lost_its_session_finds_out_and_harms_nothing(make_store, caplog):
    first = Journal([make_store()])
    second = Journal([make_store()])
    stale = saved(first, turns=2)
    story = second.claim("chat-1", NOW, TOKEN_DIGEST)
    assert save(second, story) is SaveOutcome.STORED
    for _ in range(2):
        assert save(first, stale) is SaveOutcome.NOT_OWNER
    assert {line.split(" store=")[0] for line in warnings(caplog)} == {"journal_not_owner"}
    assert all(line.endswith("session=chat-1") for line in warnings(caplog))
    assert first.failures_total == 0
    assert first.forget("chat-1").result(30) is Removal.NOT_OWNER
    assert not first.retire("chat-1").result(30)
    assert first.tracked_sessions == 0
    assert peek(make_store(), "chat-1").records() == story.records()
    assert save(second, story) is SaveOutcome.STORED
    assert Journal([make_store()]).claim("chat-1", NOW, TOKEN_DIGEST).records() == story.records()


def test_a_turn_behind_the_claim_is_found_out_and_replaced(make_store):
    first = Journal([make_store()])
    second = Journal([make_store()])
    stale = saved(first, turns=1)
    story = second.claim("chat-1", NOW, TOKEN_DIGEST)
    stale.append(TurnRecord([666], [], (), None, "stale", {}))
    assert first.save(stale).result(30) is SaveOutcome.NOT_OWNER
    assert save(second, story) is SaveOutcome.STORED
    assert peek(make_store(), "chat-1").records() == story.records()


def test_several_turns_behind_the_claim_never_mix_with_the_owners(make_store):
    first = Journal([make_store()])
    second = Journal([make_store()])
    stale = saved(first, turns=1)
    story = second.claim("chat-1", NOW, TOKEN_DIGEST)
    for number in range(3):
        stale.append(TurnRecord([666], [], (), None, f"stale {number}", {}))
    assert first.save(stale).result(30) is SaveOutcome.NOT_OWNER
    assert len(make_store().numbers(KEY)) == 5
    assert save(second, story) is SaveOutcome.STORED
    third = Journal([make_store()])
    found = third.claim("chat-1", NOW, TOKEN_DIGEST)
    assert found.records() == story.records(), "the records of a lower epoch behind the owner's are ignored"
    for _ in range(3):
        assert save(third, found) is SaveOutcome.STORED
    assert Journal([make_store()]).claim("chat-1", NOW, TOKEN_DIGEST).records() == found.records()


def test_a_turn_between_the_claim_and_the_reading_is_read(make_store):
    first = Journal([make_store()])
    stale = saved(first, turns=1)
    store = make_store()
    outcomes = []
    during(store, "replace", lambda: outcomes.append(save(first, stale)), name="owner", behind=True)
    second = Journal([store])
    story = second.claim("chat-1", NOW, TOKEN_DIGEST)
    assert outcomes == [SaveOutcome.NOT_OWNER]
    assert story.records() == stale.records()
    assert save(second, story) is SaveOutcome.STORED
    assert peek(make_store(), "chat-1").records() == story.records()


def test_a_turn_before_the_claim_is_acknowledged_and_read(make_store):
    first = Journal([make_store()])
    stale = saved(first, turns=1)
    store = make_store()
    outcomes = []
    during(store, "replace", lambda: outcomes.append(save(first, stale)), name="owner")
    story = Journal([store]).claim("chat-1", NOW, TOKEN_DIGEST)
    assert outcomes == [SaveOutcome.STORED]
    assert story.records() == stale.records()


def test_a_stale_owner_does_not_replace_what_a_later_owner_has_adopted(make_store):
    """Found by the test of any interleaving: a record of an earlier epoch may be part of a later owner's transcript."""
    first, second, third = (Journal([make_store()]) for _ in range(3))
    stale = saved(first, turns=1)
    waiting = second.claim("chat-1", NOW, TOKEN_DIGEST)
    assert save(first, stale) is SaveOutcome.NOT_OWNER, "a stale record where the second owner will write"
    story = third.claim("chat-1", NOW, TOKEN_DIGEST)
    assert len(story.turns) == 1, "the stale record is not adopted, since the second owner may replace it"
    assert save(third, story) is SaveOutcome.STORED
    assert save(second, waiting) is SaveOutcome.NOT_OWNER
    assert peek(make_store(), "chat-1").records() == story.records()


def test_a_claim_that_is_overtaken_before_it_has_read_the_session_fails(make_store):
    saved(Journal([make_store()]))
    store = make_store()
    later = Journal([make_store()])
    found = []
    during(store, "replace", lambda: found.append(later.claim("chat-1", NOW, TOKEN_DIGEST)), name="owner", behind=True)
    with pytest.raises(AlreadyClaimed):
        Journal([store]).claim("chat-1", NOW, TOKEN_DIGEST)
    assert save(later, found[0]) is SaveOutcome.STORED


def test_a_session_that_is_saved_without_a_claim_is_not_taken(make_store):
    first = Journal([make_store()])
    story = saved(first, turns=1)
    second = Journal([make_store()])
    assert save(second, Transcript(story.opening, story.turns)) is SaveOutcome.NOT_OWNER
    assert save(first, story) is SaveOutcome.STORED
    assert peek(make_store(), "chat-1").records() == story.records()


def test_an_owner_record_that_is_lost_is_written_again(make_store):
    store = make_store()
    journal = Journal([store])
    story = saved(journal)
    store.delete(KEY, "owner")
    assert save(journal, story) is SaveOutcome.STORED
    assert epoch_in(store) == 1
    store.remove(KEY)
    assert save(journal, story) is SaveOutcome.STORED
    assert peek(store, "chat-1").records() == story.records()


def test_a_damaged_owner_record_is_no_acknowledgement(make_store, caplog):
    store = make_store()
    journal = Journal([store])
    story = saved(journal)
    data, version = store.read(KEY, "owner")
    assert store.replace(KEY, "owner", data[:-1], version)
    assert save(journal, story) is SaveOutcome.FAILED
    with pytest.raises(NotFound) as caught:
        Journal([make_store()]).claim("chat-1", NOW, TOKEN_DIGEST)
    assert caught.value.damaged
    assert warnings(caplog)[-1].endswith("reason=the owner record does not match its checksum")


# --- two instances that resume one session ---


def resumed(old: Transcript, session_id: str) -> Transcript:
    return Transcript(replace(old.opening, session_id=session_id), old.turns)


def test_of_two_that_claim_one_epoch_the_loser_of_the_swap_is_told(make_store):
    saved(Journal([make_store()]))
    store = make_store()
    winner = Journal([make_store()])
    during(store, "replace", lambda: winner.claim("chat-1", NOW, TOKEN_DIGEST), name="owner")
    loser = Journal([store])
    with pytest.raises(AlreadyClaimed):
        loser.claim("chat-1", NOW, TOKEN_DIGEST)
    assert epoch_in(store) == 2
    assert winner.retire("chat-1").result(30)


def test_of_two_claims_one_after_the_other_the_later_wins_at_the_retirement(make_store):
    saved(Journal([make_store()]))
    first = Journal([make_store()])
    second = Journal([make_store()])
    olds = [journal.claim("chat-1", NOW, TOKEN_DIGEST) for journal in (first, second)]
    assert stores(first, resumed(olds[0], "chat-2"))
    assert stores(second, resumed(olds[1], "chat-3"))
    assert not first.retire("chat-1").result(30)
    assert peek(make_store(), "chat-1") is not None
    assert second.retire("chat-1").result(30)
    assert peek(make_store(), "chat-1") is None
    with pytest.raises(NotFound) as caught:
        first.claim("chat-1", NOW, TOKEN_DIGEST)
    assert not caught.value.damaged


def test_a_claim_and_a_retirement_at_one_moment_do_not_both_succeed(make_store):
    saved(Journal([make_store()]))
    store = make_store()
    first = Journal([store])
    first.claim("chat-1", NOW, TOKEN_DIGEST)
    second = Journal([make_store()])
    during(store, "replace", lambda: second.claim("chat-1", NOW, TOKEN_DIGEST), name="owner")
    assert not first.retire("chat-1").result(30)
    assert second.retire("chat-1").result(30)


def test_a_session_is_retired_once(make_store):
    journal = Journal([make_store()])
    saved(journal)
    retirements = [journal.retire("chat-1"), journal.retire("chat-1")]
    assert [retired.result(30) for retired in retirements] == [True, False]
    assert not journal.retire("nobody").result(30)


def test_two_claims_of_one_process_retire_the_session_once(make_store):
    saved(Journal([make_store()]))
    journal = Journal([make_store()])
    for _ in range(2):
        assert journal.claim("chat-1", NOW, TOKEN_DIGEST).turns
    retirements = [journal.retire("chat-1"), journal.retire("chat-1")]
    assert [retired.result(30) for retired in retirements] == [True, False]


@pytest.mark.parametrize("moment", ["read", "numbers", "create"])
@pytest.mark.parametrize("claimed", [False, True], ids=["opened here", "claimed"])
def test_a_session_that_is_retired_during_a_claim_is_not_found(make_store, moment, claimed):
    """Whatever the claimer was about to do: the session is neither unreadable nor damaged."""
    first = Journal([make_store()])
    saved(first)
    owner = Journal([make_store()]) if claimed else first
    if claimed:
        owner.claim("chat-1", NOW, TOKEN_DIGEST)
    store = make_store()
    name = {"read": record_name(0), "numbers": None, "create": "owner"}[moment]
    during(store, moment, lambda: owner.retire("chat-1").result(30), name=name)
    with pytest.raises(NotFound) as caught:
        Journal([store]).claim("chat-1", NOW, TOKEN_DIGEST)
    assert not caught.value.damaged


def test_without_a_store_a_retirement_is_true():
    assert Journal().retire("chat-1").result(0)
    with pytest.raises(NotFound):
        Journal().claim("chat-1", NOW, None)


def test_a_turn_after_the_retirement_is_found_out_and_removed(make_store):
    first = Journal([make_store()])
    stale = saved(first, turns=1)
    second = Journal([make_store()])
    second.claim("chat-1", NOW, TOKEN_DIGEST)
    assert second.retire("chat-1").result(30)
    add_turn(stale, first.blobs)
    assert save(first, stale) is SaveOutcome.NOT_OWNER
    assert make_store().numbers(KEY) == []
    with pytest.raises(NotFound):
        Journal([make_store()]).claim("chat-1", NOW, TOKEN_DIGEST)


def test_a_session_that_was_never_claimed_is_removed_without_a_trace(make_store):
    store = make_store()
    journal = Journal([store])
    saved(journal)
    assert journal.retire("chat-1").result(30)
    assert store.read(KEY, "owner") is None
    assert store.numbers(KEY) == []


@pytest.mark.parametrize("instances", [2, 4])
def test_of_processes_that_resume_one_session_in_a_directory_one_wins(folder, instances):
    for attempt in range(3):
        place = folder / str(attempt)
        journal = again(place)
        story = journal_child.opening(journal, "chat", 1000)
        assert stores(journal, story)
        command = [sys.executable, "-m", "tests.support.journal_child", "resume", str(place)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
        children = [subprocess.Popen([*command, f"new-{n}"], **pipes) for n in range(instances)]
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        told = [child.communicate(timeout=60)[0].strip() for child in children]
        assert told.count("won 0") == 1, told
        assert set(told) <= {"won 0", "lost 0", "AlreadyClaimed", "NotFound"}, told
        found = again(place).recover(NOW).live
        assert [one.session_id for one in found] == [f"new-{told.index('won 0')}"]
        assert journal.save(add_turn(story, journal.blobs)).result(30) is SaveOutcome.NOT_OWNER


def test_of_threads_that_resume_one_session_in_a_directory_one_wins(folder):
    for attempt in range(20):
        session_id = f"chat-{attempt}"
        assert stores(again(folder), opening(Journal(), session_id))
        journals = [again(folder) for _ in range(4)]
        barrier = threading.Barrier(4)
        told: list[object] = []

        def resume(journal: Journal, barrier=barrier, session_id=session_id, told=told) -> None:
            barrier.wait()
            try:
                journal.claim(session_id, NOW, TOKEN_DIGEST)
                told.append(journal.retire(session_id).result(30))
            except JournalError as error:
                told.append(type(error))

        threads = [threading.Thread(target=resume, args=(journal,)) for journal in journals]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert told.count(True) == 1, told
        assert set(told) <= {True, False, AlreadyClaimed, NotFound}, told
        for journal in journals:
            journal.close(10)


# --- removals ---


def test_a_session_that_was_only_recovered_can_be_forgotten(folder):
    saved(again(folder))
    journal = again(folder)
    journal.recover(NOW)
    assert journal.forget("chat-1").result(10) is Removal.REMOVED
    assert list(folder.iterdir()) == []


def test_a_recovered_session_that_another_claimed_meanwhile_is_not_forgotten(folder):
    saved(again(folder))
    journal = again(folder)
    journal.recover(NOW)
    other = again(folder)
    story = other.claim("chat-1", NOW, TOKEN_DIGEST)
    assert journal.forget("chat-1").result(10) is Removal.NOT_OWNER
    assert save(other, story) is SaveOutcome.STORED
    assert peek(DirectoryStore(str(folder)), "chat-1").records() == story.records()


def test_a_session_of_unknown_owner_is_not_forgotten(make_store):
    story = saved(Journal([make_store()]))
    assert Journal([make_store()]).forget("chat-1").result(30) is Removal.NOT_OWNER
    assert peek(make_store(), "chat-1").records() == story.records()


def test_a_retired_owner_record_goes_when_no_session_can_live_any_more(folder, caplog):
    saved(again(folder))
    journal = again(folder)
    journal.claim("chat-1", NOW, TOKEN_DIGEST)
    assert journal.forget("chat-1").result(10) is Removal.REMOVED
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["owner"]
    assert again(folder).recover(NOW).live == []
    changed = (folder / KEY).stat().st_mtime
    for age, stays in [(86_400, True), (86_400 + 121, False)]:
        assert journal.sweep(changed + age).result(10)
        assert journal.flush(10)
        assert (folder / KEY).exists() is stays
    assert warnings(caplog) == []


def test_what_a_process_remembers_of_sessions_goes_when_they_expire(make_store):
    journal = Journal([make_store()])
    saved(journal)
    assert journal.tracked_sessions == 1
    journal.sweep(EXPIRES + 119).result(10)
    assert journal.tracked_sessions == 1
    journal.sweep(EXPIRES + 120).result(10)
    assert journal.flush(10)
    assert journal.tracked_sessions == 0


# --- kills and locks ---


@pytest.mark.parametrize(("moment", "epoch"), [("link", 1), ("replace", 1), ("after-replace", 2)])
def test_killed_in_the_middle_of_a_claim_the_session_can_be_claimed(folder, caplog, moment, epoch):
    journal = again(folder)
    story = journal_child.opening(journal, "chat", 1000)
    assert stores(journal, story)
    command = [sys.executable, "-m", "tests.support.journal_child", "claim", str(folder), moment]
    process = subprocess.run(command, env=ENVIRONMENT, timeout=60, check=False)
    assert process.returncode == -signal.SIGKILL
    assert read_owner(DirectoryStore(str(folder)), key_of("chat")).owner.epoch == epoch
    outcome = SaveOutcome.STORED if epoch == 1 else SaveOutcome.NOT_OWNER
    assert journal.save(story).result(10) is outcome
    caplog.clear()
    heir = again(folder)
    assert heir.claim("chat", NOW, None).records() == story.records()
    assert heir.save(story).result(10) is SaveOutcome.STORED
    assert not (folder / key_of("chat") / "lock").exists()
    assert warnings(caplog) == []


def test_a_lock_that_is_held_for_long_is_a_passing_error(folder, monkeypatch):
    monkeypatch.setattr(locks, "_WAIT_S", 0.05)
    saved(again(folder))
    with open(folder / KEY / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(JournalUnavailable):
            again(folder).claim("chat-1", NOW, TOKEN_DIGEST)
    assert again(folder).claim("chat-1", NOW, TOKEN_DIGEST).turns


# --- passing read errors ---


def failing_reads(monkeypatch: pytest.MonkeyPatch, fails: Callable[[Path], bool]) -> None:
    """Reading such a file meets a disk that fails."""
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if fails(path):
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)


@pytest.mark.parametrize("name", ["owner", "000000.rec", "000002.rec"])
def test_a_disk_that_fails_to_read_is_unavailable_and_not_damage(folder, monkeypatch, caplog, name):
    story = saved(again(folder))
    with monkeypatch.context() as failing:
        failing_reads(failing, lambda path: path.name == name)
        with pytest.raises(JournalUnavailable):
            again(folder).claim("chat-1", NOW, TOKEN_DIGEST)
    assert "journal_unreadable store=directory session=chat-1 reason=can't read: Input/output error" in warnings(caplog)
    assert again(folder).claim("chat-1", NOW, TOKEN_DIGEST).records() == story.records()


@pytest.mark.parametrize(("name", "recovered"), [("000002.rec", ["chat-1"]), ("000000.rec", []), ("owner", [])])
def test_a_session_that_cannot_be_read_at_a_start_is_kept(folder, monkeypatch, caplog, name, recovered):
    story = saved(again(folder))
    journal = again(folder)
    with monkeypatch.context() as failing:
        failing_reads(failing, lambda path: path.name == name)
        assert [one.session_id for one in journal.recover(NOW).live] == recovered
    (warning,) = warnings(caplog)
    assert warning == f"journal_unreadable store=directory session=key:{KEY[:8]} reason=can't read: Input/output error"
    assert journal.claim("chat-1", NOW, TOKEN_DIGEST).records() == story.records()


def refusing(store: S3Store, operation: str, code: str = "SlowDown", times: int = 1) -> None:
    answers = [{"Error": {"Code": code, "Message": "no"}}] * times

    def answer(**_: Any) -> tuple[AWSResponse, dict] | None:
        return (AWSResponse("", 503, {}, None), answers.pop()) if answers else None

    store.client.meta.events.register(f"before-call.s3.{operation}", answer)


@pytest.mark.parametrize("operation", ["GetObject", "ListObjectsV2", "PutObject"])
def test_a_bucket_that_throttles_a_claim_is_unavailable_and_the_session_stays(bucket, operation):
    story = saved(Journal([S3Store(PREFIX)]))
    store = S3Store(PREFIX)
    refusing(store, operation)
    journal = Journal([store])
    with pytest.raises(JournalUnavailable):
        journal.claim("chat-1", NOW, TOKEN_DIGEST)
    assert journal.claim("chat-1", NOW, TOKEN_DIGEST).records() == story.records()


def test_a_bucket_that_times_out_is_unavailable(bucket):
    saved(Journal([S3Store(PREFIX)]))
    store = S3Store("s3://my-journal/a/prefix", boto3.client("s3", config=quick()))

    def time_out(**_: Any) -> None:
        from botocore.exceptions import ReadTimeoutError

        raise ReadTimeoutError(endpoint_url="bucket")

    store.client.meta.events.register_first("before-send.s3.GetObject", time_out)
    with pytest.raises(JournalUnavailable):
        Journal([store]).claim("chat-1", NOW, TOKEN_DIGEST)


def quick() -> Any:
    from botocore.config import Config

    return Config(retries={"total_max_attempts": 1})


def test_a_write_whose_reply_was_lost_is_found_by_its_retry(bucket):
    """S3 did it; the retry meets its own object, and that is no conflict."""
    store = S3Store(PREFIX)
    lost: list[str] = []
    bodies: dict[str, bytes] = {}

    def remember(params: dict[str, Any], **_: Any) -> None:
        bodies[params["Key"]] = params["Body"]

    def answer(request: Any, **_: Any) -> AWSResponse | None:
        name = request.url.split(".com/")[1]
        if name in lost:
            return None
        lost.append(name)
        bucket.put_object(Bucket="my-journal", Key=name, Body=bodies[name])
        response = AWSResponse(request.url, 500, {}, None)
        response._content = b"<Error><Code>InternalError</Code><Message>We are sorry.</Message></Error>"
        return response

    store.client.meta.events.register("before-parameter-build.s3.PutObject", remember)
    store.client.meta.events.register_first("before-send.s3.PutObject", answer)
    journal = Journal([store])
    story = saved(journal, turns=1)
    assert len(lost) == 3
    assert peek(S3Store(PREFIX), "chat-1").records() == story.records()


def test_a_closed_journal_is_unavailable(folder):
    saved(again(folder))
    journal = again(folder)
    journal.close(10)
    with pytest.raises(JournalUnavailable):
        journal.claim("chat-1", NOW, TOKEN_DIGEST)


# --- two stores ---


def both(folder: Path, store: S3Store | None = None) -> Journal:
    return Journal([DirectoryStore(str(folder)), store or S3Store(PREFIX)])


def test_a_claim_holds_in_both_stores(bucket, folder):
    first = both(folder)
    stale = saved(first)
    story = both(folder).claim("chat-1", NOW, TOKEN_DIGEST)
    assert [epoch_in(store) for store in (DirectoryStore(str(folder)), S3Store(PREFIX))] == [2, 2]
    assert save(first, stale) is SaveOutcome.NOT_OWNER
    assert story.turns == stale.turns[:-1]


def test_a_store_that_cannot_be_read_is_left_out_and_catches_up(bucket, folder):
    story = saved(both(folder))
    store = S3Store(PREFIX)
    refusing(store, "GetObject")
    journal = both(folder, store)
    found = journal.claim("chat-1", NOW, TOKEN_DIGEST)
    assert found.records() == story.records()
    assert epoch_in(S3Store(PREFIX)) == 1
    assert save(journal, found) is SaveOutcome.STORED
    assert epoch_in(S3Store(PREFIX)) == 2
    for store in (DirectoryStore(str(folder)), S3Store(PREFIX)):
        assert peek(store, "chat-1").records() == found.records()


def test_a_store_that_was_left_out_and_claimed_by_another_is_not_written(bucket, folder):
    saved(both(folder))
    store = S3Store(PREFIX)
    refusing(store, "GetObject")
    journal = both(folder, store)
    found = journal.claim("chat-1", NOW, TOKEN_DIGEST)
    other = Journal([S3Store(PREFIX)])
    story = other.claim("chat-1", NOW, TOKEN_DIGEST)
    assert save(journal, found) is SaveOutcome.NOT_OWNER
    assert save(other, story) is SaveOutcome.STORED


def test_one_damaged_copy_and_one_that_cannot_be_read_are_unavailable(bucket, folder):
    story = saved(both(folder))
    file_of(folder, "chat-1", 0).write_bytes(b"damaged")
    store = S3Store(PREFIX)
    refusing(store, "GetObject")
    with pytest.raises(JournalUnavailable):
        both(folder, store).claim("chat-1", NOW, TOKEN_DIGEST)
    assert both(folder).claim("chat-1", NOW, TOKEN_DIGEST).records() == story.records()


def test_two_damaged_copies_are_a_lost_session(bucket, folder):
    saved(both(folder))
    file_of(folder, "chat-1", 1).write_bytes(b"damaged")
    bucket.put_object(Bucket="my-journal", Key=records(bucket)[2], Body=b"damaged")
    with pytest.raises(NotFound) as caught:
        both(folder).claim("chat-1", NOW, TOKEN_DIGEST)
    assert caught.value.damaged


def test_a_session_that_another_instance_carried_on_is_not_revived_from_the_directory(bucket, folder):
    """The other instance shares the bucket only, so a copy stays in this one's directory."""
    saved(both(folder))
    other = Journal([S3Store(PREFIX)])
    other.claim("chat-1", NOW, TOKEN_DIGEST)
    assert other.retire("chat-1").result(30)
    restarted = both(folder)
    assert [one.session_id for one in restarted.recover(NOW).live] == ["chat-1"]
    with pytest.raises(NotFound) as caught:
        restarted.claim("chat-1", NOW, TOKEN_DIGEST)
    assert not caught.value.damaged
    assert restarted.forget("chat-1").result(30) is Removal.NOT_OWNER
    assert not (folder / KEY).exists()


def test_two_instances_that_meet_in_the_bucket_do_not_both_claim(bucket, folder):
    saved(both(folder))
    store = S3Store(PREFIX)
    other = Journal([S3Store(PREFIX)])
    during(store, "replace", lambda: other.claim("chat-1", NOW, TOKEN_DIGEST), name="owner")
    with pytest.raises(AlreadyClaimed):
        both(folder, store).claim("chat-1", NOW, TOKEN_DIGEST)
    assert other.retire("chat-1").result(30)


# --- any interleaving ---


class Instance:
    """An instance of the server, and the session as it holds it."""

    def __init__(self, contents: dict[tuple[str, str], bytes], before: Callable[[], None]) -> None:
        self.journal = Journal([MemoryStore(contents, lambda operation: before())])
        self.story: Transcript | None = None
        self.busy = False


class Meeting:
    """Three instances that save, claim and retire. Before each step of one in the store, others may do the same."""

    def __init__(self, seed: int) -> None:
        self.contents: dict[tuple[str, str], bytes] = {}
        self.acknowledged: list[int] = []
        self.retirements: list[bool] = []
        self.instances = [Instance(self.contents, self._meanwhile) for _ in range(3)]
        self._chance = random.Random(seed)
        self._count = 0
        self._begun = False

    def begin(self) -> None:
        """Store a session of the first instance."""
        first = Transcript(OpenRecord("chat", NOW, EXPIRES, None, "image", (), [1], 1))
        self.instances[0].story = first
        assert self.instances[0].journal.save(first).result(30) is SaveOutcome.STORED
        self._begun = True

    def step(self) -> None:
        """Let an instance act that is not in the middle of a step."""
        free = [one for one in self.instances if not one.busy]
        if not free:
            return
        instance = self._chance.choice(free)
        instance.busy = True
        try:
            self._act(instance)
        finally:
            instance.busy = False

    def _meanwhile(self) -> None:
        if self._begun and self._chance.random() < 0.15:
            self.step()

    def _act(self, instance: Instance) -> None:
        if instance.story is None or self._chance.random() < 0.3:
            self._claim(instance)
        elif self._chance.random() < 0.1:
            instance.story = None
            self.retirements.append(instance.journal.retire("chat").result(30))
        else:
            self._count += 1
            instance.story.append(TurnRecord([self._count], [], (), None, "", {}))
            if self._chance.random() >= 0.3:  # else the save is late
                self._save(instance, self._count)

    def _claim(self, instance: Instance) -> None:
        before = list(self.acknowledged)
        try:
            instance.story = instance.journal.claim("chat", NOW, None)
        except JournalError:
            instance.story = None
            return
        turns = [turn.prompt_ids[0] for turn in instance.story.turns]
        assert [turn for turn in turns if turn in before] == before, "an acknowledged turn is missing"

    def _save(self, instance: Instance, number: int) -> None:
        turns = [turn.prompt_ids[0] for turn in instance.story.turns]
        outcome = instance.journal.save(instance.story).result(30)
        if outcome is SaveOutcome.STORED:
            self.acknowledged.extend(turn for turn in turns if turn not in self.acknowledged)
            assert number in self.acknowledged
        elif outcome is SaveOutcome.NOT_OWNER:
            instance.story = None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_no_acknowledged_turn_is_lost_and_one_retirement_wins_whatever_meets(seed: int):
    meeting = Meeting(seed)
    meeting.begin()
    for _ in range(40):
        meeting.step()
        if True in meeting.retirements:
            break
    assert meeting.retirements.count(True) <= 1
    heir = Journal([MemoryStore(meeting.contents)])
    if True in meeting.retirements:
        with pytest.raises(NotFound):
            heir.claim("chat", NOW, None)
    else:
        turns = [turn.prompt_ids[0] for turn in heir.claim("chat", NOW, None).turns]
        assert [turn for turn in turns if turn in meeting.acknowledged] == meeting.acknowledged
    for instance in meeting.instances:
        instance.journal.close(10)
    heir.close(10)
