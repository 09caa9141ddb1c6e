"""The limits of this machine or container: memory, shared memory, disk, processes, CPU features, GPU."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from .findings import MIB

_ROOT = Path("/")
_BFLOAT16 = ("avx512_bf16", "amx_bf16")  # flags with which the engine chooses bfloat16 (engine/device.py)


@dataclass(frozen=True)
class Memory:
    """Bytes of memory in all and free. `limit`: what sets the total."""

    total: int
    free: int
    limit: str

    @classmethod
    def read(cls, root: Path = _ROOT) -> Memory:
        """Return the machine's memory, or that of the control group if that is less."""
        machine = psutil.virtual_memory()
        memory = cls(machine.total, machine.available, "the machine")
        group = root / "sys" / "fs" / "cgroup"
        for folder, limit, usage, cache in (
            (group, "memory.max", "memory.current", "inactive_file"),
            (group / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):  # no such version of cgroup, or "max"
                most = int((folder / limit).read_text())
                if most < memory.total:
                    used = int((folder / usage).read_text()) - _stat(folder / "memory.stat", cache)
                    memory = cls(most, min(memory.free, max(most - used, 0)), f"the control group ({folder / limit})")
        return memory


def _stat(path: Path, key: str) -> int:
    """Return a value of memory.stat, 0 if it is absent. Cached file pages are freed when memory is needed."""
    with contextlib.suppress(OSError):
        match = re.search(rf"^{key} (\d+)$", path.read_text(), re.MULTILINE)
        return int(match[1]) if match else 0
    return 0


def most_processes(root: Path = _ROOT) -> int | None:
    """Return how many further processes and threads the control group allows, or None if it has no limit."""
    group = root / "sys" / "fs" / "cgroup"
    for folder in (group, group / "pids"):
        with contextlib.suppress(OSError, ValueError):
            return int((folder / "pids.max").read_text()) - int((folder / "pids.current").read_text())
    return None


def has_bfloat16(root: Path = _ROOT) -> bool:
    """Return whether the CPU has instructions for bfloat16."""
    try:
        text = (root / "proc" / "cpuinfo").read_text()
    except OSError:
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return bool(flags and set(_BFLOAT16) & set(flags[1].split()))


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it."""

    name: str
    driver: str
    total: int
    free: int


def gpus(path: str) -> list[Gpu] | None:
    """Return the NVIDIA GPUs, or None if there is no driver. `path`: where nvidia-smi is searched for."""
    program = shutil.which("nvidia-smi", path=path)
    if program is None:
        return None
    command = [program, "--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        rows = list(csv.reader(done.stdout.splitlines(), skipinitialspace=True))
        return [Gpu(name, driver, *_gpu_memory(total, free)) for name, driver, total, free in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _gpu_memory(total: str, free: str) -> tuple[int, int]:
    """Return the bytes of a GPU's memory in all and free. A GPU that shares the machine's memory has no numbers."""
    if total == free == "[N/A]":
        memory = Memory.read()
        return memory.total, memory.free
    return int(total) * MIB, int(free) * MIB


def torch_cuda() -> str | None:
    """Return the CUDA version of the installed torch, None if it is built for the CPU. Does not import torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^cuda\b[^=]*= '([\d.]+)'", text, re.MULTILINE)
    return version[1] if version else None
