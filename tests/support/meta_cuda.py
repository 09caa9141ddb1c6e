"""A CUDA device without a GPU: tensors of torch's meta device, whose sizes a model of torch's allocator counts.

The sizes of temporary tensors are those of the operations that torch calls; what a kernel takes for itself is missing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from llava_sessions.engine import attention

_BLOCK_BYTES = 512  # torch's allocator rounds up to it
META = torch.device("meta")


class Card:
    """The memory of a GPU, as torch reports it: allocated to tensors, or cached by torch for reuse."""

    def __init__(self, total_bytes: int, used_bytes: int) -> None:
        """`used_bytes`: CUDA's context and the weights."""
        self.total_bytes = total_bytes
        self.used_bytes = used_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self.reserved_bytes = 0
        self.pinned_bytes = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()  # counted

    def allocate(self, size: int) -> None:
        """Take memory. What was freed is not reused: the worst case of fragments."""
        free = self.total_bytes - self.used_bytes
        if self.live_bytes + size > free:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.reserved_bytes = min(self.reserved_bytes + size, free)

    def free(self, size: int) -> None:
        """Give memory back to torch's cache."""
        self.live_bytes -= size

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Make torch report this card's memory."""
        patch.setattr(torch.cuda, "memory_allocated", lambda _=None: self.used_bytes + self.live_bytes)
        patch.setattr(torch.cuda, "memory_reserved", lambda _=None: self.used_bytes + self.reserved_bytes)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda _=None: self.used_bytes + self.peak_bytes)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _=None: self._reset_peak())
        patch.setattr(torch.cuda, "empty_cache", self._empty_cache)
        patch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))
        patch.setattr(torch.cuda, "synchronize", lambda _=None: None)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "current_stream", lambda _=None: SimpleNamespace(synchronize=lambda: None))
        patch.setattr(attention, "causal_lower_right", _uncounted(causal_lower_right))
        patch.setattr(torch.cuda, "mem_get_info", lambda _=None: (self._free_bytes(), self.total_bytes))

    def _reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def _empty_cache(self) -> None:
        self.reserved_bytes = self.live_bytes

    def _free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes - self.reserved_bytes


class _Event:
    """An event of a device that computes nothing."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        """Record the end of the launched work."""

    def synchronize(self) -> None:
        """Wait for the recorded work."""

    def elapsed_time(self, _: _Event) -> float:
        """Return the milliseconds to another event."""
        return 0.0


class _Storages(TorchDispatchMode):
    """Counts the storages of meta tensors on a card, until each is freed."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self._card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in args:
            if isinstance(given, torch.Tensor) and given.device == META:
                self._card.known.add(given.untyped_storage())  # a weight, of which there may be views
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            query = args[0]
            out = torch.empty_like(query)  # flash attention makes no scores
        elif func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            return self._copy(args[0], args[1])
        else:
            out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, torch.Tensor) and part.device == META:
                self._count(part.untyped_storage())
        return out

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Copy between host and device: with gaps on the device torch makes a copy without gaps there."""
        on_device = target if target.device == META else source
        on_host = source if target.device == META else target
        assert on_host.is_contiguous(), "torch would copy in pageable memory"
        if not on_device.is_contiguous():
            self._card.allocate(on_device.nbytes)
            self._card.free(on_device.nbytes)
        return target

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._card.known or not storage.nbytes():
            return
        size = -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
        self._card.allocate(size)
        self._card.known.add(storage)
        weakref.finalize(storage, self._card.free, size)


class _CudaIsMeta(TorchFunctionMode):
    """Replaces CUDA devices by the meta device in torch's calls, and counts pinned memory."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self._card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.pin_memory:  # token IDs and positions
            return args[0].to(META)
        if func is torch.Tensor.to and not args[0].is_floating_point() and args[0].device.type == "cpu":
            return args[0]  # sizes of pictures, which transformers reads again on the host
        if func is torch.Tensor.tolist and args[0].device == META:
            return [0] * len(args[0])  # tokens, which leave the device
        if func is torch.Tensor.__bool__ and args[0].device == META:
            return True  # such as whether all numbers are finite
        options = {name: _replaced(value) for name, value in (kwargs or {}).items()}
        is_pinned = options.pop("pin_memory", False)
        out = func(*map(_replaced, args), **options)
        if is_pinned:
            self._card.pinned_bytes += 1 << (out.nbytes - 1).bit_length()
        return out


def _uncounted(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function that runs without the modes below: they can't make a tensor of a subclass."""

    def run(*args: Any) -> torch.Tensor:
        with _disable_current_modes():
            return make(*args)

    return run


def _replaced(value: Any) -> Any:
    return META if isinstance(value, torch.device) and value.type == "cuda" else value


@contextmanager
def meta_cuda(card: Card) -> Iterator[None]:
    """Run torch's calls for a CUDA device on the meta device, and count their memory on the card."""
    with _CudaIsMeta(card), _Storages(card):
        yield
