"""The conditions of a measurement: machine, versions, CPU use of other processes, and current memory bandwidth."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

_OMP = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_CPU_MEBIBYTES = 256
_CUDA_MEBIBYTES = 2048  # 0.6 ms on an H100: a smaller tensor measures the launches as well
_FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def facts(device: torch.device) -> dict:
    """Return the machine and the versions, for the head of a table."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "transformers": importlib.metadata.version("transformers"),
        "torch_threads": torch.get_num_threads(),
        "omp": {name: os.environ[name] for name in _OMP if name in os.environ} or "defaults",
    }


def _commit() -> str | None:
    """Return the measured commit, with a plus if tracked files differ from it. None without git."""
    root = Path(__file__).parents[1]
    ask = ["git", "describe", "--always", "--dirty=+", "--abbrev=7"]
    try:
        return subprocess.run(ask, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    entries = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line)
    flags = [flag for flag in _FEATURES if flag in entries.get("flags", "").split()]
    return f"{entries.get('model name', platform.processor())} ({', '.join(flags[:2])})"


class Neighbours:
    """CPU use of other processes between two moments, as a share of all cores.

    The processes that this one started, such as a server, are not other processes. Report while they still run: the
    time of a killed process is lost.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._load = os.getloadavg()[0]
        self._busy, self._total, self._own = self._read()

    def report(self) -> dict:
        """Return the load average at the start and now, and other processes' share of the CPU time between them."""
        busy, total, own = self._read()
        others = (busy - self._busy) - (own - self._own)
        return {
            "load_average": [round(self._load, 2), round(os.getloadavg()[0], 2)],
            "cpu_share_of_others": round(max(others, 0.0) / max(total - self._total, 1e-9), 3),
        }

    def _read(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        total = sum(times[:8])  # the user time includes guest times
        return total - times.idle - getattr(times, "iowait", 0.0), total, own_cpu_s(self._process)


def own_cpu_s(process: psutil.Process) -> float:
    """Return the CPU time of a process, of the processes that it has started, and of those that have ended."""
    used = 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
    return used


class Bandwidth:
    """Best measured read and copy bandwidth of the device in bytes per second.

    Reading is measured as the sum over a tensor much larger than any cache. A copy reads and writes. On CUDA events of
    the device's queue measure the time: a host that waits for each pass adds 20 us to it.
    """

    def __init__(self, device: torch.device, mebibytes: int | None = None) -> None:
        """`mebibytes`: size of the tensor. None: 2 GiB on CUDA, 256 MiB on a CPU."""
        self._device = device
        size = mebibytes or (_CUDA_MEBIBYTES if device.type == "cuda" else _CPU_MEBIBYTES)
        self._source = torch.ones(size * 2**18, device=device)
        self._target = torch.empty_like(self._source)
        self.read_bytes_s = 0.0
        self.copy_bytes_s = 0.0

    def measure(self, repeats: int = 5) -> float:
        """Measure for some tenths of a second; return the best read bandwidth of these repeats in bytes per second."""
        size = self._source.nbytes
        read = 0.0
        for _ in range(repeats):
            read = max(read, size / self._time(lambda: self._source.sum()))
            self.copy_bytes_s = max(self.copy_bytes_s, 2 * size / self._time(lambda: self._target.copy_(self._source)))
        self.read_bytes_s = max(self.read_bytes_s, read)
        return read

    def facts(self) -> dict:
        """Return the bandwidths in GB/s, for the table."""
        return {"read": round(self.read_bytes_s / 1e9, 1), "copy": round(self.copy_bytes_s / 1e9, 1)}

    def _time(self, work: Callable[[], object]) -> float:
        """Return the seconds of one pass."""
        if self._device.type == "cuda":
            return _events_s(work)
        synchronize(self._device)
        began = time.perf_counter()
        work()
        synchronize(self._device)
        return time.perf_counter() - began


def _events_s(work: Callable[[], object]) -> float:
    """Return the seconds of work on the current CUDA device, between two events of its queue."""
    began = torch.cuda.Event(enable_timing=True)
    ended = torch.cuda.Event(enable_timing=True)
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work. Does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_set_bytes() -> int:
    """Return the resident set size of this process."""
    return psutil.Process().memory_info().rss
