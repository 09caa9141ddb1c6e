"""Section "moves": a KV cache to the host and back, in bytes a second, and the memory that the copies take."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from llava_sessions.engine.kv import KVShape, SessionKV

from .day import Day, Findings
from .models import LLAVA, MISTRAL, TINY, Shape

_LEAST_GB_S = 15.0
_MOST_TEMPORARY = 1 / 16


def run(day: Day, found: Findings) -> None:
    """Offload and restore caches of 4,000 tokens. The first offload pins memory, the others reuse it."""
    for shape in day.pick((LLAVA, MISTRAL), (TINY,)):
        found.results[shape.name] = _moves(day, found, shape)
        day.say(f"{shape.name}: {found.results[shape.name]}")


def _moves(day: Day, found: Findings, shape: Shape) -> dict[str, float]:
    cache = SessionKV(KVShape(shape.layers, shape.kv_heads, shape.head_dim, torch.bfloat16, day.device))
    tokens = day.pick(4000, 100)
    cache.reserve(tokens)
    for layer in range(shape.layers):
        keys, values = torch.randn(2, shape.kv_heads, tokens, shape.head_dim, device=day.device).to(torch.bfloat16)
        cache.write(layer, 0, keys, values)
    cache.length = tokens
    moved_bytes = tokens * cache.shape.token_bytes
    before = [part.clone() for part in cache.read(shape.layers - 1, tokens)]
    rows: dict[str, float] = {}
    for number in range(3):
        for name, move in (("offload", cache.offload), ("restore", cache.restore)):
            held = cache.device_bytes
            taken_s, temporary = _measured(day, move)
            if name == "restore":
                temporary -= cache.device_bytes
            label = f"first {name}" if not number else name
            rows[f"{label}, GB/s"] = round(moved_bytes / taken_s / 1e9, 2)
            share = temporary / max(held, cache.device_bytes)
            if not day.on_cuda:
                continue
            rows[f"{label}, temporary memory of the cache"] = round(share, 4)
            found.check("temporary memory at most 1/16 of the cache", share <= _MOST_TEMPORARY)
            if number:
                found.check(f"at least {_LEAST_GB_S:g} GB/s", moved_bytes / taken_s / 1e9 >= _LEAST_GB_S)
    after = cache.read(shape.layers - 1, tokens)
    same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    found.check("the tokens are the same after three moves", same)
    return rows


def _measured(day: Day, move: Callable[[], None]) -> tuple[float, int]:
    """Return the seconds of a move, and the peak of the allocated bytes above those before it. 0 bytes on a CPU."""
    day.synchronize()
    before = 0
    if day.on_cuda:
        torch.cuda.reset_peak_memory_stats(day.device)
        before = torch.cuda.memory_allocated(day.device)
    began = time.perf_counter()
    move()
    day.synchronize()
    taken_s = time.perf_counter() - began
    return taken_s, torch.cuda.max_memory_allocated(day.device) - before if day.on_cuda else 0
