"""Engines on random models, and the few ways in which the sections drive them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType

from llava_sessions.engine.budget import DeviceBudget, choose_budget
from llava_sessions.engine.device import prepare
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import (
    AskSession,
    CloseSession,
    Event,
    Finished,
    OpenFailed,
    OpenSession,
    OutOfCapacity,
    Sampling,
    TurnFailed,
)
from llava_sessions.text.chat_template import ChatTemplate

from .day import Day
from .models import Shape, make

# Launches of the host as the profiler names them. A replayed graph is one.
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")
# Smaller IDs are special tokens.
_FIRST_WORD = 300


def load(day: Day, shape: Shape, dtype: torch.dtype | None = None) -> tuple[Model, ChatTemplate]:
    """Return the engine's model of a shape with transformers' layers, and its text side. `dtype`: bfloat16."""
    made, template = make(shape, dtype or day.pick(torch.bfloat16, torch.float32), day.device)
    prepare(day.device)
    return Model(made), template


def engine_of(model: Model, template: ChatTemplate, chunk: int = 2048, budget: DeviceBudget | None = None) -> Engine:
    """Return an engine. `budget`: None for the engine's own choice, without a warm-up."""
    return Engine(model, template.answer_text, budget or choose_budget(model.device), chunk)


class Driver:
    """Opens sessions without pictures, asks in token IDs, and collects the answers.

    `refused`: sessions and turns that the engine rejected for lack of memory.
    """

    def __init__(self, engine: Engine, vocabulary: int) -> None:
        """`vocabulary`: of the model."""
        self.engine = engine
        self.answers: dict[str, list[list[int]]] = {}
        self.refused = 0
        self._vocabulary = vocabulary
        self._random = random.Random(0)
        self._turns = 0

    def words(self, count: int) -> list[int]:
        """Return random token IDs."""
        return self._random.choices(range(min(_FIRST_WORD, self._vocabulary // 2), self._vocabulary), k=count)

    def open(self, name: str) -> None:
        """Open a session without a picture."""
        self.answers[name] = []
        self.engine.apply(OpenSession(name, [], ()))

    def ask(self, name: str, token_ids: Sequence[int], answer_tokens: int) -> None:
        """Start a turn of exactly `answer_tokens` tokens."""
        self._turns += 1
        sampling = Sampling(answer_tokens, ignore_eos=True, min_tokens=answer_tokens)
        self.engine.apply(AskSession(name, f"{name}/{self._turns}", list(token_ids), sampling))

    def close(self, names: Iterable[str]) -> None:
        """Close sessions."""
        for name in list(names):
            self.engine.apply(CloseSession(name))
            self.answers.pop(name, None)
        self.run()

    def step(self) -> list[Event]:
        """Run one step of the engine. Raises RuntimeError if a request failed."""
        events = self.engine.step()
        for event in events:
            if isinstance(event, OpenFailed | TurnFailed):
                raise RuntimeError(f"the engine failed: {event}")
            if isinstance(event, OutOfCapacity):
                self.refused += 1
            if isinstance(event, Finished):
                self.answers[event.turn_id.split("/")[0]].append(event.answer_ids)
        return events

    def run(self) -> None:
        """Step until the engine has no work."""
        while self.engine.has_work:
            self.step()

    def fill(self, count: int, tokens: int) -> list[str]:
        """Open sessions with `tokens` tokens each in their KV caches; return their names."""
        names = [f"chat{number}" for number in range(count)]
        for name in names:
            self.open(name)
            self.ask(name, self.words(tokens), 1)
        self.run()
        return names

    def begin_decoding(self, names: Sequence[str], steps: int) -> None:
        """Ask all sessions, and step until each has its first token. Then at least `steps` steps only decode."""
        for name in names:
            self.ask(name, self.words(1), steps + 2)
        while any(not self._answered(name) for name in names):
            self.step()

    def _answered(self, name: str) -> int:
        turn = self.engine.sessions[name].turn
        return 0 if turn is None else len(turn.answer_ids)


def profile(day: Day, work: Callable[[], Any]) -> dict[str, float | int]:
    """Run `work` once under torch's profiler.

    On a GPU: the `launches` of the host, the `kernels` on the device and the milliseconds that they took together. On a
    CPU: the calls of ATen.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if day.on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    day.synchronize()
    with torch.profiler.profile(activities=activities) as seen:
        work()
        day.synchronize()
    events = seen.events() or []
    if not day.on_cuda:
        return {"aten_calls": sum(event.name.startswith("aten::") for event in events)}
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not _is_copy(event.name)]
    return {
        "launches": sum(event.name.startswith(_LAUNCHES) for event in events),
        "kernels": len(kernels),
        "busy_ms": round(sum(event.time_range.elapsed_us() for event in kernels) / 1e3, 3),
    }


def _is_copy(name: str) -> bool:
    return name.startswith(("Memcpy", "Memset"))
