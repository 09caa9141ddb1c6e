"""The model server that `make web` starts: TorchServe behind HAProxy, in a thread of this process."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from deploy.serve.haproxy import find_haproxy
from deploy.serve.processes import ServeError
from deploy.serve.service import Service

_POLL_S = 0.1


class LocalServer:
    """A packed model, served on a free port. A server that dies is restarted."""

    def __init__(self, model_store: Path, name: str, *, timeout_s: float) -> None:
        """`timeout_s`: time that the model may take to load. Raise `ServeError` if it cannot be served."""
        self._service = Service(model_store, name, haproxy=find_haproxy(), ready_timeout_s=timeout_s, reports=False)
        self._thread = threading.Thread(target=self._service.run, name="model-server")

    @property
    def url(self) -> str:
        """The public URL."""
        return self._service.url

    def start(self, progress: Callable[[float], None]) -> None:
        """Start and wait until the model is ready. `progress` receives the seconds so far. Raise `ServeError`."""
        began = time.monotonic()
        self._thread.start()
        while not self._service.ready:
            self._thread.join(_POLL_S)
            if not self._thread.is_alive():
                raise ServeError("the model server has ended; the lines above say why")
            progress(time.monotonic() - began)

    def stop(self) -> None:
        """Stop in order: running answers finish first."""
        if self._thread.is_alive():
            self._service.stop("the page's server ends")
            self._thread.join()


class Progress:
    """One line about a wait: rewritten in place on a terminal, and written once elsewhere."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._shown = -1
        self._on_terminal = sys.stdout.isatty()
        if not self._on_terminal:
            print(f"{text} ...", flush=True)

    def __call__(self, seconds: float) -> None:
        """Show the seconds so far."""
        if self._on_terminal and int(seconds) != self._shown:
            self._shown = int(seconds)
            print(f"\r{self._text} ... {self._shown} s", end="", flush=True)

    def end(self) -> None:
        """Clear the line."""
        if self._on_terminal:
            print("\r\033[K", end="", flush=True)
