"""The log, the commands and the error of the image test."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.container.image import ImageError


class CheckError(RuntimeError):
    """The image does not behave as it must. The message says how it behaved."""


class Log:
    """Steps on the terminal and in a file, with the seconds since the start."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Print and record a step."""
        line = f"{time.monotonic() - self._began:6.1f} s  {text}"
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


def run(command: Sequence[str]) -> str:
    """Run a command and return its output. Raise `ImageError` with its last lines."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise ImageError(f"{' '.join(command[:2])} ended with {done.returncode}\n{last}")
    return done.stdout.strip()
