"""Starting and stopping one real TorchServe: the launcher behind `make serve`, the demo, the tests and the container.

Owns: the server's home folder, its ports, its processes, and how we learn that it is ready or why it is not. Must not
know: what the model answers. It looks only at TorchServe's management API and at the log.

Java is started directly, with the arguments that the stock `torchserve --start --foreground` would give it. The stock
launcher is one process more that dies on SIGTERM and leaves java and the workers serving; without it, a signal reaches
the process that it is meant for, and its exit code reaches us.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

import psutil

REPO = Path(__file__).resolve().parent.parent
CONFIG = REPO / "config.properties"
WORKER_ENV = REPO / "deploy" / "local.env"
LOG_CONFIG = REPO / "deploy" / "log4j2.xml"
METRICS_CONFIG = REPO / "deploy" / "metrics.yaml"

LOOPBACK = "127.0.0.1"
MIN_JAVA = 17
STARTUP_ERROR = "startup_error"  # begins the line in which the handler says why it does not start
SOCKET_PATH_LIMIT = 103  # bytes that every system allows in the path of a unix socket
NOISE = (  # what java prints at every start, whatever the log configuration says
    "WARNING: sun.reflect.Reflection.getCallerClass",
    "nvidia-smi not available",
    "Model server started.",
)
HEADER_KEYS = {  # the frontend's property and the worker's variable for one header must agree
    "ts_header_key_sequence_id": "TS_REQUEST_SEQUENCE_ID",
    "ts_header_key_sequence_end": "TS_REQUEST_SEQUENCE_END",
}

# Ends the server when we die without stopping it (kill -9, a crash, an aborted test run): it waits on a pipe whose
# other end only we hold. PR_SET_PDEATHSIG would do without a process, but it fires when the *thread* that started the
# server ends, needs code between fork and exec, and is Linux's alone.
GUARD = r"""
read -r java || exit 0
read -r stopped && exit 0
kill -TERM "$java"
for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$java" && sleep 1 || break; done
kill -KILL -- "-$java"
if [ -n "$1" ]; then rm -rf -- "$1"; fi
"""


class ServeError(RuntimeError):
    """The server cannot start, did not become ready, or died. The message is for the person at the terminal."""


class TorchServe:
    """One TorchServe (Java frontend and its workers) with its own home folder, ports and process group.

    `with TorchServe(store) as server:` starts it, waits until the model answers, and stops it at the end. `home` holds
    its temporary files, logs and rendered configuration; without one, a folder is made and removed by `stop`.
    """

    def __init__(
        self,
        model_store: Path,
        name: str = "llava",
        *,
        port: int = 0,
        home: Path | None = None,
        env: dict[str, str] | None = None,
        config: Path = CONFIG,
        quiet: bool = True,
        properties: dict[str, str] | None = None,
        java_options: Sequence[str] = (),
        log_level: str = "warn",
    ) -> None:
        self.model_store = Path(model_store).resolve()
        self.name = name
        self._asked_port = port
        self._asked_home = home
        self._env = dict(env or {})
        self._config = Path(config)
        self._quiet = quiet
        self._properties = dict(properties or {})
        self._java_options = list(java_options)
        self._log_level = log_level
        self._java: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._home: Path | None = None
        self._ports: dict[str, int] = {}
        self._started_at = 0.0
        self._worker_seen_at = 0.0
        self._stopping = False

    # --- where it is --------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self._ports['inference']}"

    @property
    def management_url(self) -> str:
        return f"http://{LOOPBACK}:{self._ports['management']}"

    @property
    def metrics_url(self) -> str:
        return f"http://{LOOPBACK}:{self._ports['metrics']}/metrics"

    @property
    def pid(self) -> int:
        """Of the Java frontend, which leads the process group."""
        if self._java is None:
            raise ServeError("the server is not started")
        return self._java.pid

    @property
    def home(self) -> Path:
        if self._home is None:
            raise ServeError("the server is not started")
        return self._home

    @property
    def log_path(self) -> Path:
        """What the worker printed, the handler's log lines among it."""
        return self.home / "logs" / "model_log.log"

    def worker_pids(self) -> list[int]:
        """The Python workers that live now (not the processes which they started themselves)."""
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return []
        return sorted(child.pid for child in children if _is_worker(child))

    def exit_code(self) -> int | None:
        """Java's exit code, or None while it runs."""
        return self._java.poll() if self._java else None

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the processes; returns at once. `wait_ready` tells when the model answers."""
        if self._java is not None:
            raise ServeError("the server is already started")
        models = models_argument(self.model_store, self.name)
        java = find_java()
        self._ports = choose_ports(self._asked_port)
        self._home = self._make_home()
        try:
            config = self._render_config()
            command = self._command(java, config, models)
            self._started_at = time.monotonic()
            self._spawn(command)
        except BaseException:
            self.stop()
            raise

    def wait_ready(self, timeout_s: float = 120) -> float:
        """Wait until a worker has loaded the model; the seconds since `start`.

        /ping is no help: TorchServe answers it with 200 long before that, and for good when the load failed.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if (code := self.exit_code()) is not None:
                raise ServeError(f"TorchServe stopped while starting (exit code {code})\n{self._reason()}")
            statuses = self._worker_statuses()
            if statuses and set(statuses) == {"READY"}:
                return time.monotonic() - self._started_at
            if statuses is not None and self._load_failed(statuses):
                time.sleep(0.3)  # the worker's last lines are still on their way into the log
                raise ServeError(f"the model {self.name!r} failed to load\n{self._reason()}")
            if time.monotonic() > deadline:
                raise ServeError(f"the model {self.name!r} was not ready after {timeout_s:.0f} s\n{self._reason()}")
            time.sleep(0.1)

    def wait_death(self) -> str:
        """Wait until the server can serve no longer; why. TorchServe never restarts a worker in sequence batching: it
        stays up and leaves every session hanging, so a server without a worker is as dead as one without java."""
        while True:
            time.sleep(0.5)
            if (code := self.exit_code()) is not None:
                return f"TorchServe died (exit code {code})\n{self._reason()}"
            if self.worker_pids():
                self._worker_seen_at = time.monotonic()
            elif time.monotonic() - self._worker_seen_at > 5:  # in other modes a new one is there by then
                return f"the worker died\n{self._reason()}"

    def stop(self, timeout_s: float = 30) -> None:
        """SIGTERM to java, which ends its workers; whatever is left of the group after `timeout_s` is killed.

        May be called again, and for a server that never started or has died. Removes the home folder if it made it.
        """
        self._stopping = True
        if self._java is not None:
            if self._java.poll() is None:
                self._java.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._java.wait(timeout_s)
            self.kill()
            self._java.wait()
        if self._guard is not None:
            self._guard.communicate(b"stopped\n")
            self._guard = None
        if self._home is not None and self._asked_home is None:
            shutil.rmtree(self._home, ignore_errors=True)

    def kill(self) -> None:
        """End every process of the group, without waiting for it. Safe in a signal handler; `stop` cleans up."""
        if self._java is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._java.pid, signal.SIGKILL)

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

    # --- starting -----------------------------------------------------------------------------------------------------

    def _make_home(self) -> Path:
        if self._asked_home is not None:
            home = Path(self._asked_home).resolve()
        else:
            # A test runner's or a Mac's temporary folder can be too deep for the workers' sockets.
            base = tempfile.gettempdir()
            home = Path(tempfile.mkdtemp(prefix="llava-serve-", dir=base if len(base) < 60 else "/tmp"))
        if len(str(home / "tmp" / ".ts.sock.65535").encode()) > SOCKET_PATH_LIMIT:
            raise ServeError(f"{home}: this path is too long for unix sockets; choose a shorter home")
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        (home / "logs").mkdir(exist_ok=True)
        return home

    def _render_config(self) -> Path:
        """The configuration with this server's ports and absolute paths. Later keys win, so ours are appended."""
        base = read_properties(self._config)
        address = {key: f"http://{LOOPBACK}:{self._ports[key]}" for key in ("inference", "management", "metrics")}
        ours = {
            **{f"{key}_address": value for key, value in address.items()},
            "grpc_inference_port": str(self._ports["grpc_inference"]),
            "grpc_management_port": str(self._ports["grpc_management"]),
            "initial_worker_port": str(self._ports["worker"]),
            "metrics_config": str(self._absolute(base.get("metrics_config"), METRICS_CONFIG)),
            **self._properties,
        }
        self._check_headers({**base, **ours})
        rendered = self.home / "config.properties"
        lines = [f"{key}={value}" for key, value in {**base, **ours}.items()]
        rendered.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return rendered

    def _absolute(self, path: str | None, default: Path) -> Path:
        return (self._config.resolve().parent / path).resolve() if path else default

    def _check_headers(self, properties: dict[str, str]) -> None:
        """Where frontend and worker read different session headers, two sessions end up in one: refuse to start."""
        env = self._worker_env()
        for key, variable in HEADER_KEYS.items():
            if properties.get(key) != env.get(variable):
                raise ServeError(
                    f"session headers disagree: {key}={properties.get(key)} for the frontend, "
                    f"{variable}={env.get(variable)} for the worker"
                )

    def _worker_env(self) -> dict[str, str]:
        """The environment of java, which hands it on to the workers."""
        env = {**os.environ, **read_env_file(WORKER_ENV)}
        env.pop("TS_CONFIG_FILE", None)  # would silently win over our configuration
        env.pop("PYTHONPATH", None)  # would come before the archive in the worker's sys.path
        if self._home is not None:
            temp, logs = str(self._home / "tmp"), str(self._home / "logs")
            env |= {"TMPDIR": temp, "TEMP": temp, "LOG_LOCATION": logs, "METRICS_LOCATION": logs}
        return {**env, **self._env}

    def _command(self, java: str, config: Path, models: str) -> list[str]:
        site = _torchserve_home()
        command = [java, f"-Dmodel_server_home={site}", f"-Dlog4j.configurationFile=file://{LOG_CONFIG}"]
        command += [f"-Djava.io.tmpdir={self.home / 'tmp'}", f"-Dllava.log.level={self._log_level}"]
        command += [*self._java_options, "-cp", str(site / "ts" / "frontend" / "*"), "org.pytorch.serve.ModelServer"]
        command += ["--python", sys.executable, "-f", str(config), "-s", str(self.model_store)]
        return [*command, "-ncs", "-m", models]

    def _spawn(self, command: list[str]) -> None:
        own_home = str(self._home) if self._asked_home is None else ""
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "guard", own_home],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with contextlib.ExitStack() as stack:
            log = stack.enter_context((self.home / "logs" / "console.log").open("ab")) if self._quiet else None
            self._java = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log or subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self.home,  # where TorchServe drops a file, it drops it here
                env=self._worker_env(),
                start_new_session=True,  # a group of its own: Ctrl-C reaches us alone, and we stop it in order
            )
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{self._java.pid}\n".encode())
        self._guard.stdin.flush()
        if not self._quiet:
            threading.Thread(target=self._relay, args=(self._java.stdout,), daemon=True).start()

    def _relay(self, pipe: IO[bytes]) -> None:
        """Java's console to ours, less the noise: what it prints at every start, and its stack traces while it stops.
        Reads on when nobody listens any more, since a full pipe would stall java."""
        for line in pipe:
            if not self._stopping and not line.startswith(tuple(noise.encode() for noise in NOISE)):
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.write(line.decode(errors="replace"))
                    sys.stdout.flush()

    # --- watching -----------------------------------------------------------------------------------------------------

    def _worker_statuses(self) -> list[str] | None:
        """The states of the model's workers; empty when TorchServe could not load it; None while it does not listen."""
        connection = http.client.HTTPConnection(LOOPBACK, self._ports["management"], timeout=5)
        try:
            connection.request("GET", f"/models/{self.name}")
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
        """A model without workers, or a worker that died. TorchServe calls both a loading and a dead worker UNLOADING,
        and starts no second one in sequence batching, so we look for the process."""
        if not statuses or self._startup_errors():
            return True
        if self.worker_pids():
            self._worker_seen_at = time.monotonic()
            return False
        has_run = self._worker_seen_at > 0 or bool(_tail(self.log_path, 1))
        patience_s = 0.5 if has_run else 10.0  # java starts the process a moment after it listens
        return time.monotonic() - max(self._worker_seen_at, self._started_at) > patience_s

    def _startup_errors(self) -> list[str]:
        lines = _tail(self.log_path, 200)
        return [line[line.index(STARTUP_ERROR) :] for line in lines if f" {STARTUP_ERROR}" in line]

    def _reason(self) -> str:
        """Why it did not start: the handler's own words if it spoke, else the ends of the logs."""
        if errors := self._startup_errors():
            return "\n".join(dict.fromkeys(errors))
        logs = self.home / "logs"
        parts = [(path.name, _tail(path, 15)) for path in (logs / "console.log", logs / "ts_log.log", self.log_path)]
        parts = [(name, [line for line in lines if not line.startswith(NOISE)]) for name, lines in parts]
        return "\n".join(f"--- {name}\n" + "\n".join(lines) for name, lines in parts if lines) or "(the logs are empty)"


# --- what a start needs -----------------------------------------------------------------------------------------------


def models_argument(model_store: Path, name: str) -> str:
    """TorchServe's --models value for the archive of that name, in whichever format it was packed."""
    found = [name + suffix for suffix in ("", ".mar", ".tar.gz") if (model_store / (name + suffix)).exists()]
    if not found:
        raise ServeError(f"no archive {name!r} in {model_store}; pack one: ./build_mar.sh --model models/shapes")
    if len(found) > 1:
        raise ServeError(f"{' and '.join(found)} are both in {model_store}; remove one")
    return f"{name}={found[0]}"


def find_java() -> str:
    """The Java that TorchServe will run on, 17 or later."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else shutil.which("java")
    help_line = f"TorchServe needs Java {MIN_JAVA} or later; {REPO / 'deploy' / 'need_java.sh'} says how to get it"
    if not java:
        raise ServeError(f"no java found. {help_line}")
    try:
        text = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False).stderr
    except OSError as err:
        raise ServeError(f"{java} does not run ({err.strerror}). {help_line}") from err
    version = re.search(r'version "(\d+)', text)
    if not version or int(version[1]) < MIN_JAVA:
        raise ServeError(f"{java} is Java {version[1] if version else 'of unknown version'}. {help_line}")
    return java


def choose_ports(port: int) -> dict[str, int]:
    """A port for each of the server's listeners: `port` and the two after it, or free ones for 0."""
    fixed = {}
    if port:
        fixed = {"inference": port, "management": port + 1, "metrics": port + 2}
        for use, number in fixed.items():
            if not _is_free(number):
                raise ServeError(f"port {number} ({use}) is in use; choose another: --port N takes N, N+1 and N+2")
    others = [use for use in ("inference", "management", "metrics") if use not in fixed]
    others += ["grpc_inference", "grpc_management", "worker"]
    return {**fixed, **dict(zip(others, free_ports(len(others), set(fixed.values())), strict=True))}


def free_ports(count: int, taken: set[int] | None = None) -> list[int]:
    """Ports that nothing listens on. From below the range that the kernel hands to outgoing connections: none of those
    can slip in before java binds, which takes seconds."""
    ports: list[int] = []
    for number in random.SystemRandom().sample(range(20000, 32000), 1000):
        if number not in (taken or set()) and _is_free(number):
            ports.append(number)
        if len(ports) == count:
            return ports
    raise ServeError("no free ports on this machine")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def read_properties(path: Path) -> dict[str, str]:
    """A Java properties file as our own are written: `key=value` lines and # comments."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith(("#", "!")))
    return {key.strip(): value.strip() for key, value in pairs}


def read_env_file(path: Path) -> dict[str, str]:
    """The `export KEY=value` lines of a file that a shell can source as well."""
    return dict(re.findall(r"^export (\w+)=(\S*)$", path.read_text(encoding="utf-8"), re.MULTILINE))


def _torchserve_home() -> Path:
    spec = importlib.util.find_spec("ts")
    if spec is None or not spec.submodule_search_locations:
        raise ServeError("torchserve is not installed in this Python; run: make env")
    return Path(next(iter(spec.submodule_search_locations))).resolve().parent


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any(part.endswith("model_service_worker.py") for part in process.cmdline())
    except psutil.Error:
        return False


def _tail(path: Path, count: int) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


# --- the command line -------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.serve",
        description="Serve a packed model with TorchServe on loopback, in the foreground, until Ctrl-C or SIGTERM.",
    )
    add = parser.add_argument
    add("--model-store", type=Path, default=REPO / "model_store", metavar="DIR", help="default: model_store")
    add("--name", default="llava", help="the packed model (default: %(default)s)")
    add("--port", type=int, default=8080, help="inference; management and metrics take the next two (0: free ones)")
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


class _Stop:
    """Signals as a flag: the first asks for an orderly stop, a second one of the keyboard kills."""

    def __init__(self, server: TorchServe) -> None:
        self.asked = ""
        self.deferred = False  # while processes are being started, the flag alone is set
        self._server = server
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            self._server.kill()
        elif not self.asked:
            self.asked = signal.Signals(number).name
            if not self.deferred:
                raise KeyboardInterrupt

    def start_server(self) -> None:
        self.deferred = True
        self._server.start()
        self.deferred = False
        if self.asked:
            raise KeyboardInterrupt


def usage(server: TorchServe) -> str:
    """What to type next: open with a picture, ask, close."""
    curl = "curl -sN $URL -H 'Content-Type: application/json'"
    session = '-H "X-Amzn-SageMaker-Session-Id: $ID"'
    return f"""In another terminal, with any picture.png:

  URL={server.url}/invocations
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


def run(server: TorchServe, timeout_s: float) -> int:
    """Serve until a signal or until the server dies; the exit code."""
    stop = _Stop(server)
    code = 0
    try:
        print(f"starting TorchServe with {server.model_store / server.name} ...", flush=True)
        stop.start_server()
        seconds = server.wait_ready(timeout_s)
        print(f"ready in {seconds:.1f} s on {server.url}\n  management {server.management_url}", flush=True)
        print(
            f"  metrics    {server.metrics_url}\n  logs       {server.log_path.parent}\n\n{usage(server)}", flush=True
        )
        print(f"error: {server.wait_death()}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print(f"\n{stop.asked}: stopping ...", flush=True)
    except ServeError as err:
        print(f"error: {err}", file=sys.stderr)
        code = 1
    began = time.monotonic()
    server.stop()
    if stop.asked:
        print(f"stopped in {time.monotonic() - began:.1f} s", flush=True)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    server = TorchServe(
        args.model_store,
        args.name,
        port=args.port,
        home=args.home,
        quiet=False,
        java_options=args.java_opts,
        log_level=args.log_level,
    )
    return run(server, args.timeout)


if __name__ == "__main__":
    sys.exit(main())
