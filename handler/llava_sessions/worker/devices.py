"""The device of each engine, by the configuration and the GPUs of the machine. Imports neither torch nor CUDA."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..config import HandlerConfig

# The driver's own count: it respects CUDA_VISIBLE_DEVICES, also with UUIDs and MIG devices. In a process of its own, so
# that the worker does not initialize CUDA.
_COUNT = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
count = ctypes.c_int()
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
print(count.value)
"""
_COUNT_LIMIT_S = 60


def engine_devices(
    config: HandlerConfig, gpu_id: int | None, workers: int, count_gpus: Callable[[], int] | None = None
) -> tuple[str, ...]:
    """Return the device of each engine, as in `EngineSettings`.

    `gpu_id`: the GPU that TorchServe assigns to this worker, or None. It counts only if there are several `workers`, or
    if `count_gpus` finds fewer than two GPUs. `count_gpus`: `visible_gpus` by default.
    """
    if config.devices is not None:
        return config.devices
    if config.device != "auto":
        return (config.device,)
    gpus = (count_gpus or visible_gpus)() if workers == 1 else 0
    if gpus > 1:
        return tuple(f"cuda:{number}" for number in range(gpus))
    return ("auto" if gpu_id is None else f"cuda:{gpu_id}",)


def device_labels(devices: Sequence[str]) -> tuple[str, ...]:
    """Return a different name of each device for metrics and logs. Several engines on the CPU are numbered."""
    if len(set(devices)) == len(devices):
        return tuple(devices)
    return tuple(f"{device}:{number}" for number, device in enumerate(devices))


def visible_gpus() -> int:
    """Return the number of GPUs that the driver shows to this process. 0 without a driver, or if torch has no CUDA."""
    if not _torch_has_cuda():
        return 0
    try:
        done = subprocess.run(
            [sys.executable, "-c", _COUNT],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COUNT_LIMIT_S,
            check=True,
        )
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def _torch_has_cuda() -> bool:
    """Return whether the installed torch is built for CUDA. Does not import torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()
