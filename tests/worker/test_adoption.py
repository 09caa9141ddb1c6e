"""Sessions move by themselves: an instance adopts a session of another one from the journal that they share.

Two pumps over one journal, with real engines. The journal is a directory or S3 (moto).
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava_sessions.ipc.messages import AskSession, CloseSession
from llava_sessions.journal.encoding import key_of
from llava_sessions.journal.journal import Journal
from llava_sessions.journal.owners import read_owner
from llava_sessions.journal.stores import DirectoryStore, S3Store, Store, StoreError
from llava_sessions.torchserve.batch import Row
from llava_sessions.torchserve.sequences import RETURN_S
from llava_sessions.worker import adoption, marks
from tests.support.journals import PREFIX, bucket, folder
from tests.support.pump_frontend import PATIENCE_S, QUESTIONS, TTL, Frontend, code, lines, model, tokens

__all__ = ["bucket", "folder", "model", "tokens"]  # fixtures

TOKEN = "t" * 16
Make = Callable[..., Frontend]


@pytest.fixture(params=["directory", "s3"])
def make_store(request: pytest.FixtureRequest) -> Callable[[], Store]:
    """Makes stores over one place, as each instance has one."""
    if request.param == "directory":
        path = request.getfixturevalue("folder")
        return lambda: DirectoryStore(str(path))
    request.getfixturevalue("bucket")
    return lambda: S3Store(PREFIX)


@pytest.fixture
def make(model, tokens) -> Iterator[Make]:
    """Makes instances over stores of one place. Their rows have different IDs."""
    made: list[Journal] = []

    def instance(store: Store, **options: object) -> Frontend:
        made.append(Journal([store]))
        front = Frontend(model, tokens, journal=made[-1], first_row=1000 * len(made), **options)
        front.pump.recover()
        return front

    yield instance
    for journal in made:
        journal.close(10)


@pytest.fixture
def pair(make: Make, make_store: Callable[[], Store]) -> tuple[Frontend, Frontend]:
    """Two instances with one journal."""
    return make(make_store()), make(make_store())


@pytest.fixture
def two(make: Make, folder: Path) -> tuple[Frontend, Frontend]:
    """Two instances with one directory."""
    return make(DirectoryStore(str(folder))), make(DirectoryStore(str(folder)))


def settled(front: Frontend) -> Frontend:
    """Wait until the instance has stored everything."""
    assert front.journal.flush(PATIENCE_S)
    return front


def refused(front: Frontend, row) -> tuple[int, str]:
    reply = front.answer(row)
    assert (reply.status == 503) == ("Retry-After" in reply.headers)
    return reply.status, code(reply)


def stay(model, tokens) -> list[dict]:
    """The answers of a session that does not move."""
    alone = Frontend(model, tokens)
    session = alone.open()
    return [alone.ask(session, question, return_token_ids=True) for question in QUESTIONS]


# --- a session that is idle ---


def test_an_idle_session_goes_on_where_it_is_asked(pair, model, tokens):
    first, second = pair
    expected = stay(model, tokens)
    session = first.open()
    answers = [first.ask(session, QUESTIONS[0], return_token_ids=True)]
    settled(first)
    answers.append(second.ask(session, QUESTIONS[1], return_token_ids=True))
    answers.append(second.ask(session, QUESTIONS[2], return_token_ids=True))
    assert [answer["token_ids"] for answer in answers] == [answer["token_ids"] for answer in expected]
    assert {answer["session_id"] for answer in answers} == {session}
    assert all(answer["durable"] for answer in answers)
    assert sum(isinstance(command, AskSession) for command in second.commands) == 2, "no turn is generated twice"
    assert second.pump.metric_values().rebuilds_total == 1
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [
        one["usage"]["prompt_tokens"] for one in expected
    ]
    assert answers[1]["usage"]["cached_tokens"] == 0, "one prefill brings the conversation back"
    assert answers[2]["usage"] == expected[2]["usage"]


def test_a_session_keeps_its_expiry(two):
    first, second = two
    session = first.open()
    expires = first.table.find(session).expires
    settled(first)
    second.now_s += TTL - 10
    second.ask(session)
    assert second.table.find(session).expires == expires
    second.now_s += 20
    assert refused(second, second.ask_row(session)) == (410, "session_expired")


def test_requests_that_wait_for_one_claim_start_in_their_order(two):
    first, second = two
    session = first.open()
    settled(first)
    ask = second.ask_row(session, max_new_tokens=200)
    busy = second.ask_row(session)
    close = second.close_row(session)
    (answered,), (conflict,), (closed,) = second.settle(ask, busy, close)
    assert (code(conflict), closed.status) == ("session_busy", 200)
    assert lines([answered])[0]["finish_reason"] == "cancelled"
    assert refused(first, first.ask_row(session)) == (503, "session_moved")
    assert refused(first, first.ask_row(session)) == (404, "session_not_found")


def test_cancel_close_and_resume_find_the_session(two):
    first, second = two
    session, closed = first.open(), first.open("blue")
    settled(first)
    assert second.body_of(second.cancel_row(session)) == {"success": False, "session_id": session}
    assert second.body_of(second.close_row(closed))["success"]
    assert refused(first, first.close_row(closed)) == (503, "session_moved")
    assert second.table.find(session) is not None
    later = second.body_of(second.row({"type": "start_session", "resume": session}))
    assert later["session_id"] != session


def test_a_retried_question_is_answered_from_the_journal(two):
    first, second = two
    session = first.open()
    request_id = str(uuid.uuid4())
    answer = first.ask(session, request_id=request_id)
    settled(first)
    again = second.ask(session, request_id=request_id)
    assert again["response_text"] == answer["response_text"]
    assert second.commands == []


def messages_row(front: Frontend, session: str, *texts: str) -> Row:
    """A conversation as an OpenAI client sends it, under the session header: questions and answers in turn."""
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    body = json.dumps({"model": "m", "messages": messages, "max_tokens": 6}).encode()
    return front.row(body, session, {"url_path": "v1/chat/completions"})


def content(completion: dict) -> str:
    return completion["choices"][0]["message"]["content"]


def test_messages_under_the_session_header_find_the_session(two, model, tokens):
    first, second = two
    alone = Frontend(model, tokens)
    stays = alone.open()
    said = alone.ask(stays, QUESTIONS[0])["response_text"]
    conversation = [QUESTIONS[0], said, QUESTIONS[1]]
    expected = [alone.body_of(messages_row(alone, stays, *conversation))]
    answer = content(expected[0])
    longer = [*conversation, answer, QUESTIONS[2]]
    expected.append(alone.body_of(messages_row(alone, stays, *longer)))

    session = first.open()
    assert first.ask(session, QUESTIONS[0])["response_text"] == said
    turn = first.start(session)
    settled(first)
    busy = second.answer(messages_row(second, session, *conversation))
    assert (busy.status, code(busy), "Retry-After" in busy.headers) == (503, "session_moved", True)
    assert set(json.loads(busy.body)["error"]) == {"message", "type", "param", "code"}
    first.settle(turn, first.cancel_row(session))
    first.pump.sweep()
    settled(first)
    completion = second.body_of(messages_row(second, session, *conversation))
    assert content(completion) == answer
    assert completion["usage"]["prompt_tokens"] == expected[0]["usage"]["prompt_tokens"]
    assert sum(isinstance(command, AskSession) for command in second.commands) == 1, "no turn is generated twice"
    assert {one.id for one in second.table} == {session}
    settled(second)
    second.pump.sweep()
    settled(second)
    lost = first.answer(messages_row(first, session, *longer))
    assert (lost.status, code(lost), "Retry-After" in lost.headers) == (503, "session_moved", True)
    back = first.body_of(messages_row(first, session, *longer))
    assert content(back) == content(expected[1])
    assert back["usage"]["prompt_tokens"] == expected[1]["usage"]["prompt_tokens"]
    unknown = first.answer(messages_row(first, f"ls-{uuid.uuid4()}", QUESTIONS[0]))
    assert (unknown.status, code(unknown)) == (404, "session_not_found")


# --- whose session it is ---


def test_the_token_is_checked_before_the_claim(two):
    first, second = two
    session = first.open(session_token=TOKEN)
    settled(first)
    for fields in ({}, {"session_token": "w" * 16}):
        assert refused(second, second.ask_row(session, **fields)) == (404, "session_not_found")
    assert first.ask(session, session_token=TOKEN)["durable"], "the session is still the first one's"
    settled(first)
    assert second.ask(session, session_token=TOKEN)["durable"]
    assert refused(second, second.ask_row(session)) == (404, "session_not_found")


def test_a_request_with_another_token_does_not_fail_the_owner_of_the_session(two):
    first, second = two
    session = first.open(session_token=TOKEN)
    settled(first)
    wrong = second.ask_row(session, session_token="w" * 16)
    right = second.ask_row(session, session_token=TOKEN)
    (unknown,), (answer,) = second.settle(wrong, right)
    assert (unknown.status, answer.status) == (404, 200)


def test_expired_and_closed_sessions_are_not_adopted(two):
    first, second = two
    expired, closed = first.open(), first.open("blue")
    first.answer(first.close_row(closed))
    settled(first)
    second.now_s += TTL + 1
    for session in (expired, closed):
        assert refused(second, second.ask_row(session)) == (404, "session_not_found")
    assert not list(second.table)


def test_a_damaged_session_is_not_found(two, folder):
    first, second = two
    session = first.open()
    settled(first)
    (folder / key_of(session) / "000000.rec").write_bytes(b"damaged")
    assert refused(second, second.ask_row(session)) == (404, "session_not_found")
    assert not list(second.table)


# --- a turn that runs ---


def test_a_running_turn_keeps_its_session(pair):
    first, second = pair
    session = first.open()
    turn = first.start(session, max_new_tokens=20)
    settled(first)
    for row in (second.ask_row(session), second.close_row(session), second.cancel_row(session)):
        assert refused(second, row) == (503, "session_moved")
    assert not list(second.table)
    ((answer,),) = first.settle(turn)
    assert lines([answer])[0]["durable"]
    first.pump.sweep()
    settled(first)
    assert second.ask(session)["usage"]["prompt_tokens"] > 20


def test_a_session_is_free_after_a_cancelled_turn(two):
    first, second = two
    session = first.open()
    turn = first.start(session)
    settled(first)
    first.settle(turn, first.cancel_row(session))
    first.pump.sweep()
    settled(first)
    assert second.ask(session)["durable"]


def test_the_mark_of_a_dead_instance_ends_by_itself(two):
    first, second = two
    session = first.open()
    first.start(session)
    settled(first)
    assert refused(second, second.ask_row(session)) == (503, "session_moved")
    second.now_s += marks.LEASE_S
    assert second.ask(session)["durable"]


def test_the_mark_of_a_long_turn_is_renewed(two, folder):
    first, second = two
    session = first.open()
    turn = first.start(session)
    settled(first)
    for _ in range(5):
        first.now_s += marks.RENEWAL_S
        first.skipped_s += marks.RENEWAL_S
        first.exchange(turn)
        settled(first)
    second.now_s = first.now_s
    assert refused(second, second.ask_row(session)) == (503, "session_moved")
    first.settle(turn, first.cancel_row(session))
    settled(first)
    assert read_owner(DirectoryStore(str(folder)), key_of(session)).busy_until_s == 0


def test_a_drained_instance_gives_its_sessions_away_at_once(two):
    first, second = two
    session = first.open()
    turn = first.start(session, max_new_tokens=5)
    first.pump.drain()
    first.settle(turn)
    first.pump.sweep()
    assert refused(first, first.ask_row(session)) == (503, "shutting_down")
    settled(first)
    assert second.ask(session)["durable"]


# --- the former owner ---


def moved(first: Frontend, second: Frontend) -> str:
    """A session that the second instance has taken over from the first one, and answered once."""
    session = first.open()
    first.ask(session, QUESTIONS[0])
    settled(first)
    second.ask(session, QUESTIONS[1])
    settled(second)
    return session


@pytest.mark.parametrize("stream", [False, True])
def test_a_former_owner_shows_no_text_and_takes_the_session_back(two, model, tokens, stream):
    first, second = two
    expected = stay(model, tokens)
    session = moved(first, second)
    reply = first.answer(first.ask_row(session, QUESTIONS[2], stream=stream))
    assert (reply.status, code(reply)) == (503, "session_moved")
    assert first.commands[-1] == CloseSession(session)
    answer = first.ask(session, QUESTIONS[2], return_token_ids=True)
    assert answer["token_ids"] == expected[2]["token_ids"]
    assert refused(second, second.ask_row(session)) == (503, "session_moved")


def test_a_former_owner_does_not_close_the_session_of_another(two):
    first, second = two
    session = moved(first, second)
    assert refused(first, first.close_row(session)) == (503, "session_moved")
    assert second.ask(session, QUESTIONS[2])["durable"]
    settled(second)
    second.pump.sweep()
    settled(second)
    assert first.body_of(first.close_row(session))["success"]
    assert refused(second, second.ask_row(session)) == (503, "session_moved")
    assert refused(second, second.ask_row(session)) == (404, "session_not_found")


def test_the_idle_expiry_of_a_former_owner_is_not_that_of_the_session(make, folder):
    first = make(DirectoryStore(str(folder)), idle_s=10.0)
    second = make(DirectoryStore(str(folder)))
    session = moved(first, second)
    first.now_s += 15
    first.pump.sweep()
    settled(first)
    first.pump.sweep()
    assert first.table.find(session) is None
    assert first.ask(session)["durable"], "another instance has used the session since"


def test_a_session_that_was_only_found_at_the_start_is_not_removed_when_idle(make, folder):
    first = make(DirectoryStore(str(folder)))
    session = first.open()
    settled(first)
    second = make(DirectoryStore(str(folder)), idle_s=10.0)
    assert session in second.table
    second.now_s += 15
    second.pump.sweep()
    settled(second)
    assert first.ask(session)["durable"]


# --- limits ---


def test_the_table_of_an_instance_holds(make, folder):
    first = make(DirectoryStore(str(folder)))
    session = first.open()
    settled(first)
    second = make(DirectoryStore(str(folder)), max_sessions=1)
    other = second.open("blue")  # the session that was found at the start makes room
    assert refused(second, second.ask_row(session)) == (429, "capacity")
    assert refused(second, second.ask_row(f"ls-{uuid.uuid4()}")) == (404, "session_not_found")
    assert first.ask(session)["durable"], "it was not claimed"
    settled(first)
    second.answer(second.close_row(other))
    first.pump.sweep()
    settled(first)
    assert second.ask(session)["durable"]


class CountingStore(DirectoryStore):
    """A directory that counts reads of owner records, and fails or waits."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.reads = 0
        self.fails = False
        self.gate = threading.Event()
        self.gate.set()

    def read(self, key: str, name: str) -> tuple[bytes, str] | None:
        self.gate.wait(PATIENCE_S)
        self.reads += name == "owner"
        if self.fails:
            raise StoreError("can't read: Input/output error")
        return super().read(key, name)


def test_only_ids_of_our_form_are_looked_up_and_a_miss_is_remembered(make, folder):
    store = CountingStore(folder)
    front = make(store)
    for session in ("unknown", "ts-seq-1", f"ls-{uuid.uuid4()}".upper(), f"x-{uuid.uuid4()}"):
        assert refused(front, front.ask_row(session)) == (404, "session_not_found")
    assert store.reads == 0
    unknown = f"ls-{uuid.uuid4()}"
    for _ in range(3):
        assert refused(front, front.ask_row(unknown)) == (404, "session_not_found")
    assert store.reads == 1
    front.skipped_s += adoption.MISS_S
    assert refused(front, front.ask_row(unknown)) == (404, "session_not_found")
    assert store.reads == 2


def test_a_journal_that_cannot_be_read_is_no_miss(make, folder):
    first = make(DirectoryStore(str(folder)))
    store = CountingStore(folder)
    second = make(store)
    session = first.open()
    settled(first)
    store.fails = True
    assert refused(second, second.ask_row(session)) == (503, "journal_unavailable")
    store.fails = False
    assert second.ask(session)["durable"]


def test_too_many_look_ups_are_503_and_never_404(make, folder):
    first = make(DirectoryStore(str(folder)))
    store = CountingStore(folder)
    second = make(store)
    session = first.open()
    settled(first)
    store.gate.clear()
    rows = [second.ask_row(f"ls-{uuid.uuid4()}") for _ in range(adoption.LOOKUPS_AT_ONCE)]
    assert second.exchange(*rows) == [None] * len(rows)
    *held, full = second.exchange(*rows, second.ask_row(session))
    assert held == [None] * len(rows)
    assert (full.status, code(full), "Retry-After" in full.headers) == (503, "journal_unavailable", True)
    store.gate.set()
    assert {reply.status for (reply,) in second.settle(*rows)} == {404}
    assert second.ask(session)["durable"]


def test_look_ups_are_limited_on_average(make, folder, monkeypatch):
    monkeypatch.setattr(adoption, "LOOKUPS_PER_S", 0.0)
    monkeypatch.setattr(adoption, "LOOKUPS_BURST", 3)
    front = make(DirectoryStore(str(folder)))
    codes = [refused(front, front.ask_row(f"ls-{uuid.uuid4()}"))[1] for _ in range(4)]
    assert codes == ["session_not_found"] * 3 + ["journal_unavailable"]


def test_the_limiter_gains_tokens_with_time():
    bucket = adoption.TokenBucket(per_s=2.0, burst=3)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(10.5), bucket.take(10.5)] == [True, False]
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]


def test_without_adoption_a_session_stays_unknown_and_unmarked(make, folder):
    first, second = (make(DirectoryStore(str(folder)), adopt_sessions=False) for _ in range(2))
    session = first.open()
    first.start(session)
    settled(first)
    assert refused(second, second.ask_row(session)) == (404, "session_not_found")
    assert read_owner(DirectoryStore(str(folder)), key_of(session)).busy_until_s == 0


# --- two instances at one moment ---


class MeetingStore(DirectoryStore):
    """A directory that calls `meet` once, just before an owner record is replaced."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.meet: Callable[[], object] | None = None

    def replace(self, key: str, name: str, data: bytes, version: str) -> bool:
        meet = self.meet
        self.meet = None
        if meet is not None and name == "owner":
            meet()
        return super().replace(key, name, data, version)


def test_of_two_instances_that_adopt_at_once_one_succeeds(make, folder):
    first = make(DirectoryStore(str(folder)))
    session = first.open()
    settled(first)
    store = MeetingStore(folder)
    late, early = make(store), make(DirectoryStore(str(folder)))
    answers: list[dict] = []
    store.meet = lambda: answers.append(early.ask(session))
    assert refused(late, late.ask_row(session)) == (503, "session_moved")
    settled(early)
    early.pump.sweep()
    settled(early)
    assert answers[0]["durable"]
    assert late.ask(session)["usage"]["prompt_tokens"] > answers[0]["usage"]["prompt_tokens"]


def test_a_turn_that_begins_during_a_claim_keeps_its_session(make, folder):
    first = make(DirectoryStore(str(folder)))
    session = first.open()
    settled(first)
    store = MeetingStore(folder)
    second = make(store)
    turns = []

    def begin() -> None:
        turns.append(first.start(session, max_new_tokens=20))
        settled(first)

    store.meet = begin
    assert refused(second, second.ask_row(session)) == (503, "session_moved")
    ((answer,),) = first.settle(*turns)
    assert lines([answer])[0]["durable"]


# --- TorchServe's sequences ---


def test_the_sequence_of_an_adopted_session_is_kept(two):
    first, second = two
    session = first.open()
    turn = first.start(session, max_new_tokens=20)
    settled(first)
    assert refused(second, second.ask_row(session)) == (503, "session_moved")
    assert session not in second.ended, "the client comes back"
    first.settle(turn)
    first.pump.sweep()
    settled(first)
    second.ask(session)
    second.skipped_s += RETURN_S + 1
    assert session not in second.ended
    late = second.row({"type": "close_session"}, session, headers=dict([second.mark]))
    assert second.answer(late).status == 200
    assert second.ask(session)["durable"], "an end request from before the adoption ends nothing"
    second.answer(second.close_row(session))
    assert session in second.ended


def test_the_sequence_of_a_client_that_does_not_come_back_is_ended(two):
    first, second = two
    session = first.open()
    first.start(session)
    settled(first)
    assert refused(second, second.ask_row(session)) == (503, "session_moved")
    second.skipped_s += RETURN_S
    assert session in second.ended


def test_the_sequence_of_a_client_that_left_during_a_claim_is_ended(make, folder):
    store = CountingStore(folder)
    front = make(store)
    unknown = f"ls-{uuid.uuid4()}"
    store.gate.clear()
    assert front.exchange(front.ask_row(unknown)) == [None]
    front.exchange()
    store.gate.set()
    until = time.monotonic() + PATIENCE_S
    while unknown not in front.ended and time.monotonic() < until:
        front.exchange()
        time.sleep(0.01)
    assert unknown in front.ended
    assert not list(front.table)
