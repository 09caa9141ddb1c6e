"""CPU time and context switches of the parts of a service that this process has started.

Linux only. The CPU time of a process includes threads that have ended. Context switches are counted over living threads
alone, so threads that end during a measurement are missing from the count of their process. `ALL` counts the switches
of the whole machine, without such gaps.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

JAVA, WORKER, ENGINE, HAPROXY, LAUNCHER = PARTS = ("java", "worker", "engine", "haproxy", "launcher")
ALL = "machine"
# A word of the command line of each part. The first part that matches counts.
_WORDS = {
    ENGINE: "llava_sessions.engine.process",
    WORKER: "model_service_worker.py",
    JAVA: "org.pytorch.serve.ModelServer",
    HAPROXY: "haproxy",
    LAUNCHER: "deploy.serve",
}


@dataclass
class Usage:
    """Seconds of CPU time and number of context switches, by part, over `wall_s` seconds."""

    wall_s: float
    cpu_s: dict[str, float] = field(default_factory=dict)
    switches: dict[str, int] = field(default_factory=dict)

    def __sub__(self, earlier: Usage) -> Usage:
        """Return the usage between two readings."""
        cpu_s = {part: value - earlier.cpu_s.get(part, 0.0) for part, value in self.cpu_s.items()}
        switches = {part: value - earlier.switches.get(part, 0) for part, value in self.switches.items()}
        return Usage(self.wall_s - earlier.wall_s, cpu_s, switches)


class Meter:
    """Reads the usage of the processes that exist when the meter is made."""

    def __init__(self) -> None:
        """Find the parts among the descendants of this process."""
        self._processes: list[tuple[str, psutil.Process]] = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline())
                part = next((part for part, word in _WORDS.items() if word in words), None)
                if part is not None:
                    self._processes.append((part, process))

    def read(self) -> Usage:
        """Return the usage until now."""
        usage = Usage(time.perf_counter(), {}, {ALL: _machine_switches()})
        for part, process in self._processes:
            with contextlib.suppress(psutil.Error, OSError):
                times = process.cpu_times()
                usage.cpu_s[part] = usage.cpu_s.get(part, 0.0) + times.user + times.system
                usage.switches[part] = usage.switches.get(part, 0) + _switches(process.pid)
        return usage


def own_cpu_s() -> float:
    """Return the CPU time of this process in seconds."""
    return time.process_time()


def _switches(pid: int) -> int:
    """Return the context switches of the living threads of a process."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):  # the thread has ended
            lines = status.read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if "ctxt_switches:" in line)
    return total


def _machine_switches() -> int:
    """Return the context switches of the machine since its start."""
    lines = Path("/proc/stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("ctxt "))
