"""Sections "kernel numbers" and "kernel bandwidth": attention of single tokens against float64, and against torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention import Batch, Heads, kernel, relative_error
from .day import Day, Findings
from .machine import bandwidth

_HEADS = (
    Heads(32, 32, 128),
    Heads(32, 8, 128),
    Heads(32, 8, 128, normed=True),
    Heads(28, 4, 128),
    Heads(14, 2, 64),
    Heads(40, 40, 128),
)
_SMALL_HEADS = (Heads(4, 2, 16),)
_LONGEST = 8192
# Relative to the largest number of a row. After 8,192 random tokens that is 0.06, and float32 sums have errors of 1e-6.
_ALLOWED = {torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 1e-2}
_PIECE_EDGES = (0, 1, 127, 128, 129)


def numbers(day: Day, found: Findings) -> None:
    """Compare the kernel with float64 for all shapes, precisions and numbers of sessions.

    Memory after the stored tokens is NaN and must stay so. A session alone must have the same bits as in company.
    """
    generator = random.Random(0)
    worst: dict[str, float] = {}
    found.results["worst_relative_error"] = worst
    for heads in day.pick(_HEADS, _SMALL_HEADS):
        for dtype in day.pick((torch.float32, torch.float16, torch.bfloat16), (torch.float32,)):
            attend = kernel(heads, dtype, day.device)
            for count in day.pick((1, 8, 64), (8,)):
                name = f"{heads}, {str(dtype).removeprefix('torch.')}, B={count}"
                batch = Batch(heads, _lengths(generator, count, day.pick(_LONGEST, 200)), dtype, day.device)
                worst[name] = _compare(batch, attend, found)
                found.check(f"error, {str(dtype).removeprefix('torch.')}", worst[name] < _ALLOWED[dtype])
                del batch
                day.release()
        day.say(f"heads {heads}: worst so far {max(worst.values()):.1e}")


def _lengths(generator: random.Random, count: int, longest: int) -> list[int]:
    """Return numbers of stored tokens: the edges of the kernel's pieces, the longest, and random ones."""
    if count == 1:
        return [longest]
    return [*_PIECE_EDGES, longest, *(generator.randint(0, longest) for _ in range(count - len(_PIECE_EDGES) - 1))]


def _compare(batch: Batch, attend: Any, found: Findings) -> float:
    """Return the worst relative error of one batch; note the other checks."""
    together = batch.run(attend, attend.task(batch.places())).clone()
    worst = 0.0
    for row in range(len(batch.stored)):
        attended, key, value = batch.expected(row)
        stored_key, stored_value = batch.stored_new(row)
        worst = max(worst, relative_error(together[row], attended), relative_error(stored_key, key))
        found.check("the new value is stored as it is", torch.equal(stored_value, value))
        found.check("memory after the new token is not written", batch.is_untouched(row))
    for row in {0, len(batch.stored) // 2, len(batch.stored) - 1}:
        alone = batch.run(attend, attend.task(batch.places([row])))[row]
        found.check("alone equals in company, bitwise", torch.equal(alone, together[row]))
    return worst


def speeds(day: Day, found: Findings) -> None:
    """Measure the bytes a second of the kernel, of the loop over sessions, and of flash attention, on the same caches.

    The kernel and flash attention are replayed as graphs, without the time of launches. The loop runs as transformers'
    layers run it: launch by launch, and each step at a new length. With cuDNN each length builds a plan.
    """
    copy_gb_s = bandwidth(day)["copy"]
    found.results["copy_gb_s"] = copy_gb_s
    rows: list[dict[str, Any]] = []
    found.results["rows"] = rows
    for heads in day.pick((Heads(32, 32, 128), Heads(32, 8, 128), Heads(28, 4, 128)), _SMALL_HEADS):
        for tokens in day.pick((1000, 4000), (40,)):
            for count in day.pick((1, 8, 32), (2,)):
                row = _speeds_of(day, heads, tokens, count)
                day.release()
                rows.append(row)
                if count >= 8:
                    share = row["kernel_gb_s"] / copy_gb_s
                    found.check(f"at least 75 % of the copy bandwidth, heads {heads}", share >= 0.75)
        day.say(f"heads {heads}: kernel {rows[-1]['kernel_gb_s']} GB/s")


def _speeds_of(day: Day, heads: Heads, tokens: int, count: int) -> dict[str, Any]:
    """Return the speeds of all sides at one size. So many layers run that no cache of the device holds them all."""
    dtype = day.pick(torch.bfloat16, torch.float32)
    layer_bytes = 2 * count * tokens * heads.kv_heads * heads.head_dim * dtype.itemsize
    layers = day.pick(min(max(2**29 // layer_bytes, 1), 32), 1)
    batch = Batch(heads, [tokens] * count, dtype, day.device, layers, spare=128)
    attend = kernel(heads, dtype, day.device)
    task = attend.task(batch.places())

    def gb_s(one_layer: Callable[[int], Any], repeats: int, captured: bool = False) -> float:
        def work() -> None:
            for layer in range(layers):
                one_layer(layer)

        taken_ms = day.median_ms(day.captured(work) if captured else work, repeats)
        return round(layers * batch.kv_bytes / taken_ms / 1e6, 1)

    row: dict[str, Any] = {"heads": str(heads), "tokens": tokens, "sessions": count, "layers": layers}
    row["kernel_gb_s"] = gb_s(lambda layer: batch.run(attend, task, layer), 20, captured=True)
    step = iter(range(10**6))

    def grown(layer: int) -> None:
        batch.loop(layer, at=next(step) // layers % 128)

    with _cudnn(day, False):
        row["loop_gb_s"] = gb_s(grown, 5)
    if day.on_cuda:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            row["flash_gb_s"] = gb_s(batch.loop, 20, captured=True)
        with _cudnn(day, True):
            row["loop_with_cudnn_gb_s"] = gb_s(grown, 3)
    return row


@contextmanager
def _cudnn(day: Day, enabled: bool) -> Iterator[None]:
    """Turn cuDNN's attention on or off in this block."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
