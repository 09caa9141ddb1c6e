"""Starting and stopping one real TorchServe, for the launcher (`launch.py`), the demo and the tests.

Owns: the server's home folder, its ports, its processes, and how we learn that it is ready, or dead, and why. Must not
know: what the model answers, nor what happens after a death. It looks only at the processes, at TorchServe's management
API and at the log.

Java is started directly, with the arguments that the stock `torchserve --start --foreground` would give it. The stock
launcher is one process more that dies on SIGTERM and leaves java and the workers serving; without it, a signal reaches
the process that it is meant for, and its exit code reaches us.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from .processes import LOOPBACK, Guard, ServeError, file_size, free_ports, is_free, kill_group, tail

REPO = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CONFIG = REPO / "config.properties"
WORKER_ENV = HERE / "local.env"
LOG_CONFIG = HERE / "log4j2.xml"
METRICS_CONFIG = HERE / "metrics.yaml"

MIN_JAVA = 17
# What the frontend's heap needs is taken at start: its memory is level from then on, and a leak would be seen.
HEAP = ("-Xms384m", "-XX:+AlwaysPreTouch")
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


class TorchServe:
    """One TorchServe (Java frontend and its workers) with its own home folder, ports and process group.

    `with TorchServe(store) as server:` starts it, waits until the model answers, and stops it at the end. `home` holds
    its temporary files, logs and rendered configuration; without one, a folder is made and removed by `stop`. `ports`
    is what `choose_ports` gave, and `guard` one that watches other processes as well.
    """

    def __init__(
        self,
        model_store: Path,
        name: str = "llava",
        *,
        ports: Mapping[str, int] | None = None,
        home: Path | None = None,
        guard: Guard | None = None,
        env: dict[str, str] | None = None,
        config: Path = CONFIG,
        quiet: bool = True,
        properties: dict[str, str] | None = None,
        java_options: Sequence[str] = (),
        log_level: str = "warn",
    ) -> None:
        self.model_store = Path(model_store).resolve()
        self.name = name
        self._asked_home = home
        self._env = dict(env or {})
        self._config = Path(config)
        self._quiet = quiet
        self._properties = dict(properties or {})
        self._java_options = list(java_options)
        self._log_level = log_level
        self._java: subprocess.Popen[bytes] | None = None
        self._guard = guard
        self._own_guard = guard is None
        self._home: Path | None = None
        self._ports = dict(ports or {})
        self._started_at = 0.0
        self._worker_seen_at = 0.0
        self._ready_workers: list[psutil.Process] = []
        self._logged: dict[Path, int] = {}  # bytes that were in the logs before we started
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
        return sorted(worker.pid for worker in self._workers())

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
        self._ports = self._ports or choose_ports()
        self._home = self._make_home()
        try:
            config = self._render_config()
            command = self._command(java, config, models)
            self._started_at = time.monotonic()
            self._spawn(command)
        except BaseException:
            self.stop()
            raise

    def poll_ready(self) -> float | None:
        """The seconds from `start` to ready, once all workers have loaded the model; None before. Raises `ServeError`
        when that will not happen.

        /ping is no help: TorchServe answers it with 200 long before that, and for good when the load failed.
        """
        if (code := self.exit_code()) is not None:
            raise ServeError(f"TorchServe stopped while starting (exit code {code})\n{self._reason()}")
        statuses = self._worker_statuses()
        if statuses and set(statuses) == {"READY"}:
            self._ready_workers = self._workers()
            return time.monotonic() - self._started_at
        if statuses is not None and self._load_failed(statuses):
            time.sleep(0.3)  # the worker's last lines are still on their way into the log
            raise ServeError(f"the model {self.name!r} failed to load\n{self._reason()}")
        return None

    def wait_ready(self, timeout_s: float = 120) -> float:
        """Wait until the model answers; the seconds since `start`. Raises `ServeError`."""
        deadline = time.monotonic() + timeout_s
        while (seconds := self.poll_ready()) is None:
            if time.monotonic() > deadline:
                raise self.too_slow(timeout_s)
            time.sleep(0.1)
        return seconds

    def too_slow(self, timeout_s: float) -> ServeError:
        """What to raise when it did not become ready in this time."""
        return ServeError(f"the model {self.name!r} was not ready after {timeout_s:.0f} s\n{self._reason()}")

    def death(self) -> str | None:
        """Why a server that was ready can serve no longer; None while it can. TorchServe never restarts a worker in
        sequence batching: it stays up and leaves every session hanging, so a server that lost a worker is as dead as
        one without java."""
        if (code := self.exit_code()) is not None:
            return f"TorchServe died (exit code {code})\n{self._reason()}"
        if not self._ready_workers or not all(map(_is_alive, self._ready_workers)):
            return f"the worker died\n{self._reason()}"
        return None

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
                self._guard.done(self._java.pid)
        if self._guard is not None and self._own_guard:
            self._guard.release()
            self._guard = None
        if self._home is not None and self._asked_home is None:
            shutil.rmtree(self._home, ignore_errors=True)

    def kill(self) -> None:
        """End every process of the group, without waiting for it. Safe in a signal handler; `stop` cleans up."""
        if self._java is not None:
            kill_group(self._java.pid)

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
        home = make_home(self._asked_home)
        shutil.rmtree(home / "tmp", ignore_errors=True)  # what a server that was killed has left there
        (home / "tmp").mkdir()
        self._logged = {path: file_size(path) for path in _logs(home)}
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
        command += [
            *HEAP,
            *self._java_options,
            "-cp",
            str(site / "ts" / "frontend" / "*"),
            "org.pytorch.serve.ModelServer",
        ]
        command += ["--python", sys.executable, "-f", str(config), "-s", str(self.model_store)]
        return [*command, "-ncs", "-m", models]

    def _spawn(self, command: list[str]) -> None:
        if self._guard is None:
            self._guard = Guard(self._home if self._asked_home is None else None)
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
        self._guard.watch(self._java.pid)
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

    def _workers(self) -> list[psutil.Process]:
        try:
            return [child for child in psutil.Process(self.pid).children() if _is_worker(child)]
        except psutil.NoSuchProcess:
            return []

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
        has_run = self._worker_seen_at > 0 or bool(self._new_lines(self.log_path, 1))
        patience_s = 0.5 if has_run else 10.0  # java starts the process a moment after it listens
        return time.monotonic() - max(self._worker_seen_at, self._started_at) > patience_s

    def _startup_errors(self) -> list[str]:
        lines = self._new_lines(self.log_path, 200)
        return [line[line.index(STARTUP_ERROR) :] for line in lines if f" {STARTUP_ERROR}" in line]

    def _reason(self) -> str:
        """Why it did not start: the handler's own words if it spoke, else the ends of the logs."""
        if errors := self._startup_errors():
            return "\n".join(dict.fromkeys(errors))
        parts = [(path.name, self._new_lines(path, 15)) for path in _logs(self.home)]
        parts = [(name, [line for line in lines if not line.startswith(NOISE)]) for name, lines in parts]
        return "\n".join(f"--- {name}\n" + "\n".join(lines) for name, lines in parts if lines) or "(the logs are empty)"

    def _new_lines(self, path: Path, count: int) -> list[str]:
        return tail(path, count, self._logged[path])


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
    help_line = f"TorchServe needs Java {MIN_JAVA} or later; {REPO / 'scripts' / 'need_java.sh'} says how to get it"
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


def make_home(asked: Path | None) -> Path:
    """The folder for one server's files: the one that was asked for, or a new one. Raises `ServeError`."""
    if asked is not None:
        home = Path(asked).resolve()
    else:
        # A test runner's or a Mac's temporary folder can be too deep for the workers' sockets.
        base = tempfile.gettempdir()
        home = Path(tempfile.mkdtemp(prefix="llava-serve-", dir=base if len(base) < 60 else "/tmp"))
    if len(str(home / "tmp" / ".ts.sock.65535").encode()) > SOCKET_PATH_LIMIT:
        raise ServeError(f"{home}: this path is too long for unix sockets; choose a shorter home")
    (home / "logs").mkdir(parents=True, exist_ok=True)
    return home


def choose_ports(port: int = 0, public: str = "inference") -> dict[str, int]:
    """A port for each listener: `port` for the `public` one and the two after it for management and metrics; free ones
    for the others, and for all where `port` is 0."""
    fixed = {}
    if port:
        fixed = {public: port, "management": port + 1, "metrics": port + 2}
        for use, number in fixed.items():
            if not is_free(number):
                raise ServeError(f"port {number} ({use}) is in use; choose another: --port N takes N, N+1 and N+2")
    uses = [public, "inference", "management", "metrics", "grpc_inference", "grpc_management", "worker"]
    others = [use for use in dict.fromkeys(uses) if use not in fixed]
    return {**fixed, **dict(zip(others, free_ports(len(others), set(fixed.values())), strict=True))}


def read_properties(path: Path) -> dict[str, str]:
    """A Java properties file as our own are written: `key=value` lines and # comments."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith(("#", "!")))
    return {key.strip(): value.strip() for key, value in pairs}


def read_env_file(path: Path) -> dict[str, str]:
    """The `export KEY=value` lines of a file that a shell can source as well."""
    return dict(re.findall(r"^export (\w+)=(\S*)$", path.read_text(encoding="utf-8"), re.MULTILINE))


def _logs(home: Path) -> list[Path]:
    return [home / "logs" / name for name in ("console.log", "ts_log.log", "model_log.log")]


def _torchserve_home() -> Path:
    spec = importlib.util.find_spec("ts")
    if spec is None or not spec.submodule_search_locations:
        raise ServeError("torchserve is not installed in this Python; run: make env")
    return Path(next(iter(spec.submodule_search_locations))).resolve().parent


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any(part.endswith("model_service_worker.py") for part in process.cmdline())
    except psutil.Error:
        return False
