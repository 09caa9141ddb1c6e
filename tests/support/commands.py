"""Run the launcher as a command, and look at its processes."""

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

from deploy.serve.ports import free_ports, is_free

REPO = Path(__file__).resolve().parents[2]


def alive(pids: list[int]) -> list[int]:
    """Return the process IDs that still run. A zombie does not."""
    running = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                running.append(pid)
        except psutil.NoSuchProcess:
            pass
    return running


def eventually(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    """Return True as soon as the condition holds, or False after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.03)
    return True


def free_row() -> int:
    """Return a port that is free together with the next two: `--port N` takes all three."""
    return next(number for number in free_ports(20) if is_free(number + 1) and is_free(number + 2))


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
    """`python -m deploy.serve` as a process, with its output and its descendants."""

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
        """Return the output up to the line that contains `words`. Raise `AssertionError` if there is none."""
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
        """Return the process IDs of all descendants."""
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def find(self, word: str) -> int:
        """Return the descendant whose command line contains `word`."""
        return next(pid for pid in self.children() if any(word in part for part in psutil.Process(pid).cmdline()))

    def finish(self) -> tuple[int, str]:
        """Wait for the end. Return the exit code and the rest of the output."""
        text, _ = self.process.communicate(timeout=120)
        return self.process.returncode, text

    def end(self) -> None:
        """Kill the launcher and its processes. Its guard, a shell, survives and removes the launcher's folder."""
        kill_tree(self.process)
        if self.process.stdout and not self.process.stdout.closed:
            self.process.communicate(timeout=120)
