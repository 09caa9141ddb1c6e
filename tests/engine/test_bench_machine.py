"""The bandwidth of a GPU is read on a tensor that is large enough, between events of its queue. CUDA is a fake."""

from __future__ import annotations

import time

import pytest
import torch

from bench.machine import Bandwidth
from tests.support.meta_cuda import Card, meta_cuda

GIB = 2**30


class Queue:
    """The queue of a device on which each event comes 1 ms after the one before."""

    def __init__(self) -> None:
        self.events = 0

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    """An event of a `Queue`, as torch's."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._at_ms: int | None = None

    def record(self) -> None:
        self._queue.events += 1
        self._at_ms = self._queue.events

    def synchronize(self) -> None:
        assert self._at_ms is not None

    def elapsed_time(self, end: Event) -> float:
        assert self._at_ms is not None
        assert end._at_ms is not None
        return float(end._at_ms - self._at_ms)


def test_a_gpu_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(16 * GIB, 0)
    card.patch(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Event", Queue().event)
    with meta_cuda(card):
        bandwidth = Bandwidth(torch.device("cuda"))
        assert card.live_bytes >= 2 * 2 * GIB, "source and target"
        read = bandwidth.measure(1)
    assert read == pytest.approx(2 * GIB / 1e-3)
    assert bandwidth.facts() == {"read": round(2 * GIB / 1e6, 1), "copy": round(4 * GIB / 1e6, 1)}


def test_a_cpu_is_timed_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(times) / 1e3)
    assert Bandwidth(torch.device("cpu"), 1).measure(1) == pytest.approx(2**20 / 1e-3)
