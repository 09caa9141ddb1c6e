"""Memory of KV caches on a CPU is reused, stays within the budget, and never passes numbers between sessions."""

from __future__ import annotations

import math
import mmap
import random
from pathlib import Path

import pytest
import torch

from llava_sessions.engine import kv_pool
from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.kv import GROWTH_TOKENS, KVShape, SessionKV
from llava_sessions.engine.kv_pool import KVBlock, KVPool
from llava_sessions.ipc.messages import CloseSession, Memory, OutOfCapacity, Sampling
from tests.support.engine_chats import QUESTIONS, Chats, Reference
from tests.support.nan_pool import NanPool

TOKEN_BYTES = 4 * 2 * 2 * 16 * 4  # layers, keys and values, kv heads, head dim, float32
STEP_BYTES = GROWTH_TOKENS * TOKEN_BYTES
FEATURES_BYTES = 16 * 64 * 4  # image tokens, hidden, float32
SHAPE = KVShape(4, 2, 16, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Reference:
    return Reference(tiny)


def poison(pool: KVPool) -> None:
    """Fill all free memory with NaN."""
    for block in pool._free:
        block.memory.view(torch.float32).fill_(math.nan)


# --- the pool ---


def test_a_freed_block_serves_the_next_cache_of_its_size() -> None:
    pool = KVPool()
    first, other = SessionKV(SHAPE, pool), SessionKV(SHAPE, pool)
    first.reserve(300)
    other.reserve(20)
    address = first.address
    assert (pool.used_bytes, pool.free_bytes) == (3 * STEP_BYTES, 0)
    first.drop()
    assert (pool.used_bytes, pool.free_bytes, first.device_bytes) == (STEP_BYTES, 2 * STEP_BYTES, 0)
    second = SessionKV(SHAPE, pool)
    second.reserve(257)
    assert second.address == address
    assert (pool.used_bytes, pool.free_bytes) == (3 * STEP_BYTES, 0)


def test_growing_offloading_and_restoring_give_blocks_back() -> None:
    pool = KVPool()
    kv = SessionKV(SHAPE, pool)
    kv.reserve(1)
    kv.length = 1
    kv.reserve(257)
    assert (pool.used_bytes, pool.free_bytes) == (2 * STEP_BYTES, STEP_BYTES)
    kv.offload()
    assert (pool.used_bytes, pool.free_bytes) == (0, 3 * STEP_BYTES)
    kv.restore()
    assert (pool.used_bytes, pool.free_bytes) == (STEP_BYTES, 2 * STEP_BYTES)


def test_free_blocks_are_unmapped_before_the_limit_is_exceeded() -> None:
    pool = KVPool()
    pool.limit_bytes = 10
    blocks = [pool.take(size) for size in (1, 2, 3)]
    for block in blocks:
        pool.give_back(block)
    assert pool.free_bytes == 6
    kept = pool.take(5)  # together 11: the block that was freed first goes
    assert (pool.used_bytes, pool.free_bytes) == (5, 5)
    pool.limit_bytes = 8
    pool.trim()
    assert (pool.used_bytes, pool.free_bytes) == (5, 3)
    pool.limit_bytes = 4
    pool.give_back(kept)
    assert (pool.used_bytes, pool.free_bytes) == (0, 0)


def test_a_block_that_an_error_left_is_not_counted() -> None:
    pool = KVPool()
    block = pool.take(4096)
    assert pool.used_bytes == 4096
    del block
    assert (pool.used_bytes, pool.free_bytes) == (0, 0)


def test_without_memory_the_free_blocks_are_unmapped_and_the_error_is_out_of_memory() -> None:
    pool = KVPool()
    pool.give_back(pool.take(4096))
    with pytest.raises(MemoryError):
        pool.take(2**62)
    assert (pool.used_bytes, pool.free_bytes) == (0, 0)


@pytest.mark.parametrize("size", [1, 4096, 2**21 - 1, 2**21, 5 * 2**20 + 12])
@pytest.mark.parametrize("lacking", ["", "MADV_HUGEPAGE", "MAP_PRIVATE", "populate"])
def test_a_block_has_its_size_on_every_system(size: int, lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking == "populate":
        monkeypatch.setattr(kv_pool, "_MADV_POPULATE_WRITE", 9999)  # as on a kernel before 5.14
    elif lacking:
        monkeypatch.delattr(mmap, lacking)
    block = KVBlock(size)
    assert block.memory.shape == (size,)
    if size >= 2**21 and not lacking:
        assert block.memory.data_ptr() % 2**21 == 0
    block.memory[:] = 7
    while block.touched_bytes < size:
        block.touch(2**20)
    assert block.memory.eq(7).all()


def test_memory_is_touched_ahead_in_pieces_and_within_the_limit() -> None:
    pool = KVPool()
    assert not pool.may_touch_ahead
    size = 2 * kv_pool._TOUCH_BYTES + 1
    pool.usual_sizes = (size, 4096)
    pool.limit_bytes = size + 4095
    pieces = 0
    while pool.may_touch_ahead:
        pool.touch_ahead()
        pieces += 1
    assert (pieces, pool.free_bytes) == (3, size)
    block = pool.take(size)
    assert not pool.may_touch_ahead
    pool.limit_bytes = 2**30
    pool.touch_ahead()
    assert (pool.used_bytes, pool.free_bytes) == (size, size)
    pool.give_back(block)


# --- the engine's memory ---


def test_answers_equal_generate_in_memory_that_holds_nan(tiny: Path, reference: Reference) -> None:
    """Across growth, copies of a prefix, offloads and restores, with several sessions in a step."""
    chats = Chats(tiny, budget=DeviceBudget(4 * STEP_BYTES + 3 * FEATURES_BYTES, 2**30))
    chats.engine.device_memory.pool = NanPool()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        chats.open(name, seed)
    for question in (QUESTIONS[0], QUESTIONS[1] * 22, QUESTIONS[2]):  # the second one makes the caches grow
        expected = {}
        for name in "abc":
            full = chats.ask(name, f"{question} {name}", Sampling(5))
            expected[name] = reference.answer(full, chats.pixels(name), 5)
        assert {name: event.answer_ids for name, event in chats.run().items()} == expected
    memory = chats.engine.memory()
    assert memory.restores > 0
    assert max(session.kv.capacity for session in chats.engine.sessions.values()) > GROWTH_TOKENS


def test_memory_stays_within_the_budget_under_random_chats(tiny: Path) -> None:
    """Blocks in use, free blocks and features; and each block in use is the cache of an open session."""
    device_bytes = 6 * STEP_BYTES + 4 * FEATURES_BYTES
    chats = Chats(tiny, budget=DeviceBudget(device_bytes, 3 * STEP_BYTES))
    pool = chats.engine.device_memory.pool
    assert pool is not None
    draw = random.Random(5)
    answers = reused = most_free = 0
    for number in range(60):
        names = list(chats.engine.sessions)
        if len(names) < 3:
            chats.open(f"s{number}", draw.randrange(3))
        for name in draw.sample(names, min(len(names), 2)):
            if chats.engine.sessions[name].turn is None:
                chats.ask(name, "why? " * draw.choice([1, 30, 60]), Sampling(draw.choice([1, 20])))
        poison(pool)
        for _ in range(draw.randrange(1, 12)):
            free_bytes = pool.free_bytes
            answers += len(chats.run(steps=1))
            most_free = max(most_free, pool.free_bytes)
            reused += pool.free_bytes < free_bytes
            memory = chats.engine.memory()
            assert memory.pool_bytes == pool.free_bytes
            assert pool.used_bytes == memory.kv_bytes
            assert memory.kv_bytes + memory.pool_bytes + memory.features_bytes <= device_bytes
        if draw.random() < 0.3 and names:
            chats.engine.apply(CloseSession(draw.choice(names)))
    assert min(answers, reused, most_free) > 0
    assert not any(isinstance(event, OutOfCapacity) and event.turn_id is None for event in chats.events)
    for name in list(chats.engine.sessions):
        chats.engine.apply(CloseSession(name))
    chats.run()
    assert chats.engine.memory() == Memory()
    assert pool.used_bytes == 0


def test_the_memory_of_a_closed_session_is_used_by_the_next_one(tiny: Path) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    chats.run()
    address = chats.engine.sessions["a"].kv.address
    chats.engine.apply(CloseSession("a"))
    chats.open("b", 2)
    chats.run()
    assert chats.engine.sessions["b"].kv.address == address


def test_an_idle_engine_keeps_touched_memory_for_the_next_open_and_the_next_growth(tiny: Path) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    chats.run()
    pool = chats.engine.device_memory.pool
    assert pool is not None
    assert sorted(block.touched_bytes for block in pool._free) == [STEP_BYTES, 2 * STEP_BYTES]
    assert chats.engine.memory().pool_bytes == 3 * STEP_BYTES


def test_free_memory_is_no_reason_to_offload_or_reject(tiny: Path) -> None:
    budget = DeviceBudget(2 * STEP_BYTES + 3 * FEATURES_BYTES, 2**30)
    chats = Chats(tiny, budget=budget)
    chats.open("a", 1)
    chats.ask("a", "why? " * 60, Sampling(1))  # a block of two steps
    chats.run()
    chats.engine.apply(CloseSession("a"))
    for name in "bc":
        chats.open(name, ord(name))
    chats.run()
    memory = chats.engine.memory()
    assert (memory.resident, memory.offloads, memory.kv_bytes, memory.pool_bytes) == (2, 0, 2 * STEP_BYTES, 0)
    assert not [event for event in chats.events if isinstance(event, OutOfCapacity)]
