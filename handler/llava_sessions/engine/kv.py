"""Owns one session's KV cache, wherever it lies, and the byte budget that decides where each one lies.

A cache is resident (on the device), parked (its used part on the host) or cold (nowhere; a prefill makes it again).
Must not know the model's code, text, or what the tokens mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

GROWTH_TOKENS = 256


@dataclass(frozen=True)
class KVShape:
    """What the KV cache of one token is made of, and the device it is made for."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def device_bytes(self, tokens: int) -> int:
        """Bytes that a cache of so many tokens takes on the device: capacity comes in steps of `GROWTH_TOKENS`."""
        return -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS * self.token_bytes


class SessionKV:
    """Keys and values of one session in one tensor `[layers, 2, kv_heads, capacity, head_dim]`.

    The capacity grows in steps of `GROWTH_TOKENS` tokens, so a step of the engine allocates nothing unless it crosses
    one; attention reads a session's own contiguous memory, whoever shares the batch.
    """

    def __init__(self, shape: KVShape) -> None:
        self.shape = shape
        self.length = 0
        self._device = self._empty(0)
        self._host: torch.Tensor | None = None

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device, the unused part of the capacity included."""
        return self._device.nbytes

    @property
    def address(self) -> int:
        """Where it lies on the device, until its capacity changes."""
        return self._device.data_ptr()

    @property
    def capacity(self) -> int:
        """Tokens that it has room for on the device."""
        return self._device.shape[3]

    @property
    def host_bytes(self) -> int:
        """Bytes held on the host."""
        return 0 if self._host is None else self._host.nbytes

    @property
    def tier(self) -> str:
        """ "resident", "parked" or "cold"."""
        if self._host is not None:
            return "parked"
        return "resident" if self.length else "cold"

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all. Raises torch's out-of-memory error with everything stored intact."""
        if tokens <= self.capacity:
            return
        grown = self._empty(-(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS)
        grown[:, :, :, : self.length].copy_(self._device[:, :, :, : self.length])
        self._device = grown

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store new keys and values, `[kv_heads, tokens, head_dim]` each, from token `start` on, in reserved room."""
        end = start + keys.shape[1]
        self._device[layer, 0, :, start:end] = keys
        self._device[layer, 1, :, start:end] = values

    def read(self, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the first `length` keys and values of a layer, `[1, kv_heads, length, head_dim]` each."""
        keys, values = self._device[layer, :, :, :length]
        return keys[None], values[None]

    def crop(self, length: int) -> None:
        """Forget every token behind the first `length`."""
        self.length = min(self.length, length)

    def fork(self, donor: SessionKV, tokens: int) -> None:
        """Start with the first `tokens` of another session's cache, wherever that lies."""
        source = donor._device if donor._host is None else donor._host
        self.reserve(tokens)
        self._device[:, :, :, :tokens].copy_(source[:, :, :, :tokens])
        self.length = tokens

    def park(self) -> None:
        """Move the used part to the host (pinned, where the device is a GPU)."""
        used = self._device[:, :, :, : self.length]
        pin = self.shape.device.type == "cuda"
        host = torch.empty(used.shape, dtype=used.dtype, device="cpu", pin_memory=pin)
        self._host = host.copy_(used)
        self._device = self._empty(0)

    def restore(self) -> None:
        """Bring a parked cache back to the device; nothing happens to one that is not parked.

        Raises torch's out-of-memory error with the cache still parked.
        """
        if self._host is None:
            return
        device = self._empty(-(-self.length // GROWTH_TOKENS) * GROWTH_TOKENS)
        device[:, :, :, : self.length].copy_(self._host[:, :, :, : self.length], non_blocking=True)
        self._device, self._host = device, None

    def drop(self) -> None:
        """Forget everything: the cache is cold."""
        self.length = 0
        self._device = self._empty(0)
        self._host = None

    def _empty(self, capacity: int) -> torch.Tensor:
        shape = self.shape
        size = (shape.layers, 2, shape.kv_heads, capacity, shape.head_dim)
        return torch.empty(size, dtype=shape.dtype, device=shape.device)


@dataclass(frozen=True)
class DeviceBudget:
    """Bytes that sessions may hold: features and KV on the device, parked KV on the host."""

    device_bytes: int
    host_bytes: int


def choose_budget(
    device: torch.device, device_bytes: int | None = None, host_bytes: int | None = None, working_bytes: int = 0
) -> DeviceBudget:
    """A budget of the given sizes, or where one is None of what the machine has.

    On CUDA: what is free after the weights, less a reserve for the work itself: twice what was measured, at least
    512 MiB. On a CPU both tiers are its RAM: 30 % of it for the device's, 20 % for the host's.
    """
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device_bytes is None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        device_bytes = max(free - max(2 * working_bytes, 512 * 2**20), 0)
    return DeviceBudget(
        device_bytes=int(0.3 * ram) if device_bytes is None else device_bytes,
        host_bytes=int(0.2 * ram) if host_bytes is None else host_bytes,
    )


class BudgetExceeded(Exception):
    """What was asked for can't be held beside what is running; `needed_bytes` of `free_bytes`."""

    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{needed_bytes} bytes are needed, {free_bytes} are free")
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class Holder(Protocol):
    """What the budget sees of a session: `last_used` orders by use, `reserved_bytes` is what its work may take."""

    kv: SessionKV
    last_used: int
    reserved_bytes: int

    @property
    def active(self) -> bool:
        """Whether it is working: nothing of it may move."""


def make_room(
    budget: DeviceBudget,
    sessions: Iterable[Holder],
    features_bytes: int,
    needed_bytes: int,
    wanted: Holder | None = None,
) -> None:
    """Move idle caches away, least recently used first, until `needed_bytes` fit on the device.

    `wanted` is the session that needs them; its own cache stays where it is. Raises `BudgetExceeded`, with nothing
    moved, when what is running leaves too little.
    """
    others = [session for session in sessions if session is not wanted]
    running = sum(max(s.reserved_bytes, s.kv.device_bytes) for s in others if s.active)
    free = budget.device_bytes - features_bytes - running
    if needed_bytes > free:
        raise BudgetExceeded(needed_bytes, max(free, 0))
    idle = sorted((s for s in others if not s.active and s.kv.device_bytes), key=lambda s: s.last_used)
    held = sum(s.kv.device_bytes for s in idle)
    for session in idle:
        if held + needed_bytes <= free:
            return
        held -= session.kv.device_bytes
        _leave_device(budget, others, session)


def clear_device(budget: DeviceBudget, sessions: Iterable[Holder]) -> None:
    """Move all idle caches away, to the host where it has memory for them."""
    others = list(sessions)
    for session in sorted((s for s in others if not s.active and s.kv.device_bytes), key=lambda s: s.last_used):
        try:
            _leave_device(budget, others, session)
        except (RuntimeError, MemoryError):
            session.kv.drop()


def _leave_device(budget: DeviceBudget, sessions: list[Holder], session: Holder) -> None:
    """Park a cache, and let the least recently used parked ones go cold where the host is full."""
    bytes_there = session.kv.length * session.kv.shape.token_bytes
    parked = sorted((s for s in sessions if s.kv.host_bytes), key=lambda s: s.last_used)
    held = sum(s.kv.host_bytes for s in parked)
    for other in parked:
        if held + bytes_there <= budget.host_bytes or other.last_used > session.last_used:
            break
        held -= other.kv.host_bytes
        other.kv.drop()
    if held + bytes_there <= budget.host_bytes:
        session.kv.park()
    else:
        session.kv.drop()
