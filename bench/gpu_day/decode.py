"""Section "decode": steps of 1 to 64 sessions of about 1,000 tokens, against the time to read weights and KV once."""

from __future__ import annotations

import statistics
import time
from typing import Any

from llava_sessions.engine.budget import choose_budget
from llava_sessions.engine.model import Model
from llava_sessions.text.chat_template import ChatTemplate

from . import variants
from .day import Day, Findings
from .engines import Driver, engine_of, profile
from .machine import bandwidth
from .models import LLAVA, MISTRAL, QWEN2, QWEN3, TINY_QWEN3, Shape

_MOST_TIMES_BOUND = 1.3
_MOST_LAUNCHES = 420
# In each cache: about 1,000, and the same number of the kernel's pieces of 128 tokens in all steps.
_TOKENS = 960
_WARM_UPS = 8  # a graph is captured after some steps of its size


def run(day: Day, found: Findings) -> None:
    """Measure the steps of all variants of a 7B model, then 8 sessions of the models with fewer KV heads."""
    read_gb_s = bandwidth(day)["read"]
    found.results["read_gb_s"] = read_gb_s
    rows: list[dict[str, Any]] = []
    found.results["rows"] = rows
    usual = [(LLAVA, (1, 8, 32, 64)), (MISTRAL, (8,)), (QWEN2, (8,)), (QWEN3, (8,))]
    for shape, counts in day.pick(usual, [(TINY_QWEN3, (2,))]):
        for name, model, template in variants.of(day, shape, found):
            for count in counts:
                if not _fits(model, count):
                    found.notes.append(f"{shape.name}, {name}: no room for {count} sessions")
                    continue
                row = _steps(day, shape, model, template, count) | {"variant": name}
                rows.append(row)
                _judge(row, shape, read_gb_s, day, found)
                day.say(f"{shape.name}, {name}, B={count}: {row['step_ms']:.2f} ms, bound {row['bound_ms']:.2f} ms")
            del model
            day.release()


def _fits(model: Model, count: int) -> bool:
    """Return whether the device has memory for the KV caches of so many sessions."""
    return count * model.kv_shape.device_bytes(_TOKENS + 64) <= choose_budget(model.device).device_bytes


def _steps(day: Day, shape: Shape, model: Model, template: ChatTemplate, count: int) -> dict[str, Any]:
    """Return the median time of a step, and the launches of one."""
    tokens = day.pick(_TOKENS, 20)
    steps = day.pick(30, 1)
    warm_ups = day.pick(_WARM_UPS, 3)
    driver = Driver(engine_of(model, template), shape.vocabulary)
    names = driver.fill(count, tokens)
    driver.begin_decoding(names, warm_ups + steps + 1)
    replays = 0 if model.graphs is None else model.graphs.replays
    for _ in range(warm_ups):
        driver.step()
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        driver.step()  # it ends with the tokens on the host
        taken.append((time.perf_counter() - began) * 1e3)
    profiled = profile(day, driver.step)
    driver.run()
    driver.close(names)
    step_ms = statistics.median(taken)
    graphs = model.graphs
    row = {"shape": shape.name, "sessions": count, "tokens": tokens, "step_ms": round(step_ms, 3), **profiled}
    row["replays"] = 0 if graphs is None else graphs.replays - replays
    if day.on_cuda:
        row["busy_share"] = round(profiled["busy_ms"] / step_ms, 3)
    return row


def _judge(row: dict[str, Any], shape: Shape, read_gb_s: float, day: Day, found: Findings) -> None:
    """Add the bound to a row, and check the variants that are to be near it."""
    kv_bytes = row["sessions"] * row["tokens"] * shape.layers * 2 * shape.kv_heads * shape.head_dim * 2
    row["bound_ms"] = round((shape.linear_bytes + kv_bytes) / read_gb_s / 1e6, 3)
    row["times_bound"] = round(row["step_ms"] / max(row["bound_ms"], 1e-9), 2)
    if row["variant"] == variants.GRAPHS:
        found.check("the steps were replayed", row["replays"] > 0)
    if row["variant"] == variants.PLAIN or not day.on_cuda:
        return
    found.check(f"at most {_MOST_LAUNCHES} launches, {row['variant']}", row["launches"] <= _MOST_LAUNCHES)
    if row["sessions"] >= 8:
        near = row["times_bound"] <= _MOST_TIMES_BOUND
        found.check(f"at most {_MOST_TIMES_BOUND} times the bound from 8 sessions on, {row['variant']}", near)
