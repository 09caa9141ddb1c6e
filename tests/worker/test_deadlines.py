"""A deadline counts from the arrival of the question. What happens before and after the engine takes part of it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from llava_sessions.ipc.messages import AskSession
from llava_sessions.worker import pictures
from llava_sessions.worker.manager import LAST_LINES_S
from tests.support.lifecycles import COLOURS, DEADLINE_S, PROMPTS, Chat, Instance, Question, Request, World, world


@pytest.fixture(params=[True, False], ids=["journal", "no journal"])
def lives(request: pytest.FixtureRequest) -> Iterator[World]:
    with world(request.param) as made:
        yield made


@pytest.fixture
def chat(lives: World) -> Chat:
    opened = lives.acknowledge()
    assert opened is not None
    lives.settle()
    return opened


def ask(lives: World, chat: Chat, colour: str | None = None) -> Request:
    """Send a question without `stream`: it has the default deadline."""
    return lives.ask(chat, Question(PROMPTS[0], None, colour), is_stream=False)


def wait(lives: World, seconds: float) -> None:
    lives._pass(seconds)


def submitted(instance: Instance) -> AskSession:
    return next(command for command in instance.devices[0].commands if isinstance(command, AskSession))


def body(request: Request) -> dict:
    assert request.last is not None
    assert (request.last.status, request.last.more) == (200, None)
    return json.loads(request.text)


@pytest.mark.parametrize("before", ["a picture", "a rebuild", "the journal"])
def test_the_engine_gets_what_is_left_after_the_preparation(lives: World, chat: Chat, before: str) -> None:
    home = lives.instances[chat.home]
    if before == "a rebuild":
        home.lose_engine()
        home.bring_engine()
    if before == "the journal":
        if lives.store is None:
            pytest.skip("the session ends with its worker")
        lives.restart(home)
    ask(lives, chat, COLOURS[1] if before == "a picture" else None)
    lives.exchange(home)
    wait(lives, 30.0)
    home.prepare()
    lives.exchange(home)
    left_ms = (DEADLINE_S - 30.0) * 1e3
    storing_ms = 0 if lives.store is None else 500
    assert submitted(home).sampling.deadline_ms == pytest.approx(left_ms - storing_ms, abs=1)
    lives.settle()


def test_a_question_whose_time_is_over_before_the_engine_has_it_ends_as_deadline(lives: World, chat: Chat) -> None:
    home = lives.instances[chat.home]
    late = ask(lives, chat, COLOURS[1])
    lives.exchange(home)
    wait(lives, DEADLINE_S)
    lives.exchange(home)  # the picture is still being prepared
    answer = body(late)
    assert (answer["response_text"], answer["finish_reason"]) == ("", "deadline")
    assert answer["usage"] == {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}
    assert answer["timings"]["total_ms"] == pytest.approx(DEADLINE_S * 1e3)
    home.prepare()
    again = ask(lives, chat)
    lives.exchange(home)
    assert submitted(home).turn_id == again.row.request_id
    lives.settle()
    assert body(again)["finish_reason"] in ("stop", "length")


def test_a_question_that_has_ended_is_not_prepared(lives: World, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a short deadline would let one session queue any number of pictures before those of others."""
    home = lives.instances[chat.home]
    decoded: list[bytes] = []
    decode = pictures.load_bytes
    monkeypatch.setattr(pictures, "load_bytes", lambda data, limits: decoded.append(data) or decode(data, limits))
    for _ in range(3):
        ask(lives, chat, COLOURS[1])
        lives.exchange(home)
        wait(lives, DEADLINE_S)
        lives.exchange(home)
    assert home.preparations.waiting == 3
    lives.settle()
    assert not decoded


def test_a_sweep_ends_a_question_while_no_row_arrives(lives: World, chat: Chat) -> None:
    home = lives.instances[chat.home]
    ask(lives, chat, COLOURS[1])
    lives.exchange(home)
    wait(lives, DEADLINE_S)
    assert home.pump.metric_values().running_turns == 1
    home.pump.sweep()
    assert home.pump.metric_values().running_turns == 0
    lives.exchange(home)


@pytest.mark.parametrize("limit", ["deadline", "shutdown"])
def test_an_answer_whose_storing_outlasts_its_time_is_not_durable_yet(limit: str) -> None:
    with world() as lives:
        chat = lives.acknowledge()
        lives.settle()
        home = lives.instances[chat.home]
        question = Question(PROMPTS[0], "ask-0123456789abcdef", None)
        late = lives.ask(chat, question, is_stream=False)
        lives.exchange(home)
        while home.engine.has_work or home.devices[0].commands:
            home.step()
        home.deliver()
        lives.exchange(home)
        assert late.last is None
        if limit == "shutdown":
            home.is_draining = True
            home.pump.drain()
        wait(lives, DEADLINE_S if limit == "deadline" else LAST_LINES_S)
        home.pump.sweep()
        lives.exchange(home)
        answer = body(late)
        assert answer["finish_reason"] in ("stop", "length")
        assert answer["durable"] is False
        home.journal_jobs.run_all()
        again = lives.ask(chat, question, is_stream=False)
        lives.settle()
        assert body(again) == {**answer, "durable": True}


@pytest.mark.parametrize("state", ["preparing", "running"])
def test_a_question_behind_an_unstored_answer_ends_with_its_moved_session(state: str) -> None:
    with world() as lives:
        chat = lives.acknowledge()
        lives.settle()
        home, other = lives.instances
        assert chat.home == home.number
        ask(lives, chat)
        lives.exchange(home)
        while home.engine.has_work or home.devices[0].commands:
            home.step()
        home.deliver()
        lives.exchange(home)
        wait(lives, DEADLINE_S)
        lives.exchange(home)  # the answer is sent, and is not stored yet
        second = ask(lives, chat, COLOURS[1])
        lives.exchange(home)
        if state == "running":
            home.preparations.run()
            lives.exchange(home)
        chat.claimed = True
        with other.journal_jobs.live():
            other.journal.claim(chat.session_id, lives.now_s, None)
        home.journal_jobs.run_all()
        lives.exchange(home)
        assert second.last is not None
        assert (second.last.status, json.loads(second.text)["error"]["code"]) == (503, "session_moved")
        lives.settle()
        assert not home.engine.sessions
