"""Questions wait for device memory in order of arrival, next to openings. Each answer equals that of `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_sessions.engine import admission
from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.kv import GROWTH_TOKENS, KVShape, SessionKV
from llava_sessions.engine.memory import MemoryExceeded
from llava_sessions.engine.session import EngineSessionState
from llava_sessions.ipc.messages import (
    AskSession,
    Cancelled,
    Closed,
    CloseSession,
    Finished,
    OutOfCapacity,
    Prefilled,
    Sampling,
    StopTurn,
    TurnFailed,
)
from tests.support.engine_chats import QUESTIONS, Chats, Reference, noise

TOKEN_BYTES = 4 * 2 * 2 * 16 * 4  # layers, keys and values, kv heads, head dim, float32
STEP_BYTES = GROWTH_TOKENS * TOKEN_BYTES
FEATURES_BYTES = 16 * 64 * 4  # image tokens, hidden, float32
PLENTY = 2**40
NAMES = [f"s{index:02}" for index in range(12)]


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Reference:
    return Reference(tiny)


def opened(tiny: Path, names: list[str], device_bytes: int) -> Chats:
    """Chats of which each has a picture of its own, under a budget for KV beside their features."""
    chats = Chats(tiny, budget=DeviceBudget(device_bytes + len(names) * FEATURES_BYTES, PLENTY))
    for seed, name in enumerate(names):
        chats.open(name, seed)
        chats.run()
    return chats


def stop(chats: Chats, name: str) -> None:
    """End a turn that has reserved far more tokens than a test wants to generate."""
    chats.engine.apply(StopTurn(f"turn-{name}", "cut", keep_answer=True))


def started(chats: Chats) -> list[str]:
    """Run to the end; return the sessions in the order in which their turns got memory. Each is stopped early."""
    order: list[str] = []
    while chats.engine.has_work:
        for name in order:
            stop(chats, name)
        phases = chats.engine.phases()
        chats.events += next(phases)
        running = sorted((s.ticket, s.id) for s in chats.engine.sessions.values() if s.turn and not s.turn.is_waiting)
        order += [name for _, name in running if name not in order]
        for events in phases:
            chats.events += events
    return order


def test_all_of_many_questions_are_answered_in_order_and_equal_generate(tiny: Path, reference: Reference) -> None:
    chats = opened(tiny, NAMES, 3 * STEP_BYTES)
    expected = {}
    for name in NAMES:
        prompt_ids = chats.ask(name, QUESTIONS[0], Sampling(6, ignore_eos=True))
        expected[name] = reference.answer(prompt_ids, chats.pixels(name), 6)
    most = 0
    finished: dict[str, Finished] = {}
    while chats.engine.has_work:
        finished |= chats.run(steps=1)
        sessions = chats.engine.sessions.values()
        most = max(most, sum(s.turn is not None and not s.turn.is_waiting for s in sessions))
        memory = chats.engine.memory()
        assert memory.kv_bytes + memory.features_bytes <= chats.engine.device_memory.budget.device_bytes
    assert 1 < most < len(NAMES)
    assert list(finished) == NAMES
    for name in NAMES:
        cut = finished[name].answer_ids[: len(expected[name])]
        assert cut == expected[name]
    assert not [event for event in chats.events if isinstance(event, OutOfCapacity)]


def test_a_turn_reserves_what_its_answer_may_need(tiny: Path) -> None:
    """In whole growth steps."""
    chats = opened(tiny, NAMES[:3], 4 * STEP_BYTES)
    for name, tokens in zip(NAMES[:3], (5, 5, GROWTH_TOKENS), strict=True):
        chats.ask(name, QUESTIONS[0], Sampling(tokens))
    next(chats.engine.phases())
    turns = [chats.engine.sessions[name].turn for name in NAMES[:3]]
    assert not any(turn.is_waiting for turn in turns)
    reserved = [chats.engine.sessions[name].reserved_bytes for name in NAMES[:3]]
    assert reserved == [STEP_BYTES, STEP_BYTES, 2 * STEP_BYTES]


def test_a_long_question_is_not_overtaken(tiny: Path) -> None:
    names = [*"abcd"]
    chats = opened(tiny, names, 2 * STEP_BYTES)
    chats.ask("a", QUESTIONS[0], Sampling(GROWTH_TOKENS))
    chats.ask("b", QUESTIONS[0], Sampling(GROWTH_TOKENS))
    for name in "cd":
        chats.ask(name, QUESTIONS[0], Sampling(2))
    assert started(chats) == names


def test_openings_and_questions_share_one_order_of_arrival(tiny: Path) -> None:
    chats = Chats(tiny, budget=DeviceBudget(2 * STEP_BYTES + 4 * FEATURES_BYTES, PLENTY))
    for name in "ab":
        chats.open(name, ord(name))
        chats.run()
    chats.ask("a", QUESTIONS[0], Sampling(GROWTH_TOKENS, ignore_eos=True))
    chats.run(steps=2)
    chats.open("c", ord("c"))
    chats.open("d", ord("d"))
    chats.ask("b", QUESTIONS[0], Sampling(GROWTH_TOKENS))
    order: list[str] = []
    stop(chats, "a")
    while chats.engine.has_work:
        events = chats.engine.step()
        assert not [event for event in events if isinstance(event, OutOfCapacity | TurnFailed)]
        order += [event.session_id for event in events if isinstance(event, Prefilled)]
        turn = chats.engine.sessions["b"].turn
        if turn is not None and not turn.is_waiting:
            order.append("b")
            stop(chats, "b")
    assert order == ["c", "d", "b"]


def test_a_burst_of_openings_of_one_picture_needs_room_for_its_features_once(tiny: Path) -> None:
    chats = Chats(tiny, budget=DeviceBudget(STEP_BYTES + FEATURES_BYTES, PLENTY))
    for name in NAMES:
        chats.open(name, 1)
    chats.run(steps=1)
    chats.open("later", 1)
    chats.engine.apply(CloseSession(NAMES[0]))
    chats.run()
    assert not [event for event in chats.events if isinstance(event, OutOfCapacity)]
    prefilled = [event.session_id for event in chats.events if isinstance(event, Prefilled)]
    assert prefilled[-len(NAMES) :] == [*NAMES[1:], "later"]


def test_a_question_to_a_session_that_waits_for_its_opening_is_answered_after_it(tiny: Path) -> None:
    chats = Chats(tiny, budget=DeviceBudget(2 * STEP_BYTES + 3 * FEATURES_BYTES, PLENTY))
    free = Chats(tiny)
    chats.open("a", ord("a"))
    chats.run()
    chats.ask("a", QUESTIONS[0], Sampling(GROWTH_TOKENS, ignore_eos=True))
    chats.run(steps=2)
    for either in (chats, free):
        either.open("b", ord("b"))
        either.ask("b", QUESTIONS[1], Sampling(6))
    chats.run(steps=1)
    assert chats.engine.sessions["b"].state is EngineSessionState.WAITING
    stop(chats, "a")
    assert chats.run()["b"].answer_ids == free.run()["b"].answer_ids


@pytest.fixture
def crowded(tiny: Path) -> Chats:
    """Session `a` answers and takes all memory; session `b` waits with a question."""
    chats = opened(tiny, [*"ab"], 2 * STEP_BYTES)
    chats.ask("a", QUESTIONS[0], Sampling(2 * GROWTH_TOKENS - 60, ignore_eos=True))
    chats.run(steps=2)
    chats.ask("b", QUESTIONS[0], Sampling(6))
    chats.run(steps=2)
    assert chats.engine.sessions["b"].turn.is_waiting
    chats.events.clear()
    return chats


@pytest.mark.parametrize("how", ["cancel", "cut", "deadline"])
def test_a_waiting_question_ends_early_and_leaves_its_session_as_it_was(crowded: Chats, tiny: Path, how: str) -> None:
    if how == "deadline":
        crowded.engine.sessions["b"].turn.deadline_at = 0.0
    else:
        crowded.engine.apply(StopTurn("turn-b", how, keep_answer=how == "cut"))
    crowded.run(steps=1)
    ended = next(event for event in crowded.events if isinstance(event, Cancelled))
    assert ended == Cancelled("turn-b", how)
    assert ended.usage.prompt_tokens == len(crowded.conversations["b"].token_ids + crowded.prompts["b"])
    assert ended.usage.completion_tokens == 0
    assert ended.timings.queue_ms == ended.timings.ttft_ms == ended.timings.total_ms > 0
    assert crowded.engine.sessions["a"].turn is not None
    stop(crowded, "a")
    free = Chats(tiny)
    free.open("b", 1)
    for either in (crowded, free):
        either.ask("b", QUESTIONS[1], Sampling(6))
    assert crowded.run()["b"].answer_ids == free.run()["b"].answer_ids


def test_a_session_is_closed_while_its_question_waits(crowded: Chats) -> None:
    crowded.engine.apply(CloseSession("b"))
    crowded.run(steps=1)
    assert [event for event in crowded.events if isinstance(event, Cancelled | Closed)] == [
        Cancelled("turn-b"),
        Closed("b"),
    ]
    stop(crowded, "a")
    assert set(crowded.run()) == {"a"}


def test_a_session_whose_question_waits_takes_no_second_one(crowded: Chats) -> None:
    crowded.engine.apply(AskSession("b", "second", [5], Sampling(2)))
    assert any(isinstance(event, TurnFailed) and event.turn_id == "second" for event in crowded.engine.step())
    stop(crowded, "a")
    assert set(crowded.run()) == {*"ab"}


def test_a_full_queue_rejects_the_next_question(crowded: Chats, monkeypatch: pytest.MonkeyPatch) -> None:
    crowded.open("c", 1)  # the picture of `b`
    crowded.run(steps=1)
    monkeypatch.setattr(admission, "MAX_WAITING_TURNS", 1)
    crowded.ask("c", QUESTIONS[0], Sampling(2))
    crowded.run(steps=1)
    rejected = [event for event in crowded.events if isinstance(event, OutOfCapacity)]
    assert rejected == [OutOfCapacity("c", "turn-c", 0, 0, 3, waiting_turns=1)]
    stop(crowded, "a")
    assert set(crowded.run()) == {*"ab"}


def test_a_waiting_questions_picture_leaves_room_for_those_that_wait(tiny: Path) -> None:
    """Features are never offloaded: those of a later question must not take what an earlier one waits for."""
    chats = opened(tiny, [*"abc"], 2 * STEP_BYTES)
    chats.ask("a", QUESTIONS[0], Sampling(GROWTH_TOKENS, ignore_eos=True))
    chats.run(steps=2)
    prompt = chats.tokens.prompt(chats.conversations["b"].opened_on, "?")
    most = 2 * GROWTH_TOKENS - len(chats.conversations["b"].token_ids + prompt)
    chats.engine.apply(AskSession("b", "turn-b", prompt, Sampling(most)))  # all memory beside the features
    shown = chats.tokens.prepare([("new", noise(77))])
    tail = chats.tokens.prompt(chats.conversations["c"].opened_on, "?", shown)
    chats.engine.apply(AskSession("c", "turn-c", tail, Sampling(2), shown.pictures))
    stop(chats, "a")
    assert started(chats) == ["b"]
    assert [event.turn_id for event in chats.events if isinstance(event, OutOfCapacity)] == ["turn-c"]


def test_a_waiting_request_is_rejected_if_no_other_session_could_free_memory(crowded: Chats) -> None:
    """The engine must not wait for ever, for example after the budget has become smaller."""
    budget = crowded.engine.device_memory.budget
    crowded.engine.device_memory.budget = DeviceBudget(2 * FEATURES_BYTES, budget.host_bytes)
    stop(crowded, "a")
    assert set(crowded.run()) == {"a"}
    assert [type(event) for event in crowded.events if isinstance(event, OutOfCapacity)] == [OutOfCapacity]


def test_an_error_while_memory_is_reserved_fails_its_own_turn_only(
    crowded: Chats, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = crowded.engine.device_memory.place

    def place(session, *args):
        if session.id == "b" and not crowded.engine.sessions["a"].active:
            raise RuntimeError("a fault")
        return whole(session, *args)

    monkeypatch.setattr(crowded.engine.device_memory, "place", place)
    stop(crowded, "a")
    assert set(crowded.run()) == {"a"}
    assert [event.turn_id for event in crowded.events if isinstance(event, TurnFailed)] == ["turn-b"]
    monkeypatch.undo()
    crowded.ask("b", QUESTIONS[0], Sampling(4))
    assert set(crowded.run()) == {"b"}


def test_memory_that_runs_out_while_a_waiting_turn_is_restored_rejects_it(
    crowded: Chats, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restore(session, prompt_tokens, most_tokens) -> None:
        raise MemoryExceeded(5, 0)

    monkeypatch.setattr(crowded.engine.device_memory, "restore", restore)
    stop(crowded, "a")
    assert set(crowded.run()) == {"a"}
    assert [event for event in crowded.events if isinstance(event, OutOfCapacity)] == [
        OutOfCapacity("b", "turn-b", 5, 0, 2)
    ]


def test_a_cache_copies_a_prefix_of_a_longer_offloaded_one() -> None:
    shape = KVShape(2, 2, 4, torch.float32, torch.device("cpu"))
    donor = SessionKV(shape)
    donor.reserve(300)
    donor.on_device.copy_(torch.arange(donor.on_device.numel()).view(donor.on_device.shape))
    donor.length = 300
    expected = donor.on_device[:, :, :, :40].clone()
    donor.offload()
    kv = SessionKV(shape)
    kv.fork(donor, 40)
    assert (kv.length, kv.capacity) == (40, 256)
    assert torch.equal(kv.on_device[:, :, :, :40], expected)
