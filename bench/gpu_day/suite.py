"""Section "tests": the tests that need a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .day import Day, Findings

ROOT = Path(__file__).parents[2]
TESTS = "tests/engine/test_cuda.py"


def command() -> list[str]:
    """Return the command. A warning is no error: the packages' versions may be others than the pinned ones."""
    return [sys.executable, "-m", "pytest", TESTS, "-m", "cuda", "-q", "-W", "default", "-p", "no:cacheprovider"]


def run(day: Day, found: Findings) -> None:
    """Run the tests in a process of their own and note the end of their output."""
    if not day.on_cuda:
        found.notes.append("without a GPU all of them would be skipped")
        return
    day.release()
    done = subprocess.run(command(), cwd=ROOT, capture_output=True, text=True, timeout=day.section_left_s, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    found.results |= {"status": done.returncode, "summary": lines[-1:], "output": "\n".join(lines)[-12000:]}
    found.check("all tests pass", done.returncode == 0)
    day.say(" ".join(lines[-1:]))
