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
SERVE_PORT, ENDPOINT_PORT, WEB_PORT = 8080, 8090, 8100
# `make test` has checked these two before. In a checkout that it has not seen, they would install packages.
SKIPPED = ("--old-file=env", "--old-file=java")


class Server:
    """A command in the copy of the checkout, in the foreground until it is stopped."""

    def __init__(self, command: list[str], folder: Path, ready: str, port: int, **variables: str) -> None:
        self.port = port
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

    @property
    def pid(self) -> int:
        """The process ID of the command."""
        return self._process.pid

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send Ctrl-C, as a reader does, or another signal. Return the exit code."""
        if self._process.poll() is not None:
            return self._process.returncode
        # A terminal sends Ctrl-C to all processes of the command.
        (os.killpg if number == signal.SIGINT else os.kill)(self.pid, number)
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
def served(checkout: Path) -> Iterator[Server]:
    """Run `make serve` in its foreground."""
    port = free_row()
    server = Server(["make", *SKIPPED, "serve"], checkout, "Ctrl-C here stops", port, PORT=str(port))
    yield server
    server.stop()


@pytest.fixture(scope="package")
def endpoint(checkout: Path, served: Server) -> Iterator[Server]:
    """Run the last command of `make endpoint` on the model that `make serve` has packed."""
    port = free_row()
    words = ["--model-store", "model_store", "--instances", "1", "--port", str(port)]
    command = [str(checkout / ".venv/bin/python"), "-m", "deploy.local_endpoint", *words]
    server = Server(command, checkout, "Ctrl-C", port)
    yield server
    server.stop()


@pytest.fixture(scope="package")
def web_page(checkout: Path, served: Server) -> Iterator[Server]:
    """Run `make web` with the server of `make serve`."""
    port = free_row()
    variables = [f"ENDPOINT=http://127.0.0.1:{served.port}", f"WEB_PORT={port}"]
    server = Server(["make", *SKIPPED, "web", *variables], checkout, "web chat: ", port)
    yield server
    server.stop()
