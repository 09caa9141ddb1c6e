"""Memory for KV caches on a CPU: touched once, reused, and in huge pages where the system has them.

The first write to a page of new memory makes the kernel find and clear that page, which takes longer than the copy or
the prefill that writes it. Therefore a freed block stays in the pool for the next cache of its size.
`bench.open` measures an open in such memory.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import sys
import weakref

import torch

_HUGE_PAGE_BYTES = 2 * 2**20
# `touch_ahead` touches this much in one call: 1 to 20 ms.
_TOUCH_BYTES = 8 * 2**20
_SMALL_PAGE_BYTES = 4096
# linux/mman.h, since Linux 5.14. Python 3.11 has no name for it.
_MADV_POPULATE_WRITE = 23


class KVBlock:
    """One contiguous block of memory, `[bytes]` uint8. A free block holds old keys and values."""

    def __init__(self, size: int) -> None:
        """Map `size` bytes. Raises MemoryError."""
        self.memory, self._mapping, self._start = _map(size)
        # By `touch`. A cache touches no more of its block than it writes, so a block that was used counts as untouched.
        self.touched_bytes = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.memory.nbytes

    def touch(self, size: int) -> None:
        """Make the kernel provide the pages of the next `size` bytes. Does not change their contents.

        Raises MemoryError.
        """
        size = min(size, self.nbytes - self.touched_bytes)
        start = self.touched_bytes
        self.touched_bytes += size
        if self._mapping is not None and sys.platform == "linux":
            first = (self._start + start) // _SMALL_PAGE_BYTES * _SMALL_PAGE_BYTES
            try:
                self._mapping.madvise(_MADV_POPULATE_WRITE, first, self._start + start + size - first)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # else a kernel that does not know the advice
                    raise MemoryError(f"can't touch {size} bytes: {error}") from error
        self.memory[start : start + size : _SMALL_PAGE_BYTES].add_(0)


class KVPool:
    """Free blocks of KV memory, by size. Not thread-safe.

    A block serves only caches of exactly its size. `limit_bytes`: most bytes of the blocks in use and the free blocks
    together. Free blocks are unmapped if they exceed it, oldest first.
    """

    def __init__(self) -> None:
        """Make an empty pool without a limit."""
        self.limit_bytes = 2**63
        # Sizes of the blocks that `touch_ahead` keeps ready: one free block of each, if the limit allows it.
        self.usual_sizes: tuple[int, ...] = ()
        self._free: list[KVBlock] = []  # in the order in which they were freed
        # Weak: a block that an error or a removed session has left is unmapped by Python.
        self._used: weakref.WeakSet[KVBlock] = weakref.WeakSet()

    @property
    def free_bytes(self) -> int:
        """Bytes of the free blocks."""
        return sum(block.nbytes for block in self._free)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks in use."""
        return sum(block.nbytes for block in self._used)

    def take(self, size: int) -> KVBlock:
        """Return a block of `size` bytes: the one of this size that was freed last, or a new one.

        Raises MemoryError. Free blocks of other sizes are then unmapped.
        """
        block = self._pop(size) or self._map(size)
        self._used.add(block)
        return block

    def give_back(self, block: KVBlock) -> None:
        """Take a block that no cache uses any more. Its memory is kept if the limit allows it."""
        self._used.discard(block)
        block.touched_bytes = 0
        self._free.append(block)
        self.trim()

    def trim(self, new_bytes: int = 0) -> None:
        """Unmap free blocks until `new_bytes` more keep the limit."""
        excess = self.used_bytes + self.free_bytes + new_bytes - self.limit_bytes
        while excess > 0 and self._free:
            excess -= self._free.pop(0).nbytes

    def clear(self) -> None:
        """Unmap all free blocks."""
        self._free.clear()

    @property
    def may_touch_ahead(self) -> bool:
        """Whether `touch_ahead` has work."""
        return self._next_to_touch() is not None

    def touch_ahead(self) -> None:
        """Touch a part of a free block of a usual size. The block is made first if there is none.

        Raises MemoryError.
        """
        size = self._next_to_touch()
        if size is None:
            return
        block = self._pop(size) or KVBlock(size)
        self._free.append(block)
        block.touch(_TOUCH_BYTES)

    def _next_to_touch(self) -> int | None:
        """Return the first usual size of which no free block is touched, if the limit allows one."""
        for size in self.usual_sizes:
            block = next((each for each in reversed(self._free) if each.nbytes == size), None)
            if block is not None and block.touched_bytes < size:
                return size
            if block is None and self.used_bytes + self.free_bytes + size <= self.limit_bytes:
                return size
        return None

    def _pop(self, size: int) -> KVBlock | None:
        """Remove and return the free block of `size` bytes that was freed last, or None."""
        for at in reversed(range(len(self._free))):
            if self._free[at].nbytes == size:
                return self._free.pop(at)
        return None

    def _map(self, size: int) -> KVBlock:
        self.trim(size)
        try:
            return KVBlock(size)
        except MemoryError:
            self.clear()
            return KVBlock(size)


def _map(size: int) -> tuple[torch.Tensor, mmap.mmap | None, int]:
    """Return `size` bytes of new memory with its mapping and its start there; torch's memory has no mapping.

    All whole huge pages of the memory are asked to be huge pages; the rest is not, because it would be larger than
    `size`. Raises MemoryError.
    """
    if not hasattr(mmap, "MAP_PRIVATE") or not size:  # not a POSIX system
        return torch.empty(size, dtype=torch.uint8), None, 0
    huge_bytes = size // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    slack_bytes = _HUGE_PAGE_BYTES if huge_bytes else 0
    try:
        mapping = mmap.mmap(-1, size + slack_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"can't map {size} bytes: {error}") from error
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES if huge_bytes else 0
    if huge_bytes and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE, start, huge_bytes)
    return whole[start : start + size], mapping, start
