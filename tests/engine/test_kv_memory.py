"""Offloading, restoring and growing take no more device memory than is budgeted, and pinned memory is counted whole."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.kv import KVShape, SessionKV
from llava_sessions.ipc.messages import OutOfCapacity, Sampling
from tests.support.engine_chats import Chats
from tests.support.meta_cuda import Card, meta_cuda

MIB = 2**20
LAYERS = 32
SHAPE = KVShape(LAYERS, 8, 128, torch.float16, torch.device("cuda"))  # LLaVA-NeXT on Mistral: 128 KiB a token
TOKEN_BYTES = 4 * 2 * 2 * 16 * 4  # of the tiny checkpoint: layers, keys and values, kv heads, head dim, float32
FEATURES_BYTES = 16 * 64 * 4  # image tokens, hidden, float32


def test_a_cache_moves_without_a_second_copy_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(4 * 1024 * MIB, 0)
    card.patch(monkeypatch)
    with meta_cuda(card):
        kv = SessionKV(SHAPE)
        kv.reserve(3000)
        kv.length = 2900
        cache_bytes = kv.device_bytes
        assert cache_bytes == card.live_bytes == 12 * 32 * MIB
        for move in (kv.offload, kv.restore):
            move()
            assert cache_bytes < card.peak_bytes <= cache_bytes * (1 + 1 / LAYERS)
        assert (card.live_bytes, kv.length) == (cache_bytes, 2900)
        donor = kv
        donor.offload()
        copy = SessionKV(SHAPE)
        copy.fork(donor, 1000)
        assert card.live_bytes == 4 * 32 * MIB
        assert card.peak_bytes <= cache_bytes * (1 + 1 / LAYERS)


@pytest.mark.parametrize(
    ("shape", "tokens", "pinned_mib"),
    [
        (SHAPE, 1, 32),
        (SHAPE, 2900, 12 * 32),
        (KVShape(40, 40, 128, torch.float16, torch.device("cuda")), 600, 3 * 256),  # 200 MiB a step
        (KVShape(28, 4, 128, torch.float16, torch.device("cuda")), 300, 2 * 16),  # 14 MiB a step
    ],
)
def test_pinned_memory_is_counted_as_torch_takes_it(
    shape: KVShape, tokens: int, pinned_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(8 * 1024 * MIB, 0)
    card.patch(monkeypatch)
    with meta_cuda(card):
        kv = SessionKV(shape)
        kv.reserve(tokens)
        kv.length = tokens
        kv.offload()
    assert kv.host_bytes == card.pinned_bytes == pinned_mib * MIB == shape.host_bytes(tokens)


class Caches(TorchDispatchMode):
    """Counts the bytes of all caches on the device, at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and _is_on_device():
            size = out.nbytes
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(out.untyped_storage(), self._free, size)
        return out

    def _free(self, size: int) -> None:
        self.live -= size


def _is_on_device() -> bool:
    """Return whether the running call allocates a cache on the device: here that is the host's memory too."""
    frame = sys._getframe(2)
    while frame is not None and "llava_sessions" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_code is KVShape.empty.__code__


@pytest.mark.parametrize("host_bytes", [2**40, 0], ids=["over the host", "rebuilt"])
def test_the_old_and_the_grown_cache_fit_the_budget_together(tiny: Path, host_bytes: int) -> None:
    device_bytes = 900 * TOKEN_BYTES + FEATURES_BYTES
    chats = Chats(tiny, budget=DeviceBudget(device_bytes, host_bytes))
    free = Chats(tiny)
    chats.engine.device_memory.pool = None
    for either in (chats, free):
        either.open("a", 1)
        either.run()
    with Caches() as caches:
        for question in ("why? " * 40, "how? " * 40, "who? " * 40):  # the last cache alone takes most of the budget
            for either in (chats, free):
                either.ask("a", question, Sampling(3))
            with torch.utils._python_dispatch._disable_current_modes():
                expected = free.run()["a"].answer_ids
            kv = chats.engine.sessions["a"].kv
            assert chats.run(steps=1).get("a") is None
            capacity = kv.capacity
            assert chats.run()["a"].answer_ids == expected
            assert kv.capacity == capacity, "the cache grew while its answer ran"
    assert kv.device_bytes > device_bytes / 2
    assert kv.device_bytes <= caches.peak <= device_bytes
    assert not [event for event in chats.events if isinstance(event, OutOfCapacity)]
