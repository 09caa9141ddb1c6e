"""Pack the demo model and run real servers of it: bare, or behind the launcher that restarts a dead server."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy.pack import PackJob, pack_model
from deploy.serve.haproxy import find_haproxy
from deploy.serve.service import Service
from deploy.serve.torchserve import TorchServe
from tests.support.server_metrics import wait_for_metrics

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "models" / "shapes"
# Seconds on a quiet machine; minutes where many others compute.
START_S = 600
ENGINE = "llava_sessions.engine.process"


def pack(folder: Path, sessions: int = 64, dtype: str = "float32", model: Path = SHAPES, **settings: object) -> Path:
    """Pack a model into a model store under `folder`. `settings` are keys of the `llava:` section.

    The model runs on the CPU, on one engine unless `settings` has `devices`.

    Without trying to load it, which would take seconds each time; tests/unit/test_pack.py does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = (ROOT / "handler" / "model-config.yaml").read_text()
    for key, value in settings.items():
        config, found = re.subn(rf"^( +){key}:.*$", rf"\g<1>{key}: {value}", config, flags=re.MULTILINE)
        assert found == 1, key
    (folder / "config.yaml").write_text(config)
    job = PackJob(
        model=str(model),
        dtype=dtype,
        device=None if "devices" in settings else "cpu",
        sessions=sessions,
        config=folder / "config.yaml",
        output=folder / "store",
        try_loading=False,
    )
    pack_model(job)
    return job.output


@contextlib.contextmanager
def running(*servers: TorchServe) -> Iterator[list[TorchServe]]:
    """Start servers side by side, yield them when all are ready, and kill them at the end.

    Java takes two seconds to stop in order. `tests/server/test_serve.py` tests that it does.
    """
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(START_S)
        yield list(servers)
    finally:
        kill(*servers)


def kill(*servers: TorchServe) -> None:
    """Kill servers and remove what they leave behind."""
    for server in servers:
        server.kill()
        server.stop()


@dataclass(frozen=True)
class Processes:
    """The processes of a server: Java frontend, worker, engine."""

    java: psutil.Process
    worker: psutil.Process
    engine: psutil.Process

    @classmethod
    def of(cls, server: TorchServe) -> Processes:
        """Return the processes that run now. Raise `ValueError` if one is missing."""
        (pid,) = server.worker_pids()
        worker = psutil.Process(pid)
        (engine,) = [child for child in worker.children() if ENGINE in child.cmdline()]
        return cls(psutil.Process(server.pid), worker, engine)

    @property
    def pids(self) -> dict[str, int]:
        """The process IDs by role."""
        return {role: process.pid for role, process in vars(self).items()}

    def sample(self) -> dict[str, dict[str, int]]:
        """Return the memory, threads and open files of each process."""
        found = {}
        for role, process in vars(self).items():
            with process.oneshot():
                rss, threads = process.memory_info().rss, process.num_threads()
            found[role] = {"rss_bytes": rss, "threads": threads, "files": process.num_fds()}
        return found


class Served:
    """The launcher of `make serve` and of the container in a thread: HAProxy, and a server that it restarts."""

    def __init__(self, store: Path, env: dict[str, str] | None = None) -> None:
        # A failed test prints the handler's log lines.
        options = {"env": env, "log_level": "info", "ready_timeout_s": START_S}
        self._service = Service(store, haproxy=find_haproxy(), **options)
        self._launcher = threading.Thread(target=self._service.run, name="launcher", daemon=True)

    @property
    def url(self) -> str:
        """The URL of HAProxy, which stays when the server is restarted."""
        return self._service.url

    @property
    def server(self) -> TorchServe:
        """The server that runs or starts."""
        return self._service.server

    @property
    def worker_pid(self) -> int:
        """The process ID of the Python worker."""
        (pid,) = self.server.worker_pids()
        return pid

    @property
    def engine_pid(self) -> int | None:
        """The process ID of the engine, or None while there is no engine."""
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):
            return Processes.of(self.server).engine.pid
        return None

    @property
    def engine_pids(self) -> list[int]:
        """The process IDs of all engines, those that start included."""
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):
            children = psutil.Process(self.worker_pid).children()
            return sorted(child.pid for child in children if ENGINE in child.cmdline())
        return []

    def gauges(self, timeout_s: float = 20, **expected: float) -> dict[str, float]:
        """Return the metrics once those in `expected` have these values, or as they are after `timeout_s`."""
        return wait_for_metrics(self.server.metrics_url, timeout_s, **expected)

    def log(self) -> str:
        """Return the log of workers and engines."""
        return self.server.log_path.read_text()

    def signal_engine(self, number: signal.Signals) -> int:
        """Send a signal to the engine as soon as there is one. Return its process ID."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            pid = self.engine_pid
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                    return pid
            time.sleep(0.02)
        raise AssertionError("there is no engine process")

    def lose_server(self, kill: Callable[[], None]) -> float:
        """Run `kill`, which ends the server. Return the seconds until the launcher has the next server ready."""
        began, dead = time.monotonic(), self.server
        kill()
        self._wait(lambda: self.server is not dead and self._service.ready)
        return time.monotonic() - began

    def start(self) -> None:
        """Start the launcher and wait until its server is ready."""
        self._launcher.start()
        self._wait(lambda: self._service.ready)

    def stop(self) -> None:
        """Kill the server and wait for the launcher."""
        self._service.stop("the test is over")
        self._service.stop("the test is over")
        self._launcher.join()

    def _wait(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + START_S
        while not done():
            assert self._launcher.is_alive(), "the launcher has ended"
            assert time.monotonic() < until, "no server became ready"
            time.sleep(0.05)

    def __enter__(self) -> Served:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
