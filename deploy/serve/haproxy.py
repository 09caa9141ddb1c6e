"""The HAProxy in front of one TorchServe: its process, and the state of the server behind it.

`sessions.cfg` and `front.cfg` are its rules. HAProxy starts with the server closed, so that /ping answers 503 from the
first moment. `Service` opens the server when the model is ready.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from .configuration import CORS_VARIABLE, cors_origins, has_public_metrics
from .logs import tail
from .processes import LOOPBACK, Guard, ServeError, kill_group

HERE = Path(__file__).resolve().parent
CONFIGS = (HERE / "sessions.cfg", HERE / "front.cfg")
BODY_LIMIT = HERE / "body_limit.lua"
MIN_HAPROXY = (2, 6)
SERVERS = ("torchserve/local", "large/local")  # backends and servers in front.cfg
METRICS_TARGET = "METRICS_TARGET"  # variable in front.cfg: the port of the worker's page, if /metrics is public
START_TIMEOUT_S = 10.0


class HAProxy:
    """One HAProxy on `host`:`port`, which passes requests to TorchServe's inference port `target` on loopback.

    OpenAI's paths (/v1/...) go to the model `name` of this `version`. /metrics is the worker's page at its loopback
    port `metrics`, if the environment makes it public.
    """

    def __init__(
        self,
        haproxy: str,
        home: Path,
        guard: Guard,
        *,
        port: int,
        target: int,
        metrics: int | None = None,
        name: str = "llava",
        version: str = "1.0",
        host: str = LOOPBACK,
    ) -> None:
        self.url = f"http://{LOOPBACK}:{port}"
        self._haproxy = haproxy
        self._home = home
        self._log = home / "logs" / "haproxy.log"
        self._guard = guard
        self._variables = {
            "FRONT_HOST": host,
            "FRONT_PORT": str(port),
            "FRONT_TARGET": str(target),
            "MODEL_NAME": quote(name, safe=""),
            "MODEL_VERSION": quote(version, safe=""),
            "BODY_LIMIT": str(BODY_LIMIT),
            "SESSIONS_RUN": str(home),
        }
        self._metrics = metrics
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process ID of the running HAProxy."""
        if self._process is None:
            raise ServeError("HAProxy is not started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether HAProxy runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start or restart HAProxy. Return when it answers. Raise `ServeError`."""
        self.stop(timeout_s=0)
        env = dict(os.environ)
        if not cors_origins(env):
            env.pop(CORS_VARIABLE, None)
        env.pop(METRICS_TARGET, None)
        if self._metrics is not None and has_public_metrics(env):
            env[METRICS_TARGET] = str(self._metrics)
        command = [self._haproxy, "-db"]
        for config in CONFIGS:
            command += ["-f", str(config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**env, **self._variables},
                start_new_session=True,
            )
        self._guard.watch(self._process.pid)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServeError("HAProxy does not start\n" + "\n".join(tail(self._log, 10)))
            time.sleep(0.02)

    def open(self) -> None:
        """Let requests pass to the server."""
        self._set_state("ready")

    def shut(self) -> None:
        """Answer /ping and all requests with 503."""
        self._set_state("maint")

    def drain(self) -> None:
        """Answer /ping with 404, so that a balancer sends no new sessions. Requests still pass."""
        self._command("experimental-mode on; set var proc.draining bool(true)")

    def set_engine_absent(self, absent: bool) -> None:
        """While the engine is absent answer /ping with 503. Requests still pass."""
        self._command(f"experimental-mode on; set var proc.engine_absent bool({str(absent).lower()})")

    def in_flight(self) -> int:
        """Return the number of requests whose answer the client has not yet received in full."""
        rows = csv.DictReader(self._command("show stat").removeprefix("# ").splitlines())
        backends = {server.split("/")[0] for server in SERVERS}
        return sum(int(row["scur"]) for row in rows if row["svname"] == "BACKEND" and row["pxname"] in backends)

    def stop(self, timeout_s: float = 1) -> None:
        """Stop HAProxy; answers in flight have `timeout_s` to reach their clients. May be called again."""
        process = self._process
        if process is None:
            return
        if timeout_s and process.poll() is None:
            process.send_signal(signal.SIGUSR1)  # HAProxy's soft stop
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)
        self.kill()
        process.wait()
        self._guard.done(process.pid)
        self._process = None

    def kill(self) -> None:
        """Kill HAProxy. Safe in a signal handler; `stop` cleans up."""
        if self._process is not None:
            kill_group(self._process.pid)

    def _set_state(self, state: str) -> None:
        self._command("; ".join(f"set server {server} state {state}" for server in SERVERS))

    def _answers(self) -> bool:
        try:
            return "Version" in self._command("show info")
        except OSError:
            return False

    def _command(self, line: str) -> str:
        """Send a line to HAProxy's socket. Return the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self._home / "admin.sock"))
            connection.sendall(f"{line}\n".encode())
            return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()


def find_haproxy() -> str | None:
    """Return the path of HAProxy, or None if it is missing or too old."""
    for haproxy in filter(None, [shutil.which("haproxy"), "/usr/sbin/haproxy"]):  # not on a plain user's PATH
        with contextlib.suppress(OSError):
            text = subprocess.run([haproxy, "-v"], capture_output=True, text=True, timeout=60, check=False).stdout
            version = re.search(r"version (\d+)\.(\d+)", text)
            if version and (int(version[1]), int(version[2])) >= MIN_HAPROXY:
                return haproxy
    return None
