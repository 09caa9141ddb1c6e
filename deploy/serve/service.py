"""HAProxy on the public port, one TorchServe behind it, and both restarted when they die.

`make serve` and the container run it. On SIGTERM or SIGINT the worker drains: it admits no more work and finishes the
running turns. Then TorchServe is stopped, and HAProxy last.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploy.versions import HeldArchive

from .configuration import hold_archive, model_version
from .engine_watch import EngineWatch, engine_is_absent
from .haproxy import HAProxy
from .home import ServerHome
from .ports import choose_ports
from .processes import LOOPBACK, Guard, ServeError
from .torchserve import TorchServe

POLL_S = 0.1
# Seconds before each restart. Device memory of a killed process can take a while to be free again.
DELAYS_S = (0.0, 1.0, 2.0, 5.0, 10.0)
STEADY_S = 60.0  # after this time of service the delays start again from the first
# SageMaker kills a container 30 s after SIGTERM. The worker stops running turns so early that their last lines leave
# after 25 s (LAST_LINES_S in handler/llava_sessions/worker/manager.py).
DRAIN_S = 26.0
JAVA_STOP_S = 2.0
ANSWERS_OUT_S = 1.0


class Service:
    """One TorchServe that is restarted when it dies, behind a HAProxy that stays.

    `run` serves until `stop` is called (by a signal handler) or until a restart fails. Without HAProxy, TorchServe
    itself listens on the public port. `ready`, `url`, `server` and `haproxy` may be read from another thread.
    """

    def __init__(
        self,
        model_store: Path,
        name: str = "llava",
        *,
        haproxy: str | None,
        port: int = 0,
        host: str = LOOPBACK,
        safe_ports: range | None = None,
        home: Path | None = None,
        ready_timeout_s: float = 600,
        delays_s: Sequence[float] = DELAYS_S,
        reports: bool = True,
        **server_options: Any,
    ) -> None:
        """`haproxy` is its path, or None. All ports but the public one are from `safe_ports`, if it is given.

        `reports`: print the progress, and how to use the server. Errors are always printed. `server_options` are
        further options of `TorchServe`.
        """
        if haproxy is None and host != LOOPBACK:
            raise ServeError(f"serving on {host} needs HAProxy; scripts/need_haproxy.sh prints how to install it")
        self._model_store = model_store
        self._name = name
        self._haproxy_path = haproxy
        self._port = port
        self._host = host
        self._safe_ports = safe_ports
        self._requested_home = home
        self._ready_timeout_s = ready_timeout_s
        self._delays_s = delays_s
        self._report: Callable[[str], None] = _print if reports else _ignore
        self._server_options = server_options
        self._stopped_by = ""
        self._deaths = 0  # since the server last ran for STEADY_S
        self._failed_starts = 0  # in a row
        self._engine = EngineWatch()
        self.ready = False
        self.haproxy: HAProxy | None = None
        self.server: TorchServe | None = None
        self.url = ""

    def stop(self, reason: str) -> None:
        """End `run` in order; a second call ends it at once. Safe in a signal handler."""
        if not self._stopped_by:
            self._stopped_by = reason
            return
        for process in (self.server, self.haproxy):
            if process is not None:
                process.kill()

    def run(self) -> int:
        """Serve. Return the exit code: 0 after `stop`, 1 if the model does not start, or not again."""
        try:
            home = ServerHome.make(self._requested_home)
        except (ServeError, OSError) as err:
            print(f"error: --home: {err}", file=sys.stderr, flush=True)
            return 1
        guard = Guard(home.folder if home.is_temporary else None)
        archive: HeldArchive | None = None
        try:
            # Held until the end: a server that is restarted serves the same model, whatever is packed meanwhile.
            archive = hold_archive(Path(self._model_store), self._name)
            self._report(f"starting TorchServe with {archive.path} ...")
            self._start_haproxy(home, guard, model_version(archive.path))
            while not self._stopped_by:
                self._run_server_once(archive.path.parent)
            began = time.monotonic()
            self._report(f"\n{self._stopped_by}: stopping ...")
            self._shut_down(home)
            self._report(f"stopped in {time.monotonic() - began:.1f} s")
            return 0
        except ServeError as err:
            print(f"error: {err}", file=sys.stderr, flush=True)
            return 1
        finally:
            for process in (self.server, self.haproxy):
                if process is not None:
                    process.kill()
                    process.stop()
            guard.release()
            home.remove(keep_logs=self.server is not None and self.server.has_failed)
            if archive is not None:
                archive.release()

    def _start_haproxy(self, home: ServerHome, guard: Guard, version: str) -> None:
        public = "front" if self._haproxy_path else "inference"
        ports = choose_ports(self._port, public, self._safe_ports)
        self.url = f"http://{LOOPBACK}:{ports[public]}"
        self._server_options |= {"ports": ports, "home": home.folder, "guard": guard}
        if self._haproxy_path:
            self.haproxy = HAProxy(
                self._haproxy_path,
                home.folder,
                guard,
                port=ports["front"],
                target=ports["inference"],
                metrics=ports["worker_metrics"],
                name=self._name,
                version=version,
                host=self._host,
            )
            self.haproxy.start()

    # --- starts and deaths --------------------------------------------------------------------------------------------

    def _run_server_once(self, model_store: Path) -> None:
        """Run TorchServe from its start to its death or to `stop`. Raise `ServeError` if a restart is useless."""
        if self._deaths:
            self._pause(self._delays_s[min(self._deaths, len(self._delays_s)) - 1])
        if self._stopped_by:
            return
        server = self.server = TorchServe(model_store, self._name, **self._server_options)
        try:
            server.start()
            seconds = self._wait_ready(server)
        except ServeError as err:
            if self._stopped_by:  # `stop` killed it
                return
            self._failed_starts += 1
            # A model that was never ready will not start on a second attempt, and the user is waiting for the reason.
            if not self._deaths or self._failed_starts == len(self._delays_s):
                raise
            self._clear_away(server, str(err))
            return
        if seconds is None:
            return
        ready_at = time.monotonic()
        self._failed_starts = 0
        self._announce_ready(server, seconds)
        reason = self._wait_death(server)
        if reason is not None:
            if time.monotonic() - ready_at > STEADY_S:
                self._deaths = 0
            self._clear_away(server, reason)

    def _wait_ready(self, server: TorchServe) -> float | None:
        """Return the seconds until the server was ready, or None if `stop` came first. Raise `ServeError`."""
        deadline = time.monotonic() + self._ready_timeout_s
        while not self._stopped_by:
            if (seconds := server.poll_ready()) is not None:
                self._set_ready(True)
                return seconds
            if time.monotonic() > deadline:
                raise server.timeout_error(self._ready_timeout_s)
            self._pause(POLL_S)
        return None

    def _wait_death(self, server: TorchServe) -> str | None:
        """Return why the server died, or None if `stop` came first."""
        while not self._stopped_by:
            if (reason := server.death()) is not None:
                return reason
            # While the worker has no engine, and for a while after an engine that was lost again, /ping is 503.
            if self._engine.observe(engine_is_absent(server.home / "tmp"), time.monotonic()):
                self._set_ready(self.ready)
            self._pause(POLL_S)
        return None

    def _clear_away(self, server: TorchServe, reason: str) -> None:
        """Kill the rest of a dead server. Requests that wait for it end with an error."""
        self._set_ready(False)
        server.kill()
        server.stop()
        self._deaths += 1
        print(f"error: {reason}\nrestarting TorchServe ...", file=sys.stderr, flush=True)

    def _set_ready(self, ready: bool) -> None:
        self.ready = ready
        if self.haproxy is not None:
            with contextlib.suppress(OSError):  # HAProxy has died: `_keep_haproxy` sets the state of the next one
                self.haproxy.set_engine_absent(self._engine.is_avoided)
                self.haproxy.open() if ready else self.haproxy.shut()

    def _pause(self, seconds: float) -> None:
        """Wait. Meanwhile restart HAProxy if it dies; return at once after `stop`."""
        until = time.monotonic() + seconds
        while not self._stopped_by:
            self._keep_haproxy()
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, POLL_S))

    def _keep_haproxy(self) -> None:
        if self.haproxy is not None and not self.haproxy.alive:
            print("error: HAProxy died; restarting it ...", file=sys.stderr, flush=True)
            self.haproxy.start()
            self._set_ready(self.ready)

    # --- shutting down ------------------------------------------------------------------------------------------------

    def _shut_down(self, home: ServerHome) -> None:
        """Let running turns finish, then stop TorchServe, and HAProxy last."""
        if self.server is not None:
            if self.ready:
                self._drain(self.server, home.temp)
            self.server.stop(JAVA_STOP_S)
        if self.haproxy is not None:
            self.haproxy.stop()

    def _drain(self, server: TorchServe, temp: Path) -> None:
        """Drain the workers (SIGUSR1). Wait until each has drained or ended, and until its answers have been sent.

        A worker that has drained writes the file `drained-PID` into `temp`.
        """
        if self.haproxy is not None:
            with contextlib.suppress(OSError):
                self.haproxy.drain()
        waiting = server.worker_pids()
        for pid in waiting:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + DRAIN_S
        while waiting and time.monotonic() < deadline:
            time.sleep(0.05)
            living = server.worker_pids()
            waiting = [pid for pid in waiting if pid in living and not (temp / f"drained-{pid}").exists()]
        deadline = time.monotonic() + ANSWERS_OUT_S
        while self._in_flight() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _in_flight(self) -> int:
        try:
            return self.haproxy.in_flight() if self.haproxy is not None else 0
        except OSError:
            return 0

    def _announce_ready(self, server: TorchServe, seconds: float) -> None:
        if self._deaths:
            self._report(f"ready again in {seconds:.1f} s")
            return
        self._report(f"ready in {seconds:.1f} s on {self.url}")
        if self.haproxy is not None:
            self._report(f"  TorchServe {server.url}")
        self._report(
            f"  management {server.management_url}\n  metrics    {server.metrics_url}, {server.worker_metrics_url}"
        )
        openai_url = f"{self.url}/v1" if self.haproxy is not None else server.openai_url
        self._report(f"  logs       {server.log_path.parent}\n\n{usage(self.url, openai_url)}")


def _print(text: str) -> None:
    print(text, flush=True)


def _ignore(_text: str) -> None:
    pass


def usage(url: str, openai_url: str) -> str:
    """Return commands to paste (open a session with a picture, ask, close), and the base URL of OpenAI clients."""
    curl = "curl -sN $URL -H 'Content-Type: application/json'"
    session = '-H "X-Amzn-SageMaker-Session-Id: $ID"'
    return f"""In another terminal, with any picture.png:

  URL={url}/invocations
  # open a session with the picture, and keep its ID
  ID=$(printf '{{"type":"start_session","image":"%s"}}' "$(base64 < picture.png | tr -d '\\n')" |
    {curl} -d @- | sed -n 's/.*"session_id": *"\\([^"]*\\)".*/\\1/p')
  # ask, as often as you like; the answer is streamed
  {curl} {session} \\
    -d '{{"type":"send_text_prompt","prompt_text":"What is in the picture?","stream":true}}'
  # close the session
  {curl} {session} -d '{{"type":"close_session"}}'

OpenAI clients: base_url {openai_url}, any key

Ctrl-C here stops the server."""
