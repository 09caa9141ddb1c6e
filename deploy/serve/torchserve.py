"""Start, watch and stop one TorchServe, for `Service`, the local endpoint, the demo and the tests."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from deploy.versions import HeldArchive

from .configuration import (
    CONFIG,
    METRICS_PORT_VARIABLE,
    check_headers,
    hold_archive,
    model_version,
    render_properties,
    worker_env,
)
from .home import ServerHome
from .java import JavaProcess, java_command
from .logs import ServerLogs
from .ports import choose_ports
from .processes import LOOPBACK, Guard, ServeError
from .workers import Workers


@dataclass(frozen=True)
class _Running:
    """The parts of a started server."""

    archive: HeldArchive
    home: ServerHome
    logs: ServerLogs
    java: JavaProcess
    workers: Workers
    started_at: float


class TorchServe:
    """One TorchServe (Java frontend and its workers) with its own home folder, ports and process group.

    `with TorchServe(store) as server:` starts it, waits until the model is ready, and stops it at the end. `home` is
    the folder for temporary files, logs and the rendered configuration; without it, a temporary folder is used. `ports`
    come from `choose_ports`. `guard` may watch other processes as well. `properties` and `env` are changes to
    config.properties and to the workers' environment.
    """

    def __init__(
        self,
        model_store: Path,
        name: str = "llava",
        *,
        ports: Mapping[str, int] | None = None,
        home: Path | None = None,
        guard: Guard | None = None,
        env: Mapping[str, str] | None = None,
        config: Path = CONFIG,
        quiet: bool = True,
        properties: Mapping[str, str] | None = None,
        java_options: Sequence[str] = (),
        log_level: str = "warn",
    ) -> None:
        self.model_store = Path(model_store).resolve()
        self.name = name
        self.ports = dict(ports or choose_ports())
        self.url = f"http://{LOOPBACK}:{self.ports['inference']}"
        self.management_url = f"http://{LOOPBACK}:{self.ports['management']}"
        self.metrics_url = f"http://{LOOPBACK}:{self.ports['metrics']}/metrics"
        self.worker_metrics_url = f"http://{LOOPBACK}:{self.ports['worker_metrics']}/metrics"
        self.openai_url = ""  # the base URL of OpenAI's paths, once the server has started
        self._requested_home = home
        self._guard = guard
        self._env = dict(env or {})
        self._config = Path(config)
        self._quiet = quiet
        self._properties = dict(properties or {})
        self._java_options = list(java_options)
        self._log_level = log_level
        self._running: _Running | None = None
        self.has_failed = False  # to become ready; its logs are kept

    @property
    def pid(self) -> int:
        """The process ID of the Java frontend, which leads the process group."""
        return self._require_started().java.pid

    @property
    def home(self) -> Path:
        """The folder of this server."""
        return self._require_started().home.folder

    @property
    def log_path(self) -> Path:
        """The log with the worker's output, including the handler's log lines."""
        return self._require_started().logs.model

    def worker_pids(self) -> list[int]:
        """Return the process IDs of the live Python workers, without the processes that they started."""
        return self._require_started().workers.pids()

    def start(self) -> None:
        """Start the processes and return at once; `wait_ready` waits for the model. Raise `ServeError`."""
        if self._running is not None:
            raise ServeError("the server is already started")
        archive = hold_archive(self.model_store, self.name)
        home = ServerHome.make(self._requested_home)
        home.clear_temp()
        logs = ServerLogs(home.logs)
        java = JavaProcess(home, self._guard, quiet=self._quiet)
        workers = Workers(self.name, self.ports["management"], java, logs)
        self._running = _Running(archive, home, logs, java, workers, started_at=time.monotonic())
        try:
            # A restarted server has the same ports: HAProxy finds the page of the next worker too.
            env = worker_env(home, {METRICS_PORT_VARIABLE: str(self.ports["worker_metrics"]), **self._env})
            properties = render_properties(self._config, self.ports, self._properties)
            check_headers(properties, env)
            version = model_version(archive.path)
            self.openai_url = f"{self.url}/predictions/{quote(self.name, safe='')}/{quote(version, safe='')}/v1"
            config = home.folder / "config.properties"
            config.write_text("".join(f"{key}={value}\n" for key, value in properties.items()), encoding="utf-8")
            command = java_command(
                home, config, archive.path, self.name, options=self._java_options, log_level=self._log_level
            )
            java.start(command, env)
        except BaseException:
            self.stop()
            raise

    def poll_ready(self) -> float | None:
        """Return the seconds from the start until now if the model is ready, else None.

        Raise `ServeError` if the model will not become ready.
        """
        running = self._require_started()
        try:
            if (code := running.java.exit_code()) is not None:
                raise ServeError(f"TorchServe stopped while starting (exit code {code})\n{running.logs.reason()}")
            return time.monotonic() - running.started_at if running.workers.poll_ready() else None
        except ServeError as error:
            self.has_failed = True
            raise _with_logs(str(error), running.logs) from error

    def wait_ready(self, timeout_s: float = 120) -> float:
        """Wait until the model is ready. Return the seconds since the start. Raise `ServeError`."""
        deadline = time.monotonic() + timeout_s
        while (seconds := self.poll_ready()) is None:
            if time.monotonic() > deadline:
                raise self.timeout_error(timeout_s)
            time.sleep(0.1)
        return seconds

    def timeout_error(self, timeout_s: float) -> ServeError:
        """Return the error for a model that is not ready after this time."""
        logs = self._require_started().logs
        self.has_failed = True
        return _with_logs(f"the model {self.name!r} was not ready after {timeout_s:.0f} s\n{logs.reason()}", logs)

    def death(self) -> str | None:
        """Return why a server that was ready can no longer serve, or None while it can.

        TorchServe never restarts a worker in sequence batching: it stays up and every session hangs. Therefore a server
        without its worker counts as dead.
        """
        running = self._require_started()
        if (code := running.java.exit_code()) is not None:
            return f"TorchServe died (exit code {code})\n{running.logs.reason()}"
        if not running.workers.all_alive():
            return f"the worker died\n{running.logs.reason()}"
        return None

    def stop(self, timeout_s: float = 30) -> None:
        """Stop java and its workers; kill them after `timeout_s`. Delete a temporary home.

        The logs of a failed start are kept. May be called again, and for a server that never started or has died.
        """
        if self._running is not None:
            self._running.java.stop(timeout_s)
            self._running.home.remove(keep_logs=self.has_failed)
            self._running.archive.release()

    def kill(self) -> None:
        """Kill every process of the group, without waiting for it. Safe in a signal handler; `stop` cleans up."""
        if self._running is not None:
            self._running.java.kill()

    def __enter__(self) -> TorchServe:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _require_started(self) -> _Running:
        if self._running is None:
            raise ServeError("the server is not started")
        return self._running


def _with_logs(reason: str, logs: ServerLogs) -> ServeError:
    """Return the error of a failed start. Its last line names the folder of the logs, which `stop` keeps."""
    return ServeError(f"{reason}\nlogs: {logs.model.parent}")
