"""Turns that crop their session, and sessions that start empty or copy the KV of another one.

Token IDs are arbitrary: a client's conversation. Each answer equals that of `generate` on all of its tokens.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.kv import GROWTH_TOKENS, KVShape, SessionKV
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import (
    Admitted,
    AskSession,
    Cancelled,
    CloseSession,
    Event,
    Finished,
    Memory,
    OpenFailed,
    OpenSession,
    OutOfCapacity,
    Prefilled,
    PreparedPicture,
    Sampling,
    StopTurn,
    TurnFailed,
)
from llava_sessions.text.chat_template import ChatTemplate
from tests.support.engine_chats import Reference, noise

TOKEN_BYTES = 4 * 2 * 2 * 16 * 4  # layers, keys and values, kv heads, head dim, float32
STEP_BYTES = GROWTH_TOKENS * TOKEN_BYTES
PICTURE_TOKENS = 16
FEATURES_BYTES = PICTURE_TOKENS * 64 * 4  # image tokens, hidden, float32
MOST_STEPS = 500
FIVE = Sampling(5)
AMPLE = DeviceBudget(2**40, 2**40)


class Bench:
    """An engine and transformers' model of one checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        self.template = ChatTemplate(AutoProcessor.from_pretrained(checkpoint))
        self.model = Model.load(checkpoint, "float32", "cpu")
        self.reference = Reference(checkpoint)
        self.image = [self.template.image_token_id] * PICTURE_TOKENS
        self.start()

    def start(self, budget: DeviceBudget = AMPLE, chunk_tokens: int = 256) -> None:
        """Make a new engine."""
        self.engine = Engine(self.model, self.template.answer_text, budget, chunk_tokens)
        self.events: list[Event] = []

    def picture(self, seed: int) -> PreparedPicture:
        return self.template.prepare([(f"noise {seed}", noise(seed))]).pictures[0]

    def open(self, name: str, token_ids: list[int], *seeds: int, **fields) -> None:
        pictures = tuple(map(self.picture, seeds))
        self.engine.apply(OpenSession(name, list(token_ids), pictures, **fields))

    def ask(self, name: str, token_ids: list[int], *seeds: int, sampling: Sampling = FIVE, **fields) -> None:
        pictures = tuple(map(self.picture, seeds))
        self.engine.apply(AskSession(name, f"turn {name}", list(token_ids), sampling, pictures, **fields))

    def run(self, steps: int | None = None) -> dict[str, Finished]:
        """Step until the engine has no work, or `steps` times; return the finished turns by session."""
        finished = {}
        for _ in range(MOST_STEPS if steps is None else steps):
            if not self.engine.has_work:
                return finished
            for event in self.engine.step():
                self.events.append(event)
                if isinstance(event, Finished):
                    finished[event.turn_id.removeprefix("turn ")] = event
        assert steps is not None, "the engine makes no progress"
        return finished

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    def stop(self, name: str) -> None:
        self.engine.apply(StopTurn(f"turn {name}", "stopped", keep_answer=False))

    def expected(self, token_ids: list[int], *seeds: int, count: int = 5, **more: object) -> list[int]:
        arrays = [self.picture(seed).inputs["pixel_values"] for seed in seeds]
        return self.reference.answer(token_ids, np.concatenate(arrays) if arrays else None, count, **more)

    def tokens(self, name: str) -> list[int]:
        return self.engine.sessions[name].token_ids


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Bench:
    return Bench(tiny)


@pytest.fixture
def bench(loaded: Bench) -> Bench:
    loaded.start()
    return loaded


def text(seed: int, count: int = 12) -> list[int]:
    """Return random token IDs of text."""
    draw = random.Random(seed)
    return [draw.randrange(20, 300) for _ in range(count)]


# --- sessions without pictures ---


def test_an_empty_session_is_ready_without_a_forward_and_takes_no_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.start(DeviceBudget(0, 0))
    monkeypatch.setattr(bench.model, "forward", None)
    for name in "ab":
        bench.open(name, [])
    bench.run()
    assert [(type(event), event.session_id) for event in bench.events] == [
        *((Admitted, name) for name in "ab"),
        *((Prefilled, name) for name in "ab"),
    ]
    assert bench.engine.memory() == Memory(cold=2)


@pytest.mark.parametrize("together", [True, False])
def test_an_empty_session_answers_with_and_without_pictures(bench: Bench, together: bool) -> None:
    shown = text(1) + bench.image + text(2)
    for name, seeds, token_ids in (("a", [], text(1)), ("b", [3], shown)):
        bench.open(name, [])
        if not together:
            bench.run()
        bench.ask(name, token_ids, *seeds)
        answer = bench.run()[name]
        assert answer.answer_ids == bench.expected(token_ids, *seeds)
        assert answer.usage.cached_tokens == 0
        later = answer.kept_ids + text(4) + bench.image
        bench.ask(name, later[len(answer.kept_ids) :], 5)
        assert bench.run()[name].answer_ids == bench.expected(token_ids + later, *seeds, 5)


def test_a_first_turn_of_an_empty_session_that_is_rolled_back_leaves_no_memory(bench: Bench) -> None:
    bench.open("a", [])
    for steps in (0, 1, 3):
        bench.ask("a", text(1) + bench.image, 1, sampling=Sampling(50, ignore_eos=True))
        bench.run(steps=steps)
        bench.stop("a")
        bench.run()
        assert bench.engine.memory() == Memory(cold=1)
    assert len(bench.of(Cancelled)) == 3
    bench.ask("a", text(2))
    assert bench.run()["a"].answer_ids == bench.expected(text(2))


def test_a_turn_without_tokens_fails(bench: Bench) -> None:
    bench.open("a", text(1))
    bench.ask("a", [])
    bench.run()
    assert [event.error for event in bench.of(TurnFailed)] == ["a turn must have at least one token"]


# --- kept tokens ---


def opened(bench: Bench) -> list[int]:
    """Open session `a` with two adjacent pictures, and a later one in its first turn; return its tokens."""
    opening = text(1, 4) + bench.image + bench.image + text(2, 4)
    bench.open("a", opening, 1, 2)
    bench.ask("a", text(3, 6) + bench.image + text(4, 6), 3)
    answer = bench.run()["a"]
    bench.events.clear()
    return opening + text(3, 6) + bench.image + text(4, 6) + answer.kept_ids


@pytest.mark.parametrize("tier", ["resident", "offloaded", "cold"])
@pytest.mark.parametrize(
    ("kept", "pictures"),
    [(0, 0), (20, 1), (38, 2), (46, 2), (62, 3), (None, 3)],
)
def test_a_turn_keeps_a_prefix_of_its_session(bench: Bench, tier: str, kept: int | None, pictures: int) -> None:
    held = opened(bench)
    session = bench.engine.sessions["a"]
    if tier == "offloaded":
        session.kv.offload()
    elif tier == "cold":
        session.kv.drop()
    bench.ask("a", text(7) + bench.image + text(8), 4, kept_tokens=kept)
    (answer,) = bench.run().values()
    whole = held[:kept] + text(7) + bench.image + text(8)
    seeds = [1, 2, 3][:pictures]
    assert answer.answer_ids == bench.expected(whole, *seeds, 4)
    # The last token of an answer has no KV yet.
    computed = 0 if tier == "cold" else len(held) - 1
    assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (
        len(whole),
        computed if kept is None else min(kept, computed),
    )
    assert session.token_ids == whole + answer.kept_ids
    assert [picture.key for picture in session.pictures] == [f"noise {seed}" for seed in [*seeds, 4]]
    bench.ask("a", text(9))
    assert bench.run()["a"].answer_ids == bench.expected(whole + answer.kept_ids + text(9), *seeds, 4)


@pytest.mark.parametrize("kept", [-1, 5, 19, 21, 35, 47, 1000])
def test_a_crop_inside_a_picture_or_beyond_the_session_fails(bench: Bench, kept: int) -> None:
    held = opened(bench)
    bench.ask("a", text(7), kept_tokens=kept)
    assert not bench.run()
    (failed,) = bench.of(TurnFailed)
    assert "kept" in failed.error
    assert bench.tokens("a") == held
    bench.ask("a", text(8))
    assert bench.run()["a"].answer_ids == bench.expected(held + text(8), 1, 2, 3)


@pytest.mark.parametrize("kept", [4, 20, 36])
def test_a_session_whose_pictures_are_not_encoded_yet_is_cropped(bench: Bench, kept: int) -> None:
    """Two adjacent pictures: their tokens alone do not say where the second one begins."""
    bench.start(chunk_tokens=3)
    opening = text(1, 4) + bench.image + bench.image + text(2, 4)
    bench.open("a", opening, 1, 2)
    bench.ask("a", text(3), kept_tokens=kept)
    bench.open("other", text(5))
    bench.ask("other", text(6))
    finished = bench.run()
    seeds = [1, 2][: (kept - 4) // PICTURE_TOKENS]
    assert finished["a"].answer_ids == bench.expected(opening[:kept] + text(3), *seeds)
    assert finished["other"].answer_ids == bench.expected(text(5) + text(6))
    assert [event.session_id for event in bench.of(Prefilled)].count("a") == 1


def test_a_crop_inside_a_picture_that_is_not_encoded_yet_fails_its_turn_only(bench: Bench) -> None:
    opening = text(1, 4) + bench.image + bench.image
    bench.open("a", opening, 1, 2)
    bench.ask("a", text(3), kept_tokens=25)
    assert not bench.run()
    assert "inside a picture" in bench.of(TurnFailed)[0].error
    assert not bench.of(OpenFailed)
    bench.ask("a", text(3))
    assert bench.run()["a"].answer_ids == bench.expected(opening + text(3), 1, 2)


def test_an_error_of_an_opening_picture_ends_the_opening_although_a_turn_would_crop_it(bench: Bench) -> None:
    blind = PreparedPicture("bad", {"pixel_values": np.zeros((1, 3, 20, 20), dtype=np.float32)})
    opening = text(1, 4) + bench.image + bench.image
    bench.engine.apply(OpenSession("a", opening, (bench.picture(1), blind)))
    bench.ask("a", text(3), kept_tokens=25)
    bench.run()
    assert [type(event) for event in bench.events][-2:] == [TurnFailed, OpenFailed]
    assert not bench.engine.sessions


def test_a_running_turn_that_is_rolled_back_leaves_the_kept_tokens(bench: Bench) -> None:
    held = opened(bench)
    bench.ask("a", text(7) + bench.image, 4, kept_tokens=42, sampling=Sampling(50, ignore_eos=True))
    bench.run(steps=3)
    bench.stop("a")
    bench.run()
    assert bench.of(Cancelled)[0].usage.prompt_tokens == 42 + 12 + PICTURE_TOKENS
    assert bench.tokens("a") == held[:42]
    bench.ask("a", text(8), kept_tokens=38)
    assert bench.run()["a"].answer_ids == bench.expected(held[:38] + text(8), 1, 2)


def test_a_waiting_turn_that_ends_leaves_its_session_unchanged(bench: Bench) -> None:
    bench.start(DeviceBudget(STEP_BYTES + 3 * FEATURES_BYTES, 2**40))
    held = opened(bench)
    bench.open("b", text(9))
    bench.ask("b", text(9), sampling=Sampling(GROWTH_TOKENS - 30, ignore_eos=True))
    bench.run(steps=2)
    bench.ask("a", text(7), kept_tokens=4)
    bench.run(steps=2)
    assert bench.engine.sessions["a"].kv.tier == "offloaded"
    bench.stop("a")
    bench.stop("b")
    bench.run()
    assert bench.of(Cancelled)[-1].turn_id == "turn b"
    assert bench.tokens("a") == held
    bench.ask("a", text(8))
    answer = bench.run()["a"]
    assert answer.answer_ids == bench.expected(held + text(8), 1, 2, 3)
    assert answer.usage.cached_tokens == len(held) - 1


def test_an_image_token_in_an_answer_belongs_to_no_picture(bench: Bench) -> None:
    """In the opening, in a turn and in a part that a crop removes."""
    stray = bench.template.image_token_id
    opening = [*text(1, 4), stray, *bench.image]
    bench.open("a", opening, 1, answer_spans=((3, 5),))
    bench.ask("a", [stray, *bench.image, stray, *text(2, 4)], 2, answer_spans=((0, 1), (17, 18)))
    bench.run()
    assert not bench.of(TurnFailed)
    session = bench.engine.sessions["a"]
    assert session.image_positions == [*range(5, 21), *range(22, 38)]
    assert len(bench.of(Finished)[0].answer_ids) > 0
    bench.ask("a", [stray, *text(3)], kept_tokens=22, answer_spans=((0, 1),))
    bench.run()
    assert session.image_positions == [*range(5, 21)]
    bench.ask("a", text(5), kept_tokens=21)
    first = bench.run()["a"]
    bench.start()
    bench.open("a", opening, 1, answer_spans=((3, 5),))
    bench.ask("a", text(5))
    assert bench.run()["a"].answer_ids == first.answer_ids


# --- memory of cropped sessions ---


@pytest.mark.parametrize("on_gpu", [False, True])
def test_an_edited_picture_needs_no_room_for_the_one_that_it_replaces(bench: Bench, on_gpu: bool) -> None:
    """The budget has room for the conversation and one picture's features."""
    bench.start(DeviceBudget(STEP_BYTES + FEATURES_BYTES, 0))
    if on_gpu:
        bench.engine.device_memory.pool = None
    bench.open("a", [])
    rest = text(2, GROWTH_TOKENS - 12 - PICTURE_TOKENS - 5)
    bench.ask("a", text(1) + bench.image + rest, 1)
    assert bench.run()["a"].answer_ids == bench.expected(text(1) + bench.image + rest, 1)
    bench.ask("a", bench.image + rest, 2, kept_tokens=12)
    assert bench.run()["a"].answer_ids == bench.expected(text(1) + bench.image + rest, 2)
    assert bench.engine.memory().features_bytes == FEATURES_BYTES


@pytest.mark.parametrize("host_bytes", [2**40, 0])
def test_the_cache_of_a_cropped_session_makes_room_for_a_new_picture(bench: Bench, host_bytes: int) -> None:
    """Its cache fills the budget, but after the crop it needs less."""
    long = text(1, GROWTH_TOKENS)
    bench.start(DeviceBudget(2 * STEP_BYTES, host_bytes))
    bench.open("a", [])
    bench.ask("a", long)
    bench.run()
    bench.ask("a", bench.image + text(3), 2, kept_tokens=12)
    assert bench.run()["a"].answer_ids == bench.expected(long[:12] + bench.image + text(3), 2)


def test_a_cropped_offloaded_cache_frees_whole_blocks_on_the_host() -> None:
    for tokens in (600, 512, 300, 256, 20, 1, 0):
        kv = SessionKV(KVShape(2, 2, 4, torch.float32, torch.device("cpu")))
        kv.reserve(600)
        kv.on_device.copy_(torch.arange(kv.on_device.numel()).view(kv.on_device.shape))
        kv.length = 600
        expected = kv.on_device[:, :, :, :tokens].clone()
        kv.offload()
        kv.crop(tokens)
        assert sum(part.nbytes for block in kv.on_host or [] for part in block) == kv.host_bytes
        assert kv.host_bytes <= kv.shape.device_bytes(tokens)
        assert kv.tier == ("offloaded" if tokens else "cold")
        kv.restore()
        assert torch.equal(kv.on_device[:, :, :, :tokens], expected)


# --- forks ---


def test_a_fork_copies_the_common_prefix_and_prefills_the_rest(bench: Bench) -> None:
    held = opened(bench)
    for name, shared, seeds, tail in (
        ("all", len(held) - 1, [1, 2, 3], held[len(held) - 1 :]),
        ("text", 38, [1, 2], text(20)),
        ("another third picture", 46, [1, 2, 9], held[46:]),
        ("another second picture", 20, [1, 9, 3], held[20:]),
        ("within a picture", 20, [1], bench.image[:0] + text(21)),
        ("nothing", 0, [1], bench.image + text(22)),
    ):
        whole = held[:shared] + tail
        bench.open(name, whole, *seeds, fork_from="a")
        bench.ask(name, text(30))
        answer = bench.run()[name]
        assert answer.answer_ids == bench.expected(whole + text(30), *seeds), name
        assert answer.usage.cached_tokens == shared, name
    assert bench.tokens("a") == held


@pytest.mark.parametrize("donor", ["unknown", "offloaded", "cold", "itself"])
def test_a_fork_from_a_donor_in_any_tier(bench: Bench, donor: str) -> None:
    held = opened(bench)
    source = {"unknown": "never opened", "itself": "b"}.get(donor, "a")
    if donor == "offloaded":
        bench.engine.sessions["a"].kv.offload()
    elif donor == "cold":
        bench.engine.sessions["a"].kv.drop()
    bench.open("b", held[:62], 1, 2, 3, fork_from=source)
    bench.ask("b", text(7))
    answer = bench.run()["b"]
    assert answer.answer_ids == bench.expected(held[:62] + text(7), 1, 2, 3)
    assert answer.usage.cached_tokens == (62 if donor == "offloaded" else 0)


def test_a_fork_from_a_busy_donor_copies_what_is_computed(bench: Bench) -> None:
    bench.start(chunk_tokens=4)
    bench.open("a", text(1, 40))
    bench.run()
    bench.ask("a", text(2, 20), sampling=Sampling(9, ignore_eos=True))
    bench.run(steps=1)
    computed = bench.engine.sessions["a"].kv.length
    assert 40 < computed < 60
    bench.open("b", text(1, 40) + text(2, 20), fork_from="a")
    bench.ask("b", text(3))
    finished = bench.run()
    # The donor runs one more step before the fork's first one; the copy was made before it.
    assert finished["b"].usage.cached_tokens == computed
    assert finished["b"].answer_ids == bench.expected(text(1, 40) + text(2, 20) + text(3))
    expected = bench.expected(text(1, 40) + text(2, 20), count=9)
    assert finished["a"].answer_ids[: len(expected)] == expected


def test_a_fork_may_be_closed_or_outlive_its_donor(bench: Bench) -> None:
    held = opened(bench)
    bench.open("b", held[:62], 1, 2, 3, fork_from="a")
    bench.run(steps=1)
    bench.engine.apply(CloseSession("a"))
    bench.ask("b", text(7))
    assert bench.run()["b"].answer_ids == bench.expected(held[:62] + text(7), 1, 2, 3)


def test_a_fork_waits_for_memory_and_is_rejected_like_any_opening(bench: Bench) -> None:
    bench.start(DeviceBudget(STEP_BYTES + 3 * FEATURES_BYTES, 2**40))
    held = opened(bench)
    bench.ask("a", text(7), sampling=Sampling(20, ignore_eos=True))
    bench.run(steps=1)
    bench.open("b", held[:62], 1, 2, 3, fork_from="a")
    bench.open("c", held[:62] + text(8, GROWTH_TOKENS), 1, 2, 3, fork_from="a")
    bench.run(steps=1)
    assert [event.session_id for event in bench.of(OutOfCapacity)] == ["c"]
    assert bench.engine.sessions["b"].kv.length == 0
    bench.run()
    bench.ask("b", text(9))
    answer = bench.run()["b"]
    assert answer.usage.cached_tokens == 62
    assert answer.answer_ids == bench.expected(held[:62] + text(9), 1, 2, 3)


# --- openings that are shared ---


def test_openings_are_shared_between_sessions_of_equal_salt(bench: Bench) -> None:
    opening = text(1) + bench.image
    cached = {}
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x"), ("d", ""), ("e", "y")):
        bench.open(name, opening, 1, salt=salt)
        bench.ask(name, text(2))
        cached[name] = bench.run()[name].usage.cached_tokens
    assert cached == {"a": 0, "b": 0, "c": len(opening), "d": 0, "e": len(opening)}


def test_a_session_that_was_cropped_shares_the_rest_of_its_opening_only(bench: Bench) -> None:
    opening = text(1) + bench.image + text(2)
    bench.open("a", opening, 1)
    bench.ask("a", text(3, 60), kept_tokens=28)
    bench.run()
    for name, tokens, cached in (("b", opening, 0), ("c", opening[:28], 28)):
        bench.open(name, tokens, 1)
        bench.ask(name, text(4))
        answer = bench.run()[name]
        assert answer.usage.cached_tokens == cached
        assert answer.answer_ids == bench.expected(tokens + text(4), 1)


def test_a_turn_that_came_with_its_opening_counts_what_the_opening_copied(bench: Bench) -> None:
    """The copy is made after the admission, or even later, after another session has computed the opening."""
    bench.start(chunk_tokens=8)
    opening = text(1) + bench.image
    for name in "ab":
        bench.open(name, opening, 1)
        bench.ask(name, text(2))
    finished = bench.run()
    assert [finished[name].usage.cached_tokens for name in "ab"] == [0, len(opening)]
    assert {tuple(event.answer_ids) for event in finished.values()} == {tuple(bench.expected(opening + text(2), 1))}


# --- pictures without arrays ---


def test_a_picture_without_arrays_needs_features_in_the_engine(bench: Bench) -> None:
    opening = text(1) + bench.image
    bare = replace(bench.picture(1), inputs={})
    known = OpenSession("b", opening, (bare,))
    ask = AskSession("b", "turn b", bench.image + text(2), Sampling(5), (bare,))
    bench.open("a", opening, 1)
    bench.engine.apply(known)  # the picture of `a` is not encoded yet
    bench.run()
    assert bench.of(OpenFailed) == [OpenFailed("b", bench.of(OpenFailed)[0].error, lacks_pictures=True)]
    bench.engine.apply(known)
    bench.engine.apply(ask)
    bench.engine.apply(CloseSession("a"))
    assert bench.run()["b"].answer_ids == bench.expected(opening + bench.image + text(2), 1, 1)
    bench.engine.apply(CloseSession("b"))
    bench.open("b", [])
    bench.engine.apply(ask)
    bench.run()
    assert bench.of(TurnFailed) == [TurnFailed("turn b", bench.of(TurnFailed)[0].error, lacks_pictures=True)]
    bench.ask("b", ask.token_ids, 1)
    assert bench.run()["b"].answer_ids == bench.expected(ask.token_ids, 1)


def test_a_known_picture_with_a_wrong_number_of_image_tokens_fails(bench: Bench) -> None:
    """Without the check the forward fails, and with it the turns of all sessions in the step."""
    bench.open("a", text(1) + bench.image, 1)
    bench.run()
    bench.ask("a", bench.image[1:] + text(2), 1)
    bench.open("b", text(1) + bench.image[1:], 1)
    bench.run()
    assert [type(event) for event in bench.events[2:]] == [TurnFailed, OpenFailed]
    assert "15 image tokens" in bench.of(TurnFailed)[0].error


# --- counts and turns in `Memory` ---


def test_the_memory_report_counts_moves_pictures_and_turns(bench: Bench) -> None:
    budget = DeviceBudget(STEP_BYTES + 3 * FEATURES_BYTES, 40 * TOKEN_BYTES)
    bench.start(budget)
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        bench.open(name, text(1) + bench.image, seed)
        bench.run()
    memory = bench.engine.memory()
    assert memory.device_budget_bytes == budget.device_bytes
    # `b` took the device from `a`, and `c` from `b`. The host has room for one cache.
    assert (memory.offloads, memory.drops, memory.restores) == (2, 1, 0)
    assert (memory.pictures_encoded, memory.picture_hits) == (2, 1)
    for name in "bc":
        bench.ask(name, text(2), sampling=Sampling(3, ignore_eos=True))
    memory = bench.engine.memory()
    assert (memory.waiting_turns, memory.running_turns) == (2, 0)
    bench.run(steps=1)
    memory = bench.engine.memory()
    assert (memory.waiting_turns, memory.running_turns, memory.restores) == (1, 1, 1)
    bench.run()
    memory = bench.engine.memory()
    assert (memory.waiting_turns, memory.running_turns) == (0, 0)


# --- fewest tokens ---


@pytest.fixture(scope="module")
def ending(loaded: Bench) -> tuple[list[int], int]:
    """A prompt and the second token of its answer, which other tests make an end token."""
    loaded.start()
    answers = ((text(seed), loaded.expected(text(seed), count=8)) for seed in range(100))
    prompt, answer = next((prompt, ids) for prompt, ids in answers if len(set(ids)) > 3 and ids[0] != ids[1])
    return prompt, answer[1]


@pytest.mark.parametrize("fewest", [0, 1, 2, 5, 12])
def test_no_end_token_is_chosen_before_the_fewest_tokens(
    bench: Bench, ending: tuple[list[int], int], fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, end = ending
    monkeypatch.setattr(bench.model, "eos_token_ids", frozenset({1, end}))
    bench.open("a", [])
    bench.open("b", [])
    bench.ask("a", prompt, sampling=Sampling(12, min_tokens=fewest))
    bench.ask("b", prompt, sampling=Sampling(12))
    finished = bench.run()
    more = {"min_new_tokens": fewest} if fewest else {}
    assert finished["a"].answer_ids == bench.expected(prompt, count=12, eos_token_id=[1, end], **more)
    assert len(finished["a"].answer_ids) >= fewest
    assert finished["b"].answer_ids[1] == end


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_sampled_answer_has_the_fewest_tokens(
    bench: Bench, ignore_eos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = frozenset(range(0, 300, 2))  # likely tokens
    monkeypatch.setattr(bench.model, "eos_token_ids", half)
    bench.open("a", [])
    sampling = Sampling(12, temperature=1.5, seed=3, min_tokens=9, ignore_eos=ignore_eos)
    bench.ask("a", text(1), sampling=sampling)
    answer = bench.run()["a"].answer_ids
    assert not half & set(answer[:9])
    assert len(answer) >= 9


def test_a_stop_string_within_the_fewest_tokens_is_text(bench: Bench) -> None:
    bench.open("a", [])
    bench.ask("a", text(1), sampling=Sampling(20, ignore_eos=True))
    whole = bench.run()["a"]
    stop = bench.template.tokenizer.decode(whole.answer_ids[1:2])
    for fewest in (0, 20):
        bench.ask("a", text(1), kept_tokens=0, sampling=Sampling(20, stop=(stop,), min_tokens=fewest, ignore_eos=True))
        answer = bench.run()["a"]
        assert (answer.reason, answer.text) == (
            ("length", whole.text) if fewest else ("stop", whole.text[: whole.text.index(stop)])
        )
