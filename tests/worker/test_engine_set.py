"""Several engines of one worker: placement of sessions, and the death of one engine. The engines are fake."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from llava_sessions.errors import Refused
from llava_sessions.ipc.messages import (
    EngineFacts,
    Memory,
    OpenFailed,
    OpenSession,
    OutOfCapacity,
    PreparedPicture,
    Report,
    TurnFailed,
)
from llava_sessions.worker.engine_set import EngineSet
from llava_sessions.worker.engines import EngineLost, EngineUp, FromEngine
from llava_sessions.worker.placement import Placement
from llava_sessions.worker.sessions import Session, SessionTable
from llava_sessions.worker.states import Residency
from tests.support.lifecycles import PROMPTS, Chat, Instance, Question, Request, World, world

BUDGET = 16_000
TOKEN_BYTES = 10


class Sink:
    """Takes commands."""

    def __init__(self) -> None:
        self.commands: list = []

    def submit(self, command) -> None:
        self.commands.append(command)


class Engines:
    """Engines with empty budgets, and their sessions."""

    def __init__(self, engines: int = 2) -> None:
        facts = EngineFacts("cpu", "float32", 4096, BUDGET, 0, TOKEN_BYTES)
        self.table = SessionTable(64, 60.0)
        ups = [EngineUp(Sink(), facts) for _ in range(engines)]
        self.set = EngineSet(ups, [f"cpu:{number}" for number in range(engines)])
        self.placement = Placement(self.set, self.table)
        self.place = self.placement.place

    def add(self, name: str, number: int, keys: tuple[str, ...] = (), tokens: int = 0) -> Session:
        """Add a session that an engine holds; it is still loading if it has `tokens`."""
        session = self.table.reserve(name)
        command = OpenSession(name, list(range(tokens)), tuple(PreparedPicture(key, {}) for key in keys))
        self.set.load(session, command, number)
        session.picture_keys = keys
        if not tokens:
            session.advance(Residency.LOADED)
        return session

    def used(self, number: int, kv_bytes: int) -> None:
        """Report the use of an engine's budget."""
        self.set.report(number, Report([], Memory(kv_bytes=kv_bytes, device_budget_bytes=BUDGET)))


def test_a_session_is_placed_on_the_engine_with_the_most_free_memory() -> None:
    engines = Engines(3)
    engines.used(0, 9_500)
    engines.used(1, 4_000)
    engines.used(2, 8_000)
    assert engines.place() == 1
    assert engines.place(avoid=1) == 2
    for number in range(4):
        engines.add(f"s{number}", 1)
    assert engines.place() == 1, "sessions count only where memory is equal"


def test_within_a_16th_of_the_budget_the_number_of_sessions_decides() -> None:
    engines = Engines()
    engines.used(0, 4_500)
    engines.used(1, 5_500)
    engines.add("a", 0)
    assert engines.place() == 1
    engines.used(1, 5_501)
    assert engines.place() == 0


def test_a_picture_that_an_engine_holds_counts_as_two_sessions() -> None:
    engines = Engines()
    engines.add("a", 1, ("red",))
    assert engines.place(("red",)) == 1
    assert engines.place(("blue",)) == 0
    engines.add("b", 1, ("red",))
    engines.add("c", 1, ("red",))
    assert engines.place(("red",)) == 0


def test_the_memory_of_sessions_that_are_loading_counts_before_it_is_reported() -> None:
    engines = Engines()
    engines.add("a", 0)
    engines.add("b", 0)
    engines.add("c", 1, tokens=200)  # 2,000 bytes: two steps of a 16th
    assert engines.place() == 0
    assert not engines.placement.has_room(BUDGET - 1_999, avoid=0)
    assert engines.placement.has_room(BUDGET - 2_000, avoid=0)


def test_a_lost_engine_gets_no_session_and_rejects_only_its_own() -> None:
    engines = Engines()
    mine = engines.add("mine", 0)
    other = engines.add("other", 1)
    engines.set.disconnect(0, EngineLost("a test", retry_after_s=40))
    assert engines.place() == 1
    engines.set.check()
    assert engines.set.restarting().retry_after_s == 1
    waits = engines.set.absent()
    assert waits is not None
    assert waits.retry_after_s == 40
    engines.set.submit(other, OpenSession("other", [], ()))
    with pytest.raises(Refused, match="try again in 1 s"):
        engines.set.submit(mine, OpenSession("mine", [], ()))
    engines.set.disconnect(1, EngineLost("a test", retry_after_s=30))
    for call in (engines.set.check, engines.place):
        with pytest.raises(Refused, match="try again in 30 s"):
            call()


# --- a worker with two engines ----------------------------------------------------------------------------------------


@pytest.fixture
def lives() -> Iterator[World]:
    with world(engines=2) as made:
        yield made


@pytest.fixture
def home(lives: World) -> Instance:
    return lives.instances[0]


def opened(lives: World, count: int) -> list[Chat]:
    """Open sessions on pictures of two colours, one after another."""
    for number in range(count):
        lives.op_open(number % 2)
        lives.settle()
    assert len(lives.chats) == count
    return lives.chats


def engine_of(home: Instance, chat: Chat) -> int | None:
    session = home.table.find(chat.session_id)
    assert session is not None
    return session.engine


def ask(lives: World, chat: Chat, number: int = 0) -> Request:
    return lives.ask(chat, Question(PROMPTS[number], None, None), is_stream=False)


def status(request: Request) -> int:
    assert request.last is not None
    return request.last.status


def code(request: Request) -> str:
    return json.loads(request.text.splitlines()[-1])["error"]["code"]


def test_the_sessions_of_the_other_engine_go_on_and_the_lost_ones_are_rebuilt_there(
    lives: World, home: Instance
) -> None:
    chats = opened(lives, 4)
    assert sorted(engine_of(home, chat) for chat in chats) == [0, 0, 1, 1]
    lost = [chat for chat in chats if engine_of(home, chat) == 0]
    kept = [chat for chat in chats if engine_of(home, chat) == 1]
    running = [ask(lives, chat) for chat in chats]
    home.prepare()
    lives.exchange(home)
    home.step()
    home.deliver()
    home.lose_engine()
    lives.settle()
    by_chat = dict(zip((chat.session_id for chat in chats), running, strict=True))
    assert [status(by_chat[chat.session_id]) for chat in kept] == [200, 200]
    for chat in lost:
        assert (status(by_chat[chat.session_id]), code(by_chat[chat.session_id])) == (503, "engine_restarting")
        assert by_chat[chat.session_id].last.headers["Retry-After"] == "1"
        assert engine_of(home, chat) is None
    again = [ask(lives, chat, 1) for chat in chats]
    lives.settle()
    assert [status(request) for request in again] == [200] * 4
    assert [engine_of(home, chat) for chat in chats] == [1] * 4
    values = home.pump.metric_values()
    assert (values.rebuilds_total, values.engine_restarts_total) == (2, 1)
    assert (values.engine_up, values.engine_sessions) == ({"cpu:0": 0, "cpu:1": 1}, {"cpu:0": 0, "cpu:1": 4})
    home.bring_engine()
    lives.settle()
    lives.close_chat(chats[0])
    lives.settle()
    lives.op_open(0)
    lives.settle()
    assert engine_of(home, lives.chats[-1]) == 0, "the new engine is empty"


def test_an_open_that_a_lost_engine_held_is_placed_on_the_other(lives: World, home: Instance) -> None:
    lives.op_open(0)
    lives.exchange(home)
    home.prepare()
    lives.exchange(home)
    assert home.devices[0].commands, "sent, and not applied"
    home.lose_engine()
    lives.settle()
    assert len(lives.chats) == 1
    assert engine_of(home, lives.chats[0]) == 1
    home.lose_engine(2)
    lives.op_open(1)
    lives.settle()
    assert lives.trace[-1].endswith("503 engine_restarting")


@pytest.mark.parametrize("rejects", [(0,), (0, 1)])
def test_an_open_without_room_is_placed_again_once(lives: World, home: Instance, rejects: tuple[int, ...]) -> None:
    for number in rejects:
        home.devices[number].engine.open_fault = OutOfCapacity
    lives.op_open(0)
    lives.settle()
    if len(rejects) == 1:
        assert engine_of(home, lives.chats[0]) == 1
    else:
        assert lives.trace[-1].endswith("429 capacity")
        assert not list(home.table)


@pytest.mark.parametrize("is_absent", [False, True])
def test_a_rebuild_without_room_is_placed_again_or_waits_for_the_lost_engine(
    lives: World, home: Instance, is_absent: bool
) -> None:
    [chat] = opened(lives, 1)
    home.lose_engine()
    if not is_absent:
        home.bring_engine()
    lives.settle()
    first = 1 if is_absent else 0
    home.devices[first].engine.open_fault = OutOfCapacity
    asked = ask(lives, chat)
    lives.settle()
    if is_absent:
        assert (status(asked), code(asked)) == (503, "engine_restarting")
        assert asked.last.headers["Retry-After"] == "3"
        asked = ask(lives, chat)
        lives.settle()
    assert status(asked) == 200
    assert engine_of(home, chat) == 1


def test_a_turn_without_room_moves_its_session_where_memory_is_free(lives: World, home: Instance) -> None:
    [chat] = opened(lives, 1)
    home.devices[0].engine.turn_fault = OutOfCapacity  # it needs 2 bytes
    asked = ask(lives, chat)
    lives.settle()
    assert (status(asked), code(asked)) == (429, "capacity"), "no engine reports free memory"
    assert engine_of(home, chat) == 0
    for engine in home.pump._manager._context.engines.all:
        engine.facts = EngineFacts("cpu", "float32", 4096, BUDGET, 0, TOKEN_BYTES)
    home.devices[0].engine.turn_fault = OutOfCapacity
    asked = lives.ask(chat, Question(PROMPTS[0], None, "blue"), is_stream=False)
    lives.settle()
    assert status(asked) == 200
    assert engine_of(home, chat) == 1
    assert not home.devices[0].engine.sessions


def test_every_request_of_a_turn_that_is_placed_again_gets_its_own_form_of_the_reply(
    lives: World, home: Instance
) -> None:
    [chat] = opened(lives, 1)
    for engine in home.pump._manager._context.engines.all:
        engine.facts = EngineFacts("cpu", "float32", 4096, BUDGET, 0, TOKEN_BYTES)
    home.devices[0].engine.turn_fault = OutOfCapacity
    question = Question(PROMPTS[0], "ask-0000000000000001", None)
    streamed = lives.ask(chat, question, is_stream=True)
    whole = lives.ask(chat, question, is_stream=False)
    lives.exchange(home)
    lives.settle()
    assert engine_of(home, chat) == 1
    assert json.loads(whole.text)["response_text"]
    assert json.loads(streamed.text.splitlines()[-1])["finish_reason"]


@pytest.mark.parametrize(("token_bytes", "leaves"), [(TOKEN_BYTES, True), (BUDGET // 10, False)])
def test_a_turn_behind_too_many_others_moves_its_session_only_to_room_for_all_of_it(
    lives: World, home: Instance, token_bytes: int, leaves: bool
) -> None:
    [chat] = opened(lives, 1)
    for engine in home.pump._manager._context.engines.all:
        engine.facts = EngineFacts("cpu", "float32", 4096, BUDGET, 0, token_bytes)
    asked = ask(lives, chat)
    lives.exchange(home)
    rejected = OutOfCapacity(chat.session_id, asked.row.request_id, 0, 0, 1, waiting_turns=256)
    home.devices[0].commands.clear()
    home.inbox.put(FromEngine(0, Report([rejected], Memory())))
    lives.settle()
    if leaves:
        assert (status(asked), engine_of(home, chat)) == (200, 1)
    else:
        assert (status(asked), code(asked), engine_of(home, chat)) == (429, "capacity", 0)


def test_a_close_on_an_engine_that_does_not_answer_holds_up_no_other_engine(
    lives: World, home: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = opened(lives, 2)
    waits: list[float] = []
    take = home.inbox.get

    def get(timeout_s: float = 0.0) -> object:
        if timeout_s > 0:
            waits.append(timeout_s)
        return take()

    monkeypatch.setattr(home.inbox, "get", get)
    monkeypatch.setattr(home.pump, "_close_wait_s", 2.0)
    first, second = (next(chat for chat in chats if engine_of(home, chat) == number) for number in range(2))
    asked = lives.ask(second, Question(PROMPTS[0], None, None), is_stream=True)
    lives.exchange(home)
    home.journal_jobs.run_all()
    waits.clear()
    home.devices[1].step()
    home.devices[1].deliver()
    lives.close_chat(first)
    lives.exchange(home)
    assert asked.text
    assert not waits, "there was output of the other engine"
    lives.exchange(home)
    assert not waits, "the close arrived before this step"
    lives.settle()
    lives.close_chat(second)
    lives.exchange(home)
    assert waits[-1] == 2.0


def test_late_events_of_the_former_engine_do_not_concern_a_session_that_has_moved(lives: World, home: Instance) -> None:
    [chat] = opened(lives, 1)
    home.lose_engine()
    home.bring_engine()
    lives.settle()
    home.devices[0].engine.open_fault = OutOfCapacity
    asked = ask(lives, chat)
    while not home.devices[0].reports:
        lives.exchange(home)
        home.prepare()
        home.devices[0].step()
    home.deliver()
    lives.exchange(home)  # the turn is being prepared for the other engine
    late = [TurnFailed(asked.row.request_id, "late"), OpenFailed(chat.session_id, "late")]
    home.inbox.put(FromEngine(0, Report(late)))
    lives.settle()
    assert status(asked) == 200
    home.inbox.put(FromEngine(0, Report(late)))
    lives.settle()
    assert engine_of(home, chat) == 1
    assert set(home.devices[1].engine.sessions) == {chat.session_id}


def test_a_retry_keeps_its_form_when_its_turn_is_placed_again(lives: World, home: Instance) -> None:
    [chat] = opened(lives, 1)
    home.lose_engine()
    home.bring_engine()
    lives.settle()
    home.devices[0].engine.open_fault = OutOfCapacity
    question = Question(PROMPTS[0], "ask-0123456789abcdef", None)
    streamed = lives.ask(chat, question, is_stream=True)
    whole = lives.ask(chat, question, is_stream=False)
    lives.settle()
    assert engine_of(home, chat) == 1
    assert (streamed.last.more, whole.last.more) == (False, None)
    assert "response_text" in json.loads(whole.text)
