"""Settings of this process for its device and its CPU cores, and the device's properties."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from .cuda.compiler_cache import choose_cache_folder


class MissingDevice(Exception):
    """The device of the configuration does not exist on this machine."""


def check_exists(device: str) -> None:
    """Raise `MissingDevice` if `device` is a CUDA device that torch does not find."""
    if device.startswith("cuda"):
        found = torch.cuda.device_count()
        if (torch.device(device).index or 0) >= found:
            raise MissingDevice(f"`llava.devices` must exist on this machine, got {device}: torch finds {found} GPUs")


def share_cores(engines: int) -> None:
    """Let torch use a part of the cores that it would use, if several engines share the machine."""
    if engines > 1:
        torch.set_num_threads(max(torch.get_num_threads() // engines, 1))


def prepare(device: torch.device) -> None:
    """Make a CUDA device the current one and choose its attention kernels. Does nothing for a CPU.

    A call that names no device, such as a question about bfloat16 or a compiled kernel, uses the current one.
    cuDNN's attention is turned off: it builds an execution plan for each length of a cache, 23 to 37 ms each on an
    H100, and torch would prefer it there. Flash attention has no plans. Triton gets a folder for compiled kernels.
    """
    if device.type != "cuda":
        return
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)
    choose_cache_folder()


def native_dtype(device: torch.device, stored: torch.dtype | None = None) -> torch.dtype:
    """Return the best precision of a device for a checkpoint whose weights are `stored`, or unknown for None.

    On CUDA float16 weights stay float16, because bfloat16 has 3 bits less. Others become bfloat16 if the device has
    instructions for it, else float16. A CPU has bfloat16 if it has instructions for it, else float32.
    """
    if device.type == "cuda":
        keeps = stored == torch.float16 or not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float16 if keeps else torch.bfloat16
    found = torch.cpu.get_capabilities()
    return torch.bfloat16 if found.get("avx512_bf16") or found.get("amx_bf16") else torch.float32


@functools.cache
def takes_grouped_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has a fast attention kernel for fewer KV heads than query heads.

    On CUDA only flash attention takes them, which needs 16-bit numbers and compute capability 8. Without it torch 2.13
    computes in float32 from repeated keys and values.
    """
    if device.type != "cuda":
        return True
    return dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(device) >= (8, 0)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy of a tensor of the CPU on a device. On CUDA the copy is asynchronous: the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all launched work. Does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reserved_bytes(device: torch.device) -> int:
    """Return the bytes that torch's allocator has taken from a CUDA device, in use or kept for reuse. 0 for a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


class Stopwatch:
    """The time of work on a device, from the creation to `stop`.

    On CUDA the times are events of the current stream: neither call waits, and what was only launched counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = _mark(device)
        self._ended = self._began

    def stop(self) -> None:
        """End the measured work."""
        self._ended = _mark(self._device)

    @property
    def ms(self) -> float:
        """Milliseconds. On CUDA the host waits for the end of the work."""
        if self._device.type != "cuda":
            return float(self._ended - self._began) * 1e3
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended))


def _mark(device: torch.device) -> Any:
    """Return the time in seconds on a CPU, and a recorded event on CUDA."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
