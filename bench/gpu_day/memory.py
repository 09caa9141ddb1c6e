"""Section "memory": the budget after a warm-up, sessions until it is full and beyond, and random work."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.process import start
from llava_sessions.ipc.messages import AskSession, CloseSession, EngineSettings, OpenSession, OutOfCapacity, Sampling
from llava_sessions.text.chat_template import ChatTemplate, Opening
from llava_sessions.text.tiles import largest_picture

from .day import Day, Findings
from .engines import Driver, load
from .models import LLAVA, TINY

# Both names: older torch reads the first one only.
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_MOST_RESERVED = 1.15
_OPERATIONS = 500
# Pinned memory takes 0.2 s a GiB when it is first used.
_HOST_BYTES = 4 * 2**30


def run(day: Day, found: Findings) -> None:
    """Measure in processes with and without expandable segments of torch's allocator."""
    from . import children  # it imports this module

    day.release()
    for setting in day.pick(("False", "True"), ("False",)):
        result, status = children.run(day, "memory", dict.fromkeys(_ALLOCATOR, f"expandable_segments:{setting}"))
        found.results[f"expandable_segments:{setting}"] = result
        found.check("the process ended without an error", status == 0)
        found.check("no allocation failed", not result["failed_allocations"])
        found.check("an opening beyond the budget is rejected", result["rejected_openings"] > 0)
        found.check("a turn beyond the budget is rejected", result["rejected_turns"] > 0)
        day.say(f"expandable_segments:{setting}: {result}")
    ratios = [result["reserved_over_allocated"] for result in found.results.values()]
    found.check(f"reserved at most {_MOST_RESERVED} times allocated, in one setting", min(ratios) < _MOST_RESERVED)


def measure(day: Day) -> dict[str, Any]:
    """Fill the budget, run random work, and exceed it; return counts and bytes."""
    shape = day.pick(LLAVA, TINY)
    model, template = load(day, shape)
    engine = start(model, template, EngineSettings("", "", "auto", str(day.device), None, host_bytes=_HOST_BYTES))
    budget = engine.device_memory.budget
    chats = _Chats(engine, template, shape.vocabulary)
    if day.smoke:
        engine.device_memory.budget = DeviceBudget(5 * chats.session_bytes, 4 * chats.session_bytes)
    filled = chats.fill()
    full = _torch_bytes(day)
    operations = chats.churn(day)
    after = _torch_bytes(day)
    return {
        "session_bytes": chats.session_bytes,
        "device_budget_bytes": budget.device_bytes,
        "sessions_until_the_first_offload": filled,
        "operations": operations,
        "offloads": engine.memory().offloads,
        "restores": engine.memory().restores,
        "drops": engine.memory().drops,
        "rejected_in_random_work": chats.refused,
        **chats.exceed(),
        "full": full,
        "after": after,
        "reserved_over_allocated": round(full["reserved"] / max(full["allocated"], 1), 3),
        "failed_allocations": after["failed"],
    }


class _Chats(Driver):
    """Sessions with one picture each. All pictures have the same numbers and different keys."""

    def __init__(self, engine: Engine, template: ChatTemplate, vocabulary: int) -> None:
        super().__init__(engine, vocabulary)
        self._template = template
        self._number = 0
        side = largest_picture(template.processor)
        noise = np.random.default_rng(0).integers(0, 256, (side[1], side[0], 3), dtype=np.uint8)
        self._inputs = template.opening([("0", Image.fromarray(noise))])

    @property
    def session_bytes(self) -> int:
        """Bytes of a session on the device after its opening."""
        model = self.engine.model
        features_bytes = self._inputs.image_tokens * model.feature_bytes
        return model.kv_shape.device_bytes(len(self._inputs.token_ids)) + features_bytes

    def open_next(self) -> str:
        """Open one more session; return its name."""
        self._number += 1
        name = f"chat{self._number}"
        self.answers[name] = []
        self.engine.apply(OpenSession(name, self._inputs.token_ids, self._opening(name).pictures))
        return name

    def _opening(self, key: str) -> Opening:
        pictures = tuple(type(picture)(key, picture.inputs) for picture in self._inputs.pictures)
        return Opening(self._inputs.token_ids, pictures, self._inputs.image_tokens)

    def fill(self) -> int:
        """Open sessions until the first KV cache has to leave the device; return their number."""
        while not self.engine.memory().offloads + self.engine.memory().drops:
            self.open_next()
            self.run()
        return len(self.engine.sessions)

    def churn(self, day: Day) -> int:
        """Open, ask, offload and close at random; return the number of operations."""
        order = random.Random(1)
        for done in range(day.pick(_OPERATIONS, 30)):
            if day.left_s < day.pick(15, 0):
                return done
            names = list(self.engine.sessions)
            match order.choices(("open", "ask", "offload", "close"), (3, 10, 1, 2))[0]:
                case "open":
                    self.open_next()
                case "ask" if names:
                    self.ask(order.choice(names), self.words(order.randint(1, day.pick(600, 20))), 4)
                case "offload":
                    self.engine.device_memory.relieve()
                case "close" if names:
                    self.engine.apply(CloseSession(order.choice(names)))
            if order.random() < 0.5:  # else the next operation joins this one's step
                self.run()
        self.run()
        return day.pick(_OPERATIONS, 30)

    def exceed(self) -> dict[str, int]:
        """Ask for a longer answer than the budget can hold, and open a session without room for its features."""
        name = self.open_next()
        self.run()
        memory = self.engine.device_memory
        features_bytes = self.engine.memory().features_bytes
        device_bytes = features_bytes + self.engine.sessions[name].opening_bytes
        memory.budget = DeviceBudget(device_bytes, memory.budget.host_bytes)
        self.engine.apply(AskSession(name, f"{name}/last", self.words(1), Sampling(2000, ignore_eos=True)))
        self.open_next()
        rejected = [event for event in self.engine.step() if isinstance(event, OutOfCapacity)]
        return {
            "rejected_turns": sum(event.turn_id is not None for event in rejected),
            "rejected_openings": sum(event.turn_id is None for event in rejected),
        }


def _torch_bytes(day: Day) -> dict[str, int]:
    """Return what torch's allocator reports."""
    if not day.on_cuda:
        return {"allocated": 0, "reserved": 0, "peak": 0, "failed": 0}
    stats = torch.cuda.memory_stats(day.device)
    return {
        "allocated": torch.cuda.memory_allocated(day.device),
        "reserved": torch.cuda.memory_reserved(day.device),
        "peak": torch.cuda.max_memory_allocated(day.device),
        "failed": int(stats.get("num_ooms", 0)),
    }
