"""The Python workers of one TorchServe: whether they load, are ready, or have died."""

from __future__ import annotations

import http.client
import json
import time

import psutil

from .java import JavaProcess
from .logs import ServerLogs
from .processes import LOOPBACK, ServeError

# Java starts the worker process a moment after it listens. A worker that has run before is missed sooner.
FIRST_WORKER_S = 10.0
LOST_WORKER_S = 0.5


class Workers:
    """The workers of a model, seen through TorchServe's management API, the processes and the log."""

    def __init__(self, model: str, management_port: int, java: JavaProcess, logs: ServerLogs) -> None:
        self._model = model
        self._management_port = management_port
        self._java = java
        self._logs = logs
        self._started_at = time.monotonic()
        self._seen_at = 0.0
        self._ready: list[psutil.Process] = []

    def pids(self) -> list[int]:
        """Return the process IDs of the live workers, without the processes that they started."""
        return sorted(worker.pid for worker in self._processes())

    def poll_ready(self) -> bool:
        """Return whether all workers have loaded the model. Raise `ServeError` if the load has failed.

        /ping is no help: TorchServe answers it with 200 long before that, and also after a failed load.
        """
        statuses = self._statuses()
        if statuses and set(statuses) == {"READY"}:
            self._ready = self._processes()
            return True
        if statuses is not None and self._load_failed(statuses):
            self._logs.wait_for_last_lines()
            raise ServeError(f"the model {self._model!r} failed to load\n{self._logs.reason()}")
        return False

    def all_alive(self) -> bool:
        """Return whether every worker that was ready still runs."""
        return bool(self._ready) and all(map(_is_alive, self._ready))

    def _processes(self) -> list[psutil.Process]:
        try:
            return [child for child in psutil.Process(self._java.pid).children() if _is_worker(child)]
        except psutil.NoSuchProcess:
            return []

    def _statuses(self) -> list[str] | None:
        """Return the state of each worker: empty if TorchServe could not load the model, None while it starts."""
        connection = http.client.HTTPConnection(LOOPBACK, self._management_port, timeout=5)
        try:
            connection.request("GET", f"/models/{self._model}")
            reply = connection.getresponse()
            body = reply.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if reply.status == http.client.NOT_FOUND:
            return []
        if reply.status != http.client.OK:
            return None
        return [worker["status"] for worker in json.loads(body)[0]["workers"]]

    def _load_failed(self, statuses: list[str]) -> bool:
        """Return whether the model has no workers, or its worker died.

        TorchServe reports a loading and a dead worker alike as UNLOADING and starts no second one in sequence batching.
        Therefore the process is looked for.
        """
        if not statuses or self._logs.startup_errors():
            return True
        if self._processes():
            self._seen_at = time.monotonic()
            return False
        has_run = self._seen_at > 0 or bool(self._logs.new_lines(self._logs.model, 1))
        patience_s = LOST_WORKER_S if has_run else FIRST_WORKER_S
        return time.monotonic() - max(self._seen_at, self._started_at) > patience_s


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any(part.endswith("model_service_worker.py") for part in process.cmdline())
    except psutil.Error:
        return False
