"""The KV cache of one session: resident on the device, offloaded to the host, or cold.

A cold cache holds nothing; a prefill computes it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from .formats.int8 import dequantize, quantize
from .kv_pool import KVBlock, KVPool

# A cache grows on the device in steps of this number of tokens.
GROWTH_TOKENS = 256
_SCALE_BYTES = 4

Tier = Literal["resident", "offloaded", "cold"]


@dataclass(frozen=True)
class KVShape:
    """Dimensions, precision and device of the KV caches of one model.

    `dtype`: of the keys and values that are written and read. `kv_dtype`: of the stored numbers, `torch.int8`, or None
    for `dtype`.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    kv_dtype: torch.dtype | None = None

    @property
    def is_int8(self) -> bool:
        """Whether keys and values are stored in int8, with a float32 scale for each token and head."""
        return self.kv_dtype == torch.int8

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers, with their scales."""
        return sum(math.prod(size) * dtype.itemsize for dtype, size in self.layout(1))

    def layout(self, tokens: int) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
        """Return type and dimensions of each part of a cache with room for `tokens` tokens.

        The first part has the numbers, `[layers, 2, kv_heads, tokens, head_dim]`. In int8 a second part has their
        scales, `[layers, 2, kv_heads, tokens]`.
        """
        heads = (self.layers, 2, self.kv_heads, tokens)
        if self.is_int8:
            return (torch.int8, (*heads, self.head_dim)), (torch.float32, heads)
        return ((self.dtype, (*heads, self.head_dim)),)

    def device_bytes(self, tokens: int) -> int:
        """Return the bytes that a cache of `tokens` tokens takes on the device, rounded up to a growth step."""
        return rounded_up(tokens) * self.token_bytes

    def empty(self, capacity: int) -> torch.Tensor:
        """Return new memory for `capacity` tokens on the device, `[bytes]` uint8. Its contents are undefined."""
        return torch.empty(capacity * self.token_bytes, dtype=torch.uint8, device=self.device)

    def parts(self, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return views of `memory`, `[bytes]` uint8 for a whole number of tokens: its parts, one after another."""
        views = []
        start = 0
        for dtype, size in self.layout(memory.nbytes // self.token_bytes):
            end = start + math.prod(size) * dtype.itemsize
            views.append(memory[start:end].view(dtype).view(size))
            start = end
        return tuple(views)

    @property
    def pins_host_memory(self) -> bool:
        """Whether offloaded caches are in pinned memory."""
        return self.device.type == "cuda"

    def host_bytes(self, tokens: int) -> int:
        """Return the bytes that a cache of `tokens` tokens takes on the host.

        Torch rounds each pinned block up to a power of two and keeps it for reuse when it is freed. All blocks of a
        part have the same size, that of one growth step. Therefore the pinned memory never exceeds the most that was in
        use at one time.
        """
        if not self.pins_host_memory:
            return tokens * self.token_bytes
        steps = -(-tokens // GROWTH_TOKENS)
        sizes = (math.prod(size) * dtype.itemsize for dtype, size in self.layout(GROWTH_TOKENS))
        return steps * sum(1 << (size - 1).bit_length() for size in sizes)


class SessionKV:
    """Keys and values of one session in one contiguous block of memory, in the layout of `KVShape.parts`.

    The capacity grows in steps of `GROWTH_TOKENS`, so most forwards allocate nothing. Memory beyond `length` holds any
    numbers, also NaN, and must not be read.

    In int8 each key and value is quantized when it is written, and attention reads the quantized ones, those of the new
    tokens too. Therefore growing, offloading, restoring and forking change no number that attention reads.
    """

    def __init__(self, shape: KVShape, pool: KVPool | None = None) -> None:
        """Make a cold cache. `pool`: where its memory comes from, on a CPU; None: from torch."""
        self.shape = shape
        self.length = 0
        self._pool = pool
        # All written by `_use` only. `on_device`, the first part, is public so that a test can check where it is.
        self._block: KVBlock | None = None
        self._parts = self.shape.parts(self.shape.empty(0))
        self.on_device = self._parts[0]
        # Blocks of consecutive tokens, each with the parts of `KVShape.layout`, or None unless offloaded.
        self.on_host: list[tuple[torch.Tensor, ...]] | None = None
        self._host_tokens = 0  # of all blocks; more than `length` after a crop

    @property
    def device_bytes(self) -> int:
        """Bytes on the device, including the unused capacity."""
        return self.capacity * self.shape.token_bytes

    @property
    def address(self) -> int:
        """Address of the block on the device. Valid until the capacity changes."""
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
            _copy_on_device(self._parts, self.shape.parts(grown), self.length)
        self._use(grown, block)

    def write(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values, `[kv_heads, tokens, head_dim]` each, from token `start` on, in reserved capacity."""
        end = start + keys.shape[1]
        for which, new in enumerate((keys, values)):
            for part, numbers in zip(self._parts, quantize(new) if self.shape.is_int8 else (new,), strict=True):
                part[layer, which, :, start:end] = numbers

    def read(self, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first `length` keys and values of a layer, `[1, kv_heads, length, head_dim]` each, in `dtype`.

        They are views of the cache, in int8 new tensors.
        """
        if self.shape.is_int8:
            numbers, scales = (part[layer, :, :, :length] for part in self._parts)
            keys, values = dequantize(numbers, scales, self.shape.dtype)
        else:
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
            _copy_on_device(donor._parts, self._parts, tokens)
        else:
            _copy_to_device(donor.on_host, self._parts, tokens)
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
            layout = self.shape.layout(tokens)
            block = tuple(torch.empty(size, dtype=dtype, device="cpu", pin_memory=pin) for dtype, size in layout)
            for source, target in zip(self._parts, block, strict=True):
                for layer, values in enumerate(source[:, :, :, start : start + tokens]):
                    target[layer].copy_(values, non_blocking=pin)
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
        _copy_to_device(self.on_host, self.shape.parts(device), self.length)
        self._use(device, block)
        self.on_host = None

    def drop(self) -> None:
        """Free all memory: the cache is cold."""
        self.length = 0
        self._use(self.shape.empty(0))
        self.on_host = None

    def _use(self, memory: torch.Tensor, block: KVBlock | None = None) -> None:
        """Replace the memory on the device, and give the old block back to the pool."""
        old = self._block
        self._parts = self.shape.parts(memory)
        self.on_device = self._parts[0]
        self._block = block
        if old is not None and self._pool is not None:
            self._pool.give_back(old)


def _allocate(shape: KVShape, pool: KVPool | None, capacity: int) -> tuple[torch.Tensor, KVBlock | None]:
    """Return memory of the pool with its block, or of torch. Its contents are undefined."""
    if pool is None:
        return shape.empty(capacity), None
    block = pool.take(capacity * shape.token_bytes)
    return block.memory, block


def rounded_up(tokens: int) -> int:
    """Return the smallest multiple of `GROWTH_TOKENS` that is at least `tokens`."""
    return -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS


def _copy_on_device(sources: tuple[torch.Tensor, ...], targets: tuple[torch.Tensor, ...], tokens: int) -> None:
    """Copy the first `tokens` tokens of each part."""
    for source, target in zip(sources, targets, strict=True):
        target[:, :, :, :tokens].copy_(source[:, :, :, :tokens])


def _copy_to_device(blocks: list[tuple[torch.Tensor, ...]], targets: tuple[torch.Tensor, ...], tokens: int) -> None:
    """Copy the blocks that hold the first `tokens` tokens, one layer at a time. The last block is copied whole."""
    start = 0
    for block in blocks:
        if start >= tokens:
            return
        end = start + block[0].shape[3]
        for source, target in zip(block, targets, strict=True):
            for layer, values in enumerate(source):
                target[layer, :, :, start:end].copy_(values, non_blocking=True)
        start = end
