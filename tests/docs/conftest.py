"""Servers of the pages: a copy of the checkout in which `make serve` and the local endpoint run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import free_row
from tests.support.snippets import ROOT

# What a clone does not have.
NOT_CLONED = (".git", ".venv*", ".cache", ".*_cache", ".hypothesis", "__pycache__", "logs", "model_store", "site")
SERVE_PORT, ENDPOINT_PORT = 8080, 8090
# `make test` has checked these two before. In a checkout that it has not seen, they would install packages.
SKIPPED = ("--old-file=env", "--old-file=java")


class Server:
    """A command in the copy of the checkout, in the foreground until it is stopped."""

    def __init__(self, command: list[str], folder: Path, ready: str, **variables: str) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.text = ""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.text += line
            if ready in line:
                return
        raise AssertionError(f"{' '.join(command)} ended without {ready!r}:\n{self.text}")

    def stop(self) -> int:
        """Send Ctrl-C, as a reader does, and return the exit code."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGINT)
        text, _ = self._process.communicate(timeout=120)
        self.text += text
        return self._process.returncode


@pytest.fixture(scope="package")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the checkout as a clone has it after `make env`."""
    folder = tmp_path_factory.mktemp("clone") / "llava-sessions"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_CLONED), symlinks=True)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "model_store").mkdir()
    return folder


@pytest.fixture(scope="package")
def served(checkout: Path) -> Iterator[int]:
    """Run `make serve` and yield its port."""
    port = free_row()
    server = Server(["make", *SKIPPED, "serve"], checkout, "Ctrl-C here stops", PORT=str(port))
    yield port
    server.stop()


@pytest.fixture(scope="package")
def endpoint(checkout: Path, served: int) -> Iterator[int]:
    """Run `make endpoint`'s last command on the model that `make serve` has packed. Yield its port."""
    port = free_row()
    words = ["--model-store", "model_store", "--instances", "1", "--port", str(port)]
    server = Server([str(checkout / ".venv/bin/python"), "-m", "deploy.local_endpoint", *words], checkout, "Ctrl-C")
    yield port
    server.stop()
