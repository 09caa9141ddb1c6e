"""The KV cache of one session: resident on the device, offloaded to the host, or cold.

A cold cache holds nothing; a prefill computes it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .kv_pool import KVBlock, KVPool

# A cache grows on the device in steps of this number of tokens.
GROWTH_TOKENS = 256

Tier = Literal["resident", "offloaded", "cold"]


@dataclass(frozen=True)
class KVShape:
    """Dimensions, precision and device of the KV caches of one model."""

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
        """Return the bytes that a cache of `tokens` tokens takes on the device, rounded up to a growth step."""
        return rounded_up(tokens) * self.token_bytes

    def size(self, capacity: int) -> tuple[int, int, int, int, int]:
        """Return the dimensions of a cache with room for `capacity` tokens."""
        return (self.layers, 2, self.kv_heads, capacity, self.head_dim)

    def empty(self, capacity: int) -> torch.Tensor:
        """Return new memory for `capacity` tokens on the device. Its contents are undefined."""
        return torch.empty(self.size(capacity), dtype=self.dtype, device=self.device)

    @property
    def pins_host_memory(self) -> bool:
        """Whether offloaded caches are in pinned memory."""
        return self.device.type == "cuda"

    def host_bytes(self, tokens: int) -> int:
        """Return the bytes that a cache of `tokens` tokens takes on the host.

        Torch rounds each pinned block up to a power of two and keeps it for reuse when it is freed. All blocks have the
        same size, one growth step. Therefore the pinned memory never exceeds the most that was in use at one time.
        """
        if not self.pins_host_memory:
            return tokens * self.token_bytes
        block_bytes = self.device_bytes(1)
        return -(-tokens // GROWTH_TOKENS) * (1 << (block_bytes - 1).bit_length())


class SessionKV:
    """Keys and values of one session in one contiguous tensor `[layers, 2, kv_heads, capacity, head_dim]`.

    The capacity grows in steps of `GROWTH_TOKENS`, so most forwards allocate nothing. Memory beyond `length` holds any
    numbers, also NaN, and must not be read.
    """

    def __init__(self, shape: KVShape, pool: KVPool | None = None) -> None:
        """Make a cold cache. `pool`: where its memory comes from, on a CPU; None: from torch."""
        self.shape = shape
        self.length = 0
        self._pool = pool
        # Both written by `_use` only. `on_device` is public so that a test can check where the memory is.
        self._block: KVBlock | None = None
        self.on_device = self.shape.empty(0)
        # Blocks `[layers, 2, kv_heads, tokens, head_dim]` of consecutive tokens, or None unless offloaded.
        self.on_host: list[torch.Tensor] | None = None
        self._host_tokens = 0  # of all blocks; more than `length` after a crop

    @property
    def device_bytes(self) -> int:
        """Bytes on the device, including the unused capacity."""
        return self.on_device.nbytes

    @property
    def address(self) -> int:
        """Address of the device tensor. Valid until the capacity changes."""
        return self.on_device.data_ptr()

    @property
    def capacity(self) -> int:
        """Tokens for which memory is allocated on the device."""
        return self.on_device.shape[3]

    @property
    def host_bytes(self) -> int:
        """Bytes on the host. 0 unless the cache is offloaded."""
        return 0 if self.on_host is None else self.shape.host_bytes(self._host_tokens)

    @property
    def tier(self) -> Tier:
        """Where the cache is."""
        if self.on_host is not None:
            return "offloaded"
        return "resident" if self.length else "cold"

    def reserve(self, tokens: int) -> None:
        """Grow the capacity to at least `tokens` tokens.

        Raises torch's out-of-memory error; the stored tokens are then unchanged.
        """
        if tokens <= self.capacity:
            return
        if not self.length:
            self._use(self.shape.empty(0))  # nothing to copy
        grown, block = _allocate(self.shape, self._pool, rounded_up(tokens))
        if self.length:
            grown[:, :, :, : self.length].copy_(self.on_device[:, :, :, : self.length])
        self._use(grown, block)

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values, `[kv_heads, tokens, head_dim]` each, from token `start` on, in reserved capacity."""
        end = start + keys.shape[1]
        self.on_device[layer, 0, :, start:end] = keys
        self.on_device[layer, 1, :, start:end] = values

    def read(self, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the first `length` keys and values of a layer, `[1, kv_heads, length, head_dim]` each."""
        keys, values = self.on_device[layer, :, :, :length]
        return keys[None], values[None]

    def crop(self, length: int) -> None:
        """Discard all tokens after the first `length`.

        Frees whole blocks on the host, and nothing on the device, where the next tokens need it.
        """
        if length >= self.length:
            return
        self.length = length
        if self.on_host is not None:
            blocks = -(-length // GROWTH_TOKENS)
            self._host_tokens = min(self._host_tokens, blocks * GROWTH_TOKENS)
            self.on_host = self.on_host[:blocks] or None

    def fork(self, donor: SessionKV, tokens: int) -> None:
        """Copy the first `tokens` tokens of a resident or offloaded cache into this cold one.

        Raises torch's out-of-memory error; this cache is then still cold.
        """
        self.reserve(tokens)
        if donor.on_host is None:
            self.on_device[:, :, :, :tokens].copy_(donor.on_device[:, :, :, :tokens])
        else:
            _copy_to_device(donor.on_host, self.on_device, tokens)
        self.length = tokens

    def offload(self) -> None:
        """Move the used part to the host, in pinned memory if the device is a GPU.

        Raises torch's out-of-memory error; the cache is then still resident. The copy runs layer by layer: a copy from
        memory with gaps makes a copy without gaps on the device first.
        """
        pin = self.shape.pins_host_memory
        blocks = []
        for start in range(0, self.length, GROWTH_TOKENS):
            # A pinned block is filled whole. With gaps in the target as well, torch would copy in pageable memory.
            tokens = GROWTH_TOKENS if pin else min(self.length - start, GROWTH_TOKENS)
            source = self.on_device[:, :, :, start : start + tokens]
            block = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=pin)
            for layer, values in enumerate(source):
                block[layer].copy_(values, non_blocking=pin)
            blocks.append(block)
        if pin:
            torch.cuda.current_stream(self.shape.device).synchronize()
        self.on_host = blocks
        self._host_tokens = self.length
        self._use(self.shape.empty(0))

    def restore(self, tokens: int = 0) -> None:
        """Copy an offloaded cache back, with room for `tokens` tokens. Does nothing for a resident or cold one.

        Raises torch's out-of-memory error; the cache is then still offloaded. The copy runs layer by layer, as in
        `offload`.
        """
        if self.on_host is None:
            return
        device, block = _allocate(self.shape, self._pool, rounded_up(max(tokens, self.length)))
        _copy_to_device(self.on_host, device, self.length)
        self._use(device, block)
        self.on_host = None

    def drop(self) -> None:
        """Free all memory: the cache is cold."""
        self.length = 0
        self._use(self.shape.empty(0))
        self.on_host = None

    def _use(self, device: torch.Tensor, block: KVBlock | None = None) -> None:
        """Replace the memory on the device, and give the old block back to the pool."""
        old = self._block
        self.on_device = device
        self._block = block
        if old is not None and self._pool is not None:
            self._pool.give_back(old)


def _allocate(shape: KVShape, pool: KVPool | None, capacity: int) -> tuple[torch.Tensor, KVBlock | None]:
    """Return memory of the pool with its block, or of torch. Its contents are undefined."""
    if pool is None:
        return shape.empty(capacity), None
    block = pool.take(capacity * shape.token_bytes)
    return block.memory.view(shape.dtype).view(shape.size(capacity)), block


def rounded_up(tokens: int) -> int:
    """Return the smallest multiple of `GROWTH_TOKENS` that is at least `tokens`."""
    return -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS


def _copy_to_device(blocks: list[torch.Tensor], device: torch.Tensor, tokens: int) -> None:
    """Copy the blocks that hold the first `tokens` tokens, one layer at a time. The last block is copied whole."""
    start = 0
    for block in blocks:
        if start >= tokens:
            return
        end = start + block.shape[3]
        for layer, values in enumerate(block):
            device[layer, :, :, start:end].copy_(values, non_blocking=True)
        start = end
