"""The byte budget of all sessions, from the memory that is free once the weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..machine_memory import memory_bytes
from .faults import release_unused

# Kept free for forwards on CUDA: the working memory that the warm-up measured, times this factor, and a fixed part for
# fragments of the allocator. deploy/sagemaker/capacity.py has the same numbers.
WORKING_FACTOR = 1.25
FRAGMENTS_BYTES = 256 * 2**20
# Memory of all captured CUDA graphs (decode_graphs.py). capacity.py has the same number and the same rule.
GRAPHS_BYTES = 192 * 2**20


class InsufficientMemory(Exception):
    """The device's memory can't hold one session next to the weights. The message has both sizes."""


def graphs_limit(device: torch.device, weights_bytes: int) -> int:
    """Return the bytes that graphs may take, 0 if the weights fill more than half of the device.

    A step reads all weights. On a GPU with a good half of its memory in weights that takes at least 12 ms, by its
    bandwidth, and launches take less. Graphs would not make the step shorter, and cost room for sessions.
    """
    if device.type != "cuda":
        return GRAPHS_BYTES
    _, total = torch.cuda.mem_get_info(device)
    return GRAPHS_BYTES if 2 * weights_bytes <= total else 0


@dataclass(frozen=True)
class DeviceBudget:
    """Bytes for features and KV on the device, and for offloaded KV on the host."""

    device_bytes: int
    host_bytes: int


def choose_budget(
    device: torch.device,
    device_bytes: int | None = None,
    host_bytes: int | None = None,
    working_bytes: int = 0,
    graphs_bytes: int = 0,
    engines: int = 1,
) -> DeviceBudget:
    """Return a budget of the given sizes. A size of None is derived from the machine's memory.

    On CUDA the device's part is the free memory after loading the weights, minus a reserve for forwards: 1.25 times
    the measured `working_bytes`, 256 MiB, and `graphs_bytes` that CUDA graphs may still take. Memory that torch caches
    counts as free: it is released first. On a CPU both parts are RAM: 30 % for the device's and 20 % for the host's. A
    container's memory limit counts as its RAM. RAM is divided by the number of `engines` on the machine.
    """
    ram = memory_bytes() / engines
    if device_bytes is None and device.type == "cuda":
        release_unused(device)
        free, _ = torch.cuda.mem_get_info(device)
        device_bytes = max(free - int(WORKING_FACTOR * working_bytes) - FRAGMENTS_BYTES - graphs_bytes, 0)
    return DeviceBudget(
        device_bytes=int(0.3 * ram) if device_bytes is None else device_bytes,
        host_bytes=int(0.2 * ram) if host_bytes is None else host_bytes,
    )
