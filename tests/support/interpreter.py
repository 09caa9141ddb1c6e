"""Tests with Triton's interpreter, in a process of their own: Triton reads its variable when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_REPO = Path(__file__).resolve().parents[2]


def check_interpreted(*files: str) -> None:
    """Run test files of tests/engine and assert that their tests pass, at least one of them."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *(f"tests/engine/{f}" for f in files)],
        cwd=_REPO,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
