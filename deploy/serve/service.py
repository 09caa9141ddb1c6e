"""The service as its users meet it: HAProxy on the public port, one TorchServe behind it, and both kept alive.

Behind `make serve` and the container. Owns what happens after a death (start again, later each time, and give up in
the end) and how the service ends: on SIGTERM or SIGINT the worker takes no more work and finishes what runs, then
TorchServe goes, and HAProxy last. Must not know: how TorchServe is started and watched (`serve.py`), or what HAProxy
does to a request (`front.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from .front import Front, find_haproxy
from .processes import LOOPBACK, Guard, ServeError
from .torchserve import REPO, TorchServe, choose_ports, make_home

POLL_S = 0.1
# Seconds before each start that follows a death. Device memory of a killed process can take a while to come back.
DELAYS_S = (0.0, 1.0, 2.0, 5.0, 10.0)
STEADY_S = 60.0  # a server that lived so long begins anew with the delays
# SageMaker kills a container 30 s after SIGTERM. The worker cuts what still runs at 25 s.
DRAIN_S = 26.0
JAVA_STOP_S = 2.0
ANSWERS_OUT_S = 1.0


class Service:
    """One TorchServe that is started again when it dies, behind a HAProxy that stays.

    `run` serves until `stop` is called (by a signal handler) or until it gives up. Without HAProxy, TorchServe itself
    listens on the public port.
    """

    def __init__(
        self,
        model_store: Path,
        name: str = "llava",
        *,
        haproxy: str | None,
        port: int = 0,
        host: str = LOOPBACK,
        home: Path | None = None,
        ready_timeout_s: float = 600,
        delays_s: Sequence[float] = DELAYS_S,
        **server_options,
    ) -> None:
        """`server_options` are further ones of `TorchServe`."""
        if haproxy is None and host != LOOPBACK:
            raise ServeError(f"serving on {host} needs HAProxy; scripts/need_haproxy.sh says how to get it")
        self._store = model_store
        self._name = name
        self._haproxy = haproxy
        self._port = port
        self._host = host
        self._asked_home = home
        self._ready_timeout_s = ready_timeout_s
        self._delays_s = delays_s
        self._server_options = server_options
        self._stopped_by = ""
        self._deaths = 0  # since it last lived for a while
        self._failed_starts = 0  # in a row
        self.ready = False
        self.front: Front | None = None
        self.server: TorchServe | None = None
        self.url = ""

    def stop(self, reason: str) -> None:
        """Have `run` end; a second call has it end at once. Safe in a signal handler."""
        if not self._stopped_by:
            self._stopped_by = reason
            return
        for process in (self.server, self.front):
            if process is not None:
                process.kill()

    def run(self) -> int:
        """Serve; the exit code: 0 after `stop`, 1 when the model does not start, or not again."""
        home = make_home(self._asked_home)
        guard = Guard(home if self._asked_home is None else None)
        try:
            print(f"starting TorchServe with {Path(self._store).resolve() / self._name} ...", flush=True)
            self._start_front(home, guard)
            while not self._stopped_by:
                self._live_once()
            began = time.monotonic()
            print(f"\n{self._stopped_by}: stopping ...", flush=True)
            self._end(home)
            print(f"stopped in {time.monotonic() - began:.1f} s", flush=True)
            return 0
        except ServeError as err:
            print(f"error: {err}", file=sys.stderr, flush=True)
            return 1
        finally:
            for server in filter(None, (self.server, self.front)):
                server.kill()
                server.stop()
            guard.release()
            if self._asked_home is None:
                shutil.rmtree(home, ignore_errors=True)

    def _start_front(self, home: Path, guard: Guard) -> None:
        public = "front" if self._haproxy else "inference"
        ports = choose_ports(self._port, public)
        self.url = f"http://{LOOPBACK}:{ports[public]}"
        self._server_options |= {"ports": ports, "home": home, "guard": guard}
        if self._haproxy:
            self.front = Front(
                self._haproxy, home, guard, port=ports["front"], target=ports["inference"], host=self._host
            )
            self.front.start()

    # --- lives and deaths ---------------------------------------------------------------------------------------------

    def _live_once(self) -> None:
        """One life of TorchServe, from its start to its death or to `stop`. Raises `ServeError` when there is no use in
        another one."""
        if self._deaths:
            self._pause(self._delays_s[min(self._deaths, len(self._delays_s)) - 1])
        if self._stopped_by:
            return
        self.server = TorchServe(self._store, self._name, **self._server_options)
        try:
            self.server.start()
            seconds = self._wait_ready()
        except ServeError as err:
            if self._stopped_by:  # it did not die of itself
                return
            self._failed_starts += 1
            # What was never ready will not start the second time either, and somebody is waiting to hear why.
            if not self._deaths or self._failed_starts == len(self._delays_s):
                raise
            self._bury(str(err))
            return
        if seconds is None:
            return
        ready_at = time.monotonic()
        self._failed_starts = 0
        self._tell_ready(seconds)
        reason = self._wait_death()
        if reason is not None:
            if time.monotonic() - ready_at > STEADY_S:
                self._deaths = 0
            self._bury(reason)

    def _wait_ready(self) -> float | None:
        """Seconds that it took; None when `stop` came first. Raises `ServeError`."""
        deadline = time.monotonic() + self._ready_timeout_s
        while not self._stopped_by:
            if (seconds := self.server.poll_ready()) is not None:
                self._set_ready(True)
                return seconds
            if time.monotonic() > deadline:
                raise self.server.too_slow(self._ready_timeout_s)
            self._pause(POLL_S)
        return None

    def _wait_death(self) -> str | None:
        """Why the server died; None when `stop` came first."""
        while not self._stopped_by:
            if (reason := self.server.death()) is not None:
                return reason
            self._pause(POLL_S)
        return None

    def _bury(self, reason: str) -> None:
        """Clear away what is left of a dead server. Requests that hang on it end with java, and get a clear error."""
        self._set_ready(False)
        self.server.kill()
        self.server.stop()
        self._deaths += 1
        print(f"error: {reason}\nrestarting TorchServe ...", file=sys.stderr, flush=True)

    def _set_ready(self, ready: bool) -> None:
        self.ready = ready
        if self.front is not None:
            with contextlib.suppress(OSError):  # it has died: `_keep_front` tells the next one
                self.front.open() if ready else self.front.shut()

    def _pause(self, seconds: float) -> None:
        """Wait, with an eye on HAProxy and on `stop`."""
        until = time.monotonic() + seconds
        while not self._stopped_by:
            self._keep_front()
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, POLL_S))

    def _keep_front(self) -> None:
        if self.front is not None and not self.front.alive:
            print("error: HAProxy died; restarting it ...", file=sys.stderr, flush=True)
            self.front.start()
            self._set_ready(self.ready)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end(self, home: Path) -> None:
        """Let running answers finish; then TorchServe goes, and HAProxy last."""
        if self.ready:
            self._drain(home / "tmp")
        if self.server is not None:
            self.server.stop(JAVA_STOP_S)
        if self.front is not None:
            self.front.stop()

    def _drain(self, temp: Path) -> None:
        """Tell the workers that the end is near (SIGUSR1). Wait until each has said in `temp` that it is through, or is
        gone, and until the last answers are with their clients."""
        if self.front is not None:
            with contextlib.suppress(OSError):
                self.front.drain()
        waiting = self.server.worker_pids()
        for pid in waiting:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + DRAIN_S
        while waiting and time.monotonic() < deadline:
            time.sleep(0.05)
            living = self.server.worker_pids()
            waiting = [pid for pid in waiting if pid in living and not (temp / f"drained-{pid}").exists()]
        deadline = time.monotonic() + ANSWERS_OUT_S
        while self._in_flight() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _in_flight(self) -> int:
        try:
            return self.front.in_flight() if self.front is not None else 0
        except OSError:
            return 0

    def _tell_ready(self, seconds: float) -> None:
        if self._deaths:
            print(f"ready again in {seconds:.1f} s", flush=True)
            return
        server = self.server
        print(f"ready in {seconds:.1f} s on {self.url}", flush=True)
        if self.front is not None:
            print(f"  TorchServe {server.url}", flush=True)
        print(f"  management {server.management_url}\n  metrics    {server.metrics_url}")
        print(f"  logs       {server.log_path.parent}\n\n{usage(self.url)}", flush=True)


# --- the command line -------------------------------------------------------------------------------------------------


def usage(url: str) -> str:
    """What to type next: open with a picture, ask, close."""
    curl = "curl -sN $URL -H 'Content-Type: application/json'"
    session = '-H "X-Amzn-SageMaker-Session-Id: $ID"'
    return f"""In another terminal, with any picture.png:

  URL={url}/invocations
  # open a session with the picture; its id is in the answer and in a header
  printf '{{"type":"start_session","image":"%s"}}' "$(base64 < picture.png | tr -d '\\n')" |
    {curl} -D - -d @-
  ID=the-session-id
  # ask, as often as you like; the answer streams
  {curl} {session} \\
    -d '{{"type":"send_text_prompt","prompt_text":"What is in the picture?","stream":true}}'
  # close it
  {curl} {session} -d '{{"type":"close_session"}}'

Ctrl-C here stops the server."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.serve",
        description="Serve a packed model with TorchServe behind HAProxy, in the foreground, until Ctrl-C or SIGTERM. "
        "A server that dies is started again.",
    )
    add = parser.add_argument
    add("--model-store", type=Path, default=REPO / "model_store", metavar="DIR", help="default: model_store")
    add("--name", default="llava", help="the packed model (default: %(default)s)")
    add("--port", type=int, default=8080, help="inference; management and metrics take the next two (0: free ones)")
    add("--host", default=LOOPBACK, help="where HAProxy listens; TorchServe is on loopback always (%(default)s)")
    add(
        "--home",
        type=Path,
        metavar="DIR",
        help="temporary files and logs, kept (default: made, and removed at the end)",
    )
    add("--java-opts", type=shlex.split, default=[], metavar="OPTS", help="for the JVM, such as '-Xmx2g'")
    add("--log-level", choices=["error", "warn", "info", "debug"], default="warn", help="of the frontend")
    add("--timeout", type=float, default=600, metavar="S", help="how long the model may take to load")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = parse_args(argv)
    haproxy = find_haproxy()
    if haproxy is None:
        print("HAProxy is missing (scripts/need_haproxy.sh): TorchServe is served bare, /ping says 200 while it loads")
    try:
        service = Service(
            args.model_store,
            args.name,
            haproxy=haproxy,
            port=args.port,
            host=args.host,
            home=args.home,
            ready_timeout_s=args.timeout,
            quiet=False,
            java_options=args.java_opts,
            log_level=args.log_level,
        )
    except ServeError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return serve(service)


def serve(service: Service) -> int:
    """Run a service until a signal stops it; the exit code. For the main thread of a process that does nothing else."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        service.stop(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
            signal.signal(number, on_signal)
    return service.run()


if __name__ == "__main__":
    sys.exit(main())
