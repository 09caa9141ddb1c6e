"""Faults that were found in earlier versions, one test each; the first six are also found by random lives."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
from pathlib import Path

import pytest

from llava_sessions.ipc.messages import EngineSettings
from llava_sessions.worker import engines
from llava_sessions.worker.engines import EngineLost, EngineStartError, EngineSupervisor, EngineUp
from tests.support.fake_engine_process import FakeEngineProcess
from tests.support.lifecycles import MAX_SESSIONS, PROMPTS, ROUNDS, Chat, Instance, Question, Request, World, png, world

TOKEN = "a-token-of-mine-1234"
QUESTION = Question(PROMPTS[0], "ask-0123456789abcdef", None)
PATIENCE_S = 20.0


@pytest.fixture
def lives():
    with world() as made:
        yield made


def opened(lives: World) -> Chat:
    """An acknowledged session at instance 0, whose prompt the engine is still prefilling."""
    chat = lives.acknowledge()
    assert chat is not None
    return chat


def code(request: Request) -> str:
    return json.loads(request.text.splitlines()[-1])["error"]["code"]


def status(request: Request) -> int:
    assert request.last is not None
    assert request.last.more is None
    return request.last.status


def fail(instance: Instance, session_id: str) -> None:
    """The engine reports `OpenFailed` for a session that it prefills."""
    instance.engine.fail(session_id)
    instance.devices[0].reports.clear()
    instance.step()
    instance.deliver()


def resume_row(lives: World, home: int, chat: Chat, **fields: str) -> Request:
    return lives.resume(lives.instances[home], {"type": "start_session", "resume": chat.session_id, **fields}, chat)


def test_1_a_close_that_meets_open_failed_is_answered(lives: World) -> None:
    chat = opened(lives)
    close = lives.close_chat(chat)
    lives.exchange(lives.instances[0])
    fail(lives.instances[0], chat.session_id)
    lives.settle()
    assert status(close) == 200
    lives.finish()


def test_a_long_question_is_tokenized_off_the_pumps_thread(lives: World) -> None:
    chat = opened(lives)
    lives.settle()
    instance = lives.instances[0]
    for prompt, jobs in (("a " * 512, 0), ("a " * 513, 1)):
        asked = lives.ask(chat, Question(prompt, None, None), is_stream=False)
        lives.exchange(instance)
        assert instance.preparations.waiting == jobs
        lives.settle()
        assert status(asked) == 200
    lives.finish()


def test_2_a_failed_prefill_keeps_a_resumed_session_that_was_acknowledged(lives: World) -> None:
    chat = opened(lives)
    lives.settle()
    first = lives.ask(chat, QUESTION, is_stream=False)
    lives.settle()
    assert status(first) == 200
    resume_row(lives, 0, chat)
    instance = lives.instances[0]
    while len(lives.chats) == 1:
        instance.prepare()
        instance.journal_jobs.run_all()
        lives.exchange(instance)
        if instance.devices[0].commands:
            instance.step()
        instance.deliver()
    fail(instance, lives.chats[1].session_id)
    lives.exchange(instance)
    assert lives.chats[1].session_id in instance.table
    lives.finish()  # the resumed session answers with its history


def test_2_a_failed_rebuild_whose_turn_is_over_keeps_the_session(lives: World) -> None:
    chat = opened(lives)
    lives.settle()
    instance = lives.instances[0]
    instance.lose_engine()
    instance.bring_engine()
    lives.ask(chat, QUESTION, is_stream=False)
    lives.exchange(instance)
    instance.prepare()
    lives.exchange(instance)
    instance.step()
    chat.stops += 1
    lives.send(0, "cancel", {"type": "cancel"}, chat.session_id, chat=chat)
    lives.exchange(instance)
    instance.step()  # the turn is cancelled, the rebuild goes on
    instance.deliver()
    lives.exchange(instance)
    assert not instance.active
    fail(instance, chat.session_id)
    lives.exchange(instance)
    assert chat.session_id in instance.table
    lives.finish()


@pytest.mark.parametrize("home", [0, 1])
def test_3_a_resume_whose_client_left_keeps_the_old_session(lives: World, home: int) -> None:
    chat = opened(lives)
    lives.settle()
    resume_row(lives, home, chat)
    instance = lives.instances[home]
    lives.exchange(instance)
    instance.prepare()
    lives.exchange(instance)
    lives.left(instance, instance.active.pop())
    chat.heirs.clear()  # the conversation must stay where it was
    lives.settle()
    assert not list(lives.instances[1].table)
    again = resume_row(lives, home, chat)
    lives.settle()
    assert status(again) == 200


def test_4_a_retry_does_not_join_a_turn_that_is_being_stopped(lives: World) -> None:
    chat = opened(lives)
    lives.settle()
    instance = lives.instances[0]
    lives.ask(chat, QUESTION, is_stream=False)
    lives.exchange(instance)
    instance.step()
    lives.left(instance, instance.active.pop())
    lives.exchange(instance)  # sends the stop
    again = lives.ask(chat, QUESTION, is_stream=False)
    lives.exchange(instance)
    lives.settle()
    assert status(again) == 200
    assert json.loads(again.text)["finish_reason"] in ("stop", "length")
    lives.finish()


def test_5_rows_that_return_after_a_silence_of_the_frontend_are_ended(lives: World) -> None:
    streamed = opened(lives)
    held = opened(lives)
    lives.settle()
    instance = lives.instances[0]
    stream = lives.ask(streamed, Question(PROMPTS[2], None, None), is_stream=True)
    for _ in range(ROUNDS):
        lives.exchange(instance)
        instance.step()
        instance.deliver()
        lives.exchange(instance)
        if stream.head is not None:
            break
        instance.journal_jobs.run_all()  # marks the turn: no text is shown before
    assert stream.last.more is True
    whole = lives.ask(held, QUESTION, is_stream=False)
    lives.exchange(instance)
    lives.op_stall(0)
    lives.exchange(instance)
    assert not instance.active
    assert stream.last.more is False
    assert code(stream) == "request_dropped"
    assert (status(whole), code(whole)) == (503, "request_dropped")
    assert "Retry-After" in whole.last.headers
    lives.finish()


def test_5_a_pause_of_the_worker_itself_drops_nothing(lives: World) -> None:
    chat = opened(lives)
    lives.settle()
    instance = lives.instances[0]
    row = lives.ask(chat, QUESTION, is_stream=False)
    lives.exchange(instance)
    lives.monotonic_s += 60
    instance.pump.sweep()  # of the sweeper, as soon as it runs again
    lives.settle()
    assert status(row) == 200


def test_6_a_passing_read_error_of_the_journal_keeps_the_session(lives: World) -> None:
    chat = opened(lives)
    lives.settle()
    lives.restart(lives.instances[0])
    lives.store.reads_fail = True
    row = lives.ask(chat, QUESTION, is_stream=False)
    lives.settle()
    assert (status(row), code(row)) == (503, "journal_unavailable")
    assert "Retry-After" in row.last.headers
    lives.store.reads_fail = False
    row = lives.ask(chat, QUESTION, is_stream=False)
    lives.settle()
    assert status(row) == 200


class Spawner:
    """Starts fake engines; so many starts fail after the first one."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.starts = 0

    def __call__(self, settings: EngineSettings) -> FakeEngineProcess:
        self.starts += 1
        if 1 < self.starts <= 1 + self.failures:
            raise OSError("Cannot allocate memory")
        return FakeEngineProcess(settings)


@pytest.mark.parametrize("failures", [2, 10])
def test_7_a_spawn_that_fails_is_retried_and_then_given_up_loudly(failures: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(engines, "_FIRST_PAUSE_S", 0.01)
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    given_up = threading.Event()
    spawner = Spawner(failures)
    settings = EngineSettings(str(tmp_path), "", "float32", "cpu", 256)
    supervisor = EngineSupervisor(settings, inbox, 60, given_up.set, spawner)
    supervisor.start()
    os.kill(supervisor.pid, signal.SIGKILL)
    assert isinstance(inbox.get(timeout=PATIENCE_S), EngineLost)
    if failures < engines.MAX_FAILED_STARTS:
        assert isinstance(inbox.get(timeout=PATIENCE_S), EngineUp)
        assert not given_up.is_set()
    else:
        assert given_up.wait(PATIENCE_S)
        assert spawner.starts == 1 + engines.MAX_FAILED_STARTS
    supervisor.stop()


def test_7_a_first_spawn_that_fails_is_an_error_that_says_so(tmp_path: Path) -> None:
    def spawn(settings: EngineSettings) -> FakeEngineProcess:
        raise OSError("Cannot allocate memory")

    settings = EngineSettings(str(tmp_path), "", "float32", "cpu", 256)
    supervisor = EngineSupervisor(settings, queue.SimpleQueue(), 60, lambda: None, spawn)
    with pytest.raises(EngineStartError, match="Cannot allocate memory"):
        supervisor.start()


@pytest.mark.parametrize("is_cold", [False, True])
def test_8_of_two_instances_that_resume_a_session_exactly_one_succeeds(lives: World, is_cold: bool) -> None:
    chat = opened(lives)
    lives.settle()
    if is_cold:
        lives.restart(lives.instances[0])
    rows = [resume_row(lives, home, chat) for home in (0, 1)]
    lives.settle()
    assert sorted(map(status, rows)) == [200, 409]
    lives.finish()


def test_8_an_instance_that_lost_its_session_says_so(lives: World) -> None:
    chat = opened(lives)
    lives.settle()
    resume_row(lives, 1, chat)
    lives.settle()
    stale = lives.ask(chat, QUESTION, is_stream=False)
    lives.settle()
    assert (status(stale), code(stale)) == (503, "session_moved")
    assert "Retry-After" in stale.last.headers
    lives.finish()


def test_8_the_token_is_checked_before_the_claim(lives: World) -> None:
    body = {"type": "start_session", "image": png("red"), "session_token": TOKEN}
    row = lives.send(0, "open", body, None, colour="red")
    lives.settle()
    assert status(row) == 200
    before = dict(lives.store.objects)
    stranger = resume_row(lives, 1, lives.chats[-1])
    lives.chats[-1].is_ended = None  # so that 404 is expected
    lives.settle()
    assert (status(stranger), code(stranger)) == (404, "session_not_found")
    assert lives.store.objects == before


def test_a_close_of_a_session_that_was_taken_over_is_answered(lives: World) -> None:
    """Found by: ask, resume at the other instance, close while the answer is being stored."""
    chat = opened(lives)
    lives.settle()
    instance = lives.instances[0]
    lives.ask(chat, QUESTION, is_stream=False)
    while not instance.journal_jobs.waiting:
        lives.exchange(instance)
        instance.step()
        instance.deliver()
    resume_row(lives, 1, chat)
    other = lives.instances[1]
    lives.exchange(other)
    other.prepare()  # claims the session
    close = lives.close_chat(chat)
    lives.exchange(instance)
    instance.journal_jobs.run_all()
    lives.settle()
    assert (status(close), code(close)) == (503, "session_moved")
    again = lives.close_chat(chat)
    lives.settle()
    assert (status(again), code(again)) == (404, "session_not_found")  # the resume has ended it


def test_a_retried_open_whose_session_made_room_is_repeated(lives: World) -> None:
    """Found by: open with a retry key, restart, repeat the open, and an open that needs the place meanwhile."""
    instance = lives.instances[0]
    body = {"type": "start_session", "image": png("red"), "request_id": "open-0123456789abcdef"}
    first = lives.send(0, "open", body, None, colour="red", key=body["request_id"])
    lives.settle()
    assert status(first) == 200
    for _ in range(MAX_SESSIONS - 1):
        opened(lives)
        lives.settle()
    lives.restart(instance)  # only the journal has the sessions now
    again = lives.send(0, "open", body, None, colour="red", key=body["request_id"])
    lives.exchange(instance)
    assert instance.preparations.waiting == 1  # reads the session
    for _ in range(MAX_SESSIONS):
        lives.send(0, "open", {"type": "start_session", "image": png("blue")}, None, colour="blue")
    lives.exchange(instance)
    assert lives.chats[0].session_id not in instance.table
    lives.settle()
    assert (status(again), code(again)) == (503, "session_moved")
    assert "Retry-After" in again.last.headers


def test_a_failed_prefill_does_not_reject_a_resume_whose_old_session_is_being_removed(lives: World) -> None:
    chat = opened(lives)
    lives.settle()
    resume_row(lives, 1, chat)
    instance = lives.instances[1]
    lives.exchange(instance)
    instance.prepare()
    lives.exchange(instance)
    instance.step()
    instance.deliver()
    lives.exchange(instance)
    instance.journal_jobs.run()  # saved
    lives.exchange(instance)  # asks for the removal of the old session
    (session,) = instance.table
    fail(instance, session.id)
    lives.settle()
    assert len(lives.chats) == 2
    lives.finish()


def test_a_resume_of_a_session_that_is_found_to_have_moved_is_answered(lives: World) -> None:
    """The mark of a cancelled turn shows the move after the resume has taken the session."""
    chat = opened(lives)
    lives.settle()
    chat.moves = True
    lives.ask(chat, QUESTION, is_stream=False, at=1)
    lives.settle()  # the session is at instance 1
    former = lives.instances[0]
    turn = lives.ask(chat, Question(PROMPTS[1], None, None), is_stream=False, at=0)
    lives.exchange(former)
    former.prepare()
    lives.exchange(former)  # the turn runs, and its mark waits
    chat.stops += 1
    lives.send(0, "cancel", {"type": "cancel"}, chat.session_id, chat=chat)
    lives.exchange(former)
    former.step()
    former.deliver()
    lives.exchange(former)
    assert turn not in former.active

    first = resume_row(lives, 0, chat)
    lives.exchange(former)
    former.journal_jobs.run_all()
    lives.exchange(former)
    assert former.table.find(chat.session_id) is None
    lives.settle()
    assert code(first) == "session_busy"

    retried = resume_row(lives, 0, chat)
    lives.settle()
    assert status(retried) == 200
    assert json.loads(retried.text)["turns"] == 1
