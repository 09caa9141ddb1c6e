"""Memory for weights that the engine packs: in huge pages where the system has them.

A step reads all weights once. With pages of 4 KiB the CPU looks up hundreds of times as many pages.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

_HUGE_PAGE_BYTES = 2 * 2**20
# Weights share chunks of this size, so that the last huge page of each is used by the next one.
_CHUNK_BYTES = 64 * 2**20
_ALIGNMENT = 4096


class WeightMemory:
    """Hands out memory from chunks. A chunk is unmapped when no tensor uses it. Not thread-safe."""

    def __init__(self) -> None:
        """Make it without a chunk."""
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy. Raises MemoryError."""
        size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if len(self._chunk) < size:
            self._chunk = _mapped(max(size, _CHUNK_BYTES))
        place, self._chunk = self._chunk[:size], self._chunk[size:]
        copied = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return copied.copy_(tensor)


weight_memory = WeightMemory()


def _mapped(size: int) -> torch.Tensor:
    """Return at least `size` bytes of new memory from a huge page's boundary on."""
    size = -(-size // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    try:
        mapping = mmap.mmap(-1, size + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"can't map {size} bytes for weights: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES
    return whole[start : start + size]
