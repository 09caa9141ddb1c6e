"""Parts of sections that need a process of their own: settings of torch's allocator, and a lost device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import faults, memory
from .day import Day

CHILDREN: dict[str, Callable[[Day], dict[str, Any]]] = {
    "memory": memory.measure,
    "shortage": faults.shortage,
    "lost": faults.lost,
}
_RESULT = "RESULT "


def serve(name: str, device: torch.device, smoke: bool, limit_s: float) -> None:
    """Run a part in this process and print its result. Called in the child."""
    result = CHILDREN[name](Day(device, Path(), limit_s, smoke))
    print(_RESULT + json.dumps(result, default=str), flush=True)


def run(day: Day, name: str, more: Mapping[str, str] | None = None) -> tuple[dict[str, Any], int]:
    """Run a part in a new process with `more` environment variables; return its result and exit status.

    In a smoke run the part runs in this process. Raises RuntimeError, with the end of the output, without a result.
    """
    if day.smoke:
        return CHILDREN[name](day), 0
    left_s = day.section_left_s
    command = [sys.executable, "-m", "bench.gpu_day", "--child", name, "--device", str(day.device)]
    command += ["--limit", f"{left_s:.0f}"]
    done = subprocess.run(
        command, env={**os.environ, **(more or {})}, capture_output=True, text=True, timeout=left_s, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if not lines:
        raise RuntimeError(f"{name} ended with {done.returncode}: {(done.stdout + done.stderr)[-4000:]}")
    return json.loads(lines[-1].removeprefix(_RESULT)), done.returncode
