"""The launcher as a command, and whether the processes that it started live."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[2]


def alive(pids: list[int]) -> list[int]:
    """Those that still run; a zombie, which waits only to be reaped, does not."""
    running = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                running.append(pid)
        except psutil.NoSuchProcess:
            pass
    return running


def eventually(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.03)
    return True


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and its descendants, except for shells."""
    if process.poll() is not None:
        return
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() != "sh":
                child.kill()


class Command:
    """`python -m deploy.serve` with its output, and the processes that it started."""

    def __init__(self, store: Path, name: str, port: int = 0, env: dict[str, str] | None = None) -> None:
        arguments = ["--model-store", str(store), "--name", name, "--port", str(port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy.serve", *arguments],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.text = ""

    def read_until(self, words: str) -> str:
        """What it printed up to the line with these words."""
        text = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text += line
            self.text += line
            if words in line:
                return text
        raise AssertionError(f"ended without {words!r}:\n{text}")

    def wait_ready(self) -> None:
        self.read_until("Ctrl-C here stops")

    @property
    def url(self) -> str:
        return re.search(r"ready in \S+ s on (\S+)", self.text)[1]

    @property
    def home(self) -> Path:
        return Path(re.search(r"logs +(\S+)/logs", self.text)[1])

    def children(self) -> list[int]:
        """Every process below it."""
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def find(self, word: str) -> int:
        """The process below it with this word in its command line."""
        return next(pid for pid in self.children() if any(word in part for part in psutil.Process(pid).cmdline()))

    def finish(self) -> tuple[int, str]:
        """Its exit code, and the rest of its output."""
        text, _ = self.process.communicate(timeout=120)
        return self.process.returncode, text

    def end(self) -> None:
        """Kill the launcher and its processes. Its guard, a shell, lives on and removes the launcher's folder."""
        kill_tree(self.process)
        if self.process.stdout and not self.process.stdout.closed:
            self.process.communicate(timeout=120)
