"""Answers stay the same if a session's KV cache is offloaded, dropped, rebuilt or copied from another session.

A request beyond the budget is rejected before any work.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llava_sessions.chat.transcript import Conversation
from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.kv import GROWTH_TOKENS, SessionKV
from llava_sessions.engine.session import awaits_first_token
from llava_sessions.ipc.messages import (
    Admitted,
    AskSession,
    CloseSession,
    Described,
    DescribeSession,
    Finished,
    Memory,
    OpenSession,
    OutOfCapacity,
    Prefilled,
    Residence,
    Sampling,
    StopTurn,
)
from tests.support.engine_chats import QUESTIONS, Chats, noise

TOKEN_BYTES = 4 * 2 * 2 * 16 * 4  # layers, keys and values, kv heads, head dim, float32
STEP_BYTES = GROWTH_TOKENS * TOKEN_BYTES  # one session's cache while it is short
FEATURES_BYTES = 16 * 64 * 4  # image tokens, hidden, float32
PLENTY = 2**40


def talk(chats: Chats, sessions: int, seed: int = 0) -> dict[str, list[list[int]]]:
    """Run three turns with each of several sessions in a random order; return the answers by session."""
    names = [f"s{index}" for index in range(sessions)]
    for index, name in enumerate(names):
        chats.open(name, picture_seed=index)
        chats.run()
    answers: dict[str, list[list[int]]] = {name: [] for name in names}
    order = random.Random(seed)
    for question in QUESTIONS:
        order.shuffle(names)
        for name in names:
            chats.ask(name, question, Sampling(6))
            answers[name].append(chats.run()[name].answer_ids)
    return answers


def sessions_of(chats: Chats, kind: type) -> list[str]:
    """Return the sessions of all events of a type, in order."""
    return [event.session_id for event in chats.events if isinstance(event, kind)]


@pytest.mark.parametrize(
    ("host_bytes", "tiers"),
    [
        pytest.param(PLENTY, (3, 5, 0), id="offloaded"),
        pytest.param(0, (3, 0, 5), id="cold"),
        pytest.param(130 * TOKEN_BYTES, (3, 1, 4), id="some of each"),
    ],
)
def test_answers_are_the_same_after_caches_left_the_device(
    tiny: Path, host_bytes: int, tiers: tuple[int, int, int]
) -> None:
    device_bytes = 3 * STEP_BYTES + 8 * FEATURES_BYTES
    tight = Chats(tiny, budget=DeviceBudget(device_bytes, host_bytes))
    assert talk(tight, 8) == talk(Chats(tiny), 8)
    memory = tight.engine.memory()
    assert (memory.resident, memory.offloaded, memory.cold) == tiers
    assert memory.features_bytes + memory.kv_bytes <= device_bytes
    assert memory.offloaded_bytes <= host_bytes


def test_the_least_recently_used_cache_is_offloaded_first(tiny: Path) -> None:
    chats = Chats(tiny, budget=DeviceBudget(2 * STEP_BYTES + 9 * FEATURES_BYTES, PLENTY))
    for name in "ab":
        chats.open(name, ord(name))
        chats.run()
    chats.ask("a", QUESTIONS[0], Sampling(2))
    chats.run()
    chats.open("c", ord("c"))
    chats.run()
    tiers = {name: chats.engine.sessions[name].kv.tier for name in "abc"}
    assert tiers == {"a": "resident", "b": "offloaded", "c": "resident"}


def test_offloading_copies_only_the_used_part(tiny: Path) -> None:
    chats = Chats(tiny, budget=DeviceBudget(STEP_BYTES + 9 * FEATURES_BYTES, PLENTY))
    for name in "ab":
        chats.open(name, ord(name))
        chats.run()
    tokens = len(chats.conversations["a"].opening.token_ids)
    assert chats.engine.memory().offloaded_bytes == tokens * TOKEN_BYTES


@pytest.mark.parametrize(("host_bytes", "tier"), [(PLENTY, "offloaded"), (0, "cold")])
def test_a_session_is_described_by_its_tier_and_memory(tiny: Path, host_bytes: int, tier: str) -> None:
    chats = Chats(tiny, budget=DeviceBudget(STEP_BYTES + 9 * FEATURES_BYTES, host_bytes))
    for name in "ab":
        chats.open(name, ord(name))
        chats.run()
    tokens = len(chats.conversations["a"].opening.token_ids)
    for name in "abc":
        chats.engine.apply(DescribeSession(name, f"of {name}"))
    chats.run()
    found = {event.request_id: event.residence for event in chats.events if isinstance(event, Described)}
    left = (tokens, 0, tokens * TOKEN_BYTES) if host_bytes else (0, 0, 0)
    assert found == {
        "of a": Residence(tier, *left, FEATURES_BYTES),
        "of b": Residence("resident", tokens, STEP_BYTES, 0, FEATURES_BYTES),
        "of c": Residence(),
    }


def test_the_cache_of_a_running_answer_is_never_offloaded(tiny: Path) -> None:
    chats = Chats(tiny, budget=DeviceBudget(2 * STEP_BYTES + 9 * FEATURES_BYTES, PLENTY))
    for name in "ab":
        chats.open(name, ord(name))
    chats.run()
    for name in "ab":
        chats.ask(name, QUESTIONS[0], Sampling(50))
    chats.run(steps=2)
    before = {name: chats.engine.sessions[name].kv.address for name in "ab"}
    chats.open("c", ord("c"))
    finished: dict[str, Finished] = {}
    while not finished:
        assert sessions_of(chats, Prefilled) == [*"ab"]
        assert {name: chats.engine.sessions[name].kv.address for name in "ab"} == before
        finished |= chats.run(steps=1)
    finished |= chats.run()
    assert set(finished) == {*"ab"}
    assert sessions_of(chats, Prefilled) == [*"abc"]
    assert not sessions_of(chats, OutOfCapacity)


def nearly_full(chats: Chats, name: str, room: int) -> SessionKV:
    """Open a session whose first turn will leave room for `room` tokens in its cache; return the cache."""
    chats.open(name, ord(name))
    chats.run()
    conversation = chats.conversations[name]
    text = "?"
    while len(conversation.token_ids + chats.tokens.prompt(conversation.opened_on, text)) < GROWTH_TOKENS - room - 3:
        text += "?"
    chats.ask(name, text, Sampling(3))
    return chats.engine.sessions[name].kv


def test_a_nearly_full_cache_is_grown_while_the_engine_is_idle(tiny: Path) -> None:
    chats = Chats(tiny)
    free = Chats(tiny)
    kv = nearly_full(chats, "a", room=10)
    _ = nearly_full(free, "a", room=10)
    assert kv.capacity == GROWTH_TOKENS
    assert chats.run()["a"].answer_ids == free.run()["a"].answer_ids
    assert kv.length < GROWTH_TOKENS < kv.capacity == 2 * GROWTH_TOKENS
    assert not chats.engine.has_work
    address = kv.address
    for either in (chats, free):
        either.ask("a", QUESTIONS[1], Sampling(6))
    assert chats.run()["a"].answer_ids == free.run()["a"].answer_ids
    assert kv.length > GROWTH_TOKENS
    assert kv.address == address, "the turn itself grew the cache"


def test_no_cache_is_grown_ahead_while_a_first_token_waits(tiny: Path) -> None:
    chats = Chats(tiny, chunk_tokens=8)
    kv = nearly_full(chats, "a", room=10)
    chats.open("b", ord("b"))
    chats.ask("b", QUESTIONS[0], Sampling(GROWTH_TOKENS))
    finished: list[str] = []
    while awaits_first_token(chats.engine.sessions["b"]):
        assert kv.capacity == GROWTH_TOKENS
        finished += chats.run(steps=1)
    assert finished == ["a"]
    assert kv.capacity == 2 * GROWTH_TOKENS, "`b` still answers, but its first token is out"


@pytest.mark.parametrize("what", ["budget", "memory"])
def test_without_memory_no_cache_is_grown_ahead_and_the_session_continues(
    tiny: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chats = Chats(tiny, budget=DeviceBudget(2**62 if what == "memory" else STEP_BYTES + FEATURES_BYTES, PLENTY))
    kv = nearly_full(chats, "a", room=50)
    with monkeypatch.context() as patch:
        if what == "memory":
            patch.setattr("llava_sessions.engine.kv.GROWTH_TOKENS", 2**48)  # more memory than any machine has
        answer = chats.run()["a"].answer_ids
    assert kv.capacity == GROWTH_TOKENS
    assert not chats.engine.has_work
    assert len(answer) > 1
    assert ("growing_failed" in caplog.text) == (what == "memory")
    chats.ask("a", "why?", Sampling(1))
    assert len(chats.run()["a"].answer_ids) == 1


def test_a_turn_that_could_never_fit_is_rejected_and_the_session_continues(tiny: Path) -> None:
    chats = Chats(tiny, budget=DeviceBudget(STEP_BYTES + FEATURES_BYTES, PLENTY))
    chats.open("a", 1)
    chats.run()
    needed = len(chats.ask("a", QUESTIONS[0], Sampling(GROWTH_TOKENS))) + GROWTH_TOKENS
    assert GROWTH_TOKENS < needed < 2 * GROWTH_TOKENS
    assert chats.engine.step() == [OutOfCapacity("a", "turn-a", 2 * STEP_BYTES, STEP_BYTES, 1)]
    free = Chats(tiny)
    free.open("a", 1)
    for either in (chats, free):
        either.ask("a", QUESTIONS[0], Sampling(6))
    assert chats.run()["a"].answer_ids == free.run()["a"].answer_ids


def test_open_sessions_are_not_evicted_to_admit_a_new_one(tiny: Path) -> None:
    chats = Chats(tiny, budget=DeviceBudget(STEP_BYTES + 3 * FEATURES_BYTES, 0))
    for name in "abcdef":
        chats.open(name, ord(name))
        chats.run()
    assert (sessions_of(chats, Admitted), sessions_of(chats, OutOfCapacity)) == ([*"abc"], [*"def"])
    for name in "abc":
        chats.ask(name, QUESTIONS[0], Sampling(4))
        assert chats.run()[name].reason == "length"


def test_a_burst_of_openings_is_admitted_and_waits_for_memory(tiny: Path) -> None:
    chats = Chats(tiny, budget=DeviceBudget(2 * STEP_BYTES + 6 * FEATURES_BYTES, PLENTY))
    free = Chats(tiny)
    for either in (chats, free):
        for name in "abcdef":
            either.open(name, ord(name))
        either.run()
    assert sessions_of(chats, Admitted) == sessions_of(chats, Prefilled) == [*"abcdef"]
    assert not sessions_of(chats, OutOfCapacity)
    for name in "fabced":
        for either in (chats, free):
            either.ask(name, QUESTIONS[0], Sampling(6))
        assert chats.run()[name].answer_ids == free.run()[name].answer_ids


def test_an_opening_waits_until_a_turn_releases_its_memory(tiny: Path) -> None:
    chats = Chats(tiny, budget=DeviceBudget(2 * STEP_BYTES + 3 * FEATURES_BYTES, PLENTY))
    chats.open("a", ord("a"))
    chats.run()
    chats.ask("a", QUESTIONS[0], Sampling(GROWTH_TOKENS))  # more than one cache
    for name in "bc":
        chats.open(name, ord(name))
    while "a" not in chats.run(steps=1):
        assert sessions_of(chats, Prefilled) == ["a"]
    chats.run()
    assert sessions_of(chats, Admitted) == sessions_of(chats, Prefilled) == [*"abc"]
    assert not sessions_of(chats, OutOfCapacity)


def test_features_leave_room_for_a_waiting_opening(tiny: Path) -> None:
    chats = Chats(tiny, budget=DeviceBudget(STEP_BYTES + 3 * FEATURES_BYTES, 0))
    for name in "abcd":
        chats.open(name, ord(name))
    chats.run()
    assert (sessions_of(chats, Prefilled), sessions_of(chats, OutOfCapacity)) == ([*"abc"], ["d"])


@pytest.mark.parametrize("chunk_tokens", [256, 5])
def test_the_same_picture_is_encoded_and_prefilled_once(tiny: Path, chunk_tokens: int) -> None:
    chats = Chats(tiny, chunk_tokens)
    alone = Chats(tiny, chunk_tokens)
    for name in "abc":
        chats.open(name, 1)
    chats.run()
    opened = [event for event in chats.events if isinstance(event, Prefilled)]
    assert [event.encode_ms > 0 for event in opened] == [True, False, False]
    memory = chats.engine.memory()
    assert (memory.sessions, memory.features_bytes) == (3, FEATURES_BYTES)
    alone.open("a", 1)
    for question in QUESTIONS:
        alone.ask("a", question, Sampling(6))
        expected = alone.run()["a"].answer_ids
        for name in "abc":
            chats.ask(name, question, Sampling(6))
        assert {name: event.answer_ids for name, event in chats.run().items()} == dict.fromkeys("abc", expected)


def test_the_last_session_with_a_picture_frees_its_features(tiny: Path) -> None:
    chats = Chats(tiny)
    for name in "abc":
        chats.open(name, 1)
        chats.run()
    for left, name in ((2, "a"), (1, "c")):
        chats.engine.apply(CloseSession(name))
        memory = chats.engine.memory()
        assert (memory.features_bytes, memory.kv_bytes) == (FEATURES_BYTES, left * STEP_BYTES)
    chats.ask("b", QUESTIONS[0], Sampling(4))
    assert chats.run()["b"].reason == "length"
    chats.engine.apply(CloseSession("b"))
    assert chats.engine.memory() == Memory()


def test_a_prefix_is_also_copied_from_an_offloaded_session(tiny: Path) -> None:
    chats = Chats(tiny, budget=DeviceBudget(STEP_BYTES + 9 * FEATURES_BYTES, PLENTY))
    chats.open("a", 1)
    chats.run()
    chats.open("other", 2)
    chats.run()
    assert chats.engine.sessions["a"].kv.tier == "offloaded"
    chats.open("b", 1)
    chats.run()
    assert [event.encode_ms > 0 for event in chats.events if isinstance(event, Prefilled)] == [True, True, False]
    free = Chats(tiny)
    free.open("b", 1)
    for either in (chats, free):
        either.ask("b", QUESTIONS[0], Sampling(6))
    assert chats.run()["b"].answer_ids == free.run()["b"].answer_ids


def test_features_are_matched_to_their_own_image_tokens(tiny: Path) -> None:
    """Also after a cancelled turn with the same picture."""
    chats = Chats(tiny)
    first, second = (chats.tokens.opening([(f"k{seed}", noise(seed))]) for seed in (1, 2))
    both = [*first.token_ids, *second.token_ids[1:]]
    engine = chats.engine
    engine.apply(OpenSession("one", first.token_ids, first.pictures))
    engine.apply(OpenSession("two", both, first.pictures + second.pictures))
    tail = chats.tokens.prompt(Conversation(first).opened_on, QUESTIONS[0])
    engine.apply(AskSession("two", "t-two", tail, Sampling(8)))
    late = [*second.token_ids[1:], *tail]
    engine.apply(AskSession("one", "t-cancelled", [7, *late], Sampling(8), second.pictures))
    engine.step()
    engine.apply(StopTurn("t-cancelled", "cancelled", keep_answer=False))
    engine.apply(AskSession("one", "t-one", late, Sampling(8), second.pictures))
    events = []
    while engine.has_work:
        events += engine.step()
    answers = {event.turn_id: event.answer_ids for event in events if isinstance(event, Finished)}
    assert answers["t-one"] == answers["t-two"]
    assert engine.memory().features_bytes == 2 * FEATURES_BYTES
