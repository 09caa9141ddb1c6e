"""The sides of the comparison: their names, and how their processes are started, used and stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from ..route import ROOT, service
from . import worker
from .checkpoint import OFFLINE, openvino_model
from .clients import NativeChat, OpenAIChat, run_chats
from .environments import OPENVINO, VLLM, PeerError, preloaded
from .worker import Chat, Job, Outcome

START_S = 400
STOP_S = 20


@dataclass(frozen=True)
class Kind:
    """A side's name in the tables, the processes that it shares with other sides, and the way of serving there.

    `most_rounds`: of eight chats at once, for sides that take minutes. `has_own_chats`: other pictures and questions
    than the other sides, because its process has a cache of theirs.
    """

    label: str
    process: str
    way: str = ""
    is_alone: bool = True
    is_parallel: bool = True
    most_rounds: int | None = None
    has_own_chats: bool = False


SERVED, VLLM_SERVED, ENGINE = "LLaVA Sessions, served", "vLLM 0.32, served", "LLaVA Sessions, in process"
TOGETHER, CONTINUOUS = "OpenVINO GenAI 2026.4, in process", "OpenVINO GenAI, continuous batching"
KEPT, STATELESS = "transformers, KV kept", "transformers, stateless"
KINDS = {
    "served": Kind(SERVED, "served"),
    "vllm": Kind(VLLM_SERVED, "vllm"),
    "engine": Kind(ENGINE, "engine"),
    "openvino": Kind(TOGETHER, "openvino", "together"),
    "openvino-continuous": Kind(CONTINUOUS, "openvino", "continuous", is_alone=False, has_own_chats=True),
    "kept": Kind(KEPT, "transformers", "kept", most_rounds=1),
    "stateless": Kind(STATELESS, "transformers", "stateless", most_rounds=1),
}


@dataclass(frozen=True)
class Runner:
    """The processes of a side: the first one's ID, what waits until they serve, and what runs a job."""

    pid: int
    wait: Callable[[], None]
    run: Callable[[Job], Outcome]


@contextlib.contextmanager
def started(names: list[str], checkpoint: Path, dtype: str, logs: Path, say: Callable) -> Iterator[dict[str, Runner]]:
    """Start the processes of the sides; yield them by `Kind.process`; stop all of them. Raise `PeerError`."""
    # The slowest start is first. The others start meanwhile.
    openers = {"vllm": _vllm, "openvino": _openvino, "engine": _engine, "transformers": _transformers}
    openers["served"] = _own_server
    due = {KINDS[name].process for name in names}
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        say(f"starting: {', '.join(process for process in openers if process in due)}")
        runners = {
            process: stack.enter_context(opener(checkpoint, dtype, logs / f"{process}.log"))
            for process, opener in openers.items()
            if process in due
        }
        for process, runner in runners.items():
            runner.wait()
            say(f"ready: {process}")
        yield runners


@contextlib.contextmanager
def _own_server(checkpoint: Path, dtype: str, _log: Path) -> Iterator[Runner]:
    """Start this project's server, as `make serve` does."""
    before = {child.pid for child in psutil.Process().children()}
    with service(model=checkpoint, dtype=dtype) as (_, url):
        (process,) = (child for child in psutil.Process().children() if child.pid not in before)
        yield Runner(process.pid, lambda: None, lambda job: run_chats(job, lambda chat: NativeChat(url, chat)))


@contextlib.contextmanager
def _vllm(checkpoint: Path, dtype: str, log: Path) -> Iterator[Runner]:
    """Start vLLM's server with prefix caching and its cache of prepared pictures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [VLLM.folder / "bin" / "vllm", "serve", checkpoint, "--host", "127.0.0.1", "--port", port]
    words += ["--dtype", dtype, "--max-model-len", 2048, "--max-num-seqs", 16, "--block-size", 32]
    words += ["--enable-prefix-caching", "--mm-processor-cache-gb", 1, "--no-enable-log-requests"]
    url = f"http://127.0.0.1:{port}"

    def client(chat: Chat) -> OpenAIChat:
        return OpenAIChat(url, chat, str(checkpoint), uuid.uuid4().hex)

    with _process([str(word) for word in words], vllm_environment(), log, stdin=subprocess.DEVNULL) as process:
        yield Runner(process.pid, lambda: _wait_for(f"{url}/health", process, log), lambda job: run_chats(job, client))


def vllm_environment() -> dict[str, str]:
    """Return the variables with which vLLM uses all cores and the libraries that it recommends."""
    cores = os.cpu_count() or 1
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "OMP_NUM_THREADS": str(cores),
        "LD_PRELOAD": ":".join(map(str, preloaded(VLLM))),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOOPBACK_IP": "127.0.0.1",
        "VLLM_CACHE_ROOT": str(VLLM.folder / "cache"),
    }


def _engine(checkpoint: Path, dtype: str, log: Path) -> contextlib.AbstractContextManager[Runner]:
    return _worker([sys.executable, "-m", "bench.peers.own_side", "engine", str(checkpoint), dtype], log)


def _transformers(checkpoint: Path, dtype: str, log: Path) -> contextlib.AbstractContextManager[Runner]:
    return _worker([sys.executable, "-m", "bench.peers.own_side", "transformers", str(checkpoint), dtype], log)


def _openvino(checkpoint: Path, dtype: str, log: Path) -> contextlib.AbstractContextManager[Runner]:
    precision = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    folder = str(openvino_model(checkpoint))
    return _worker([str(OPENVINO.python), "-m", "bench.peers.openvino_side", folder, precision], log)


@contextlib.contextmanager
def _worker(command: list[str], log: Path) -> Iterator[Runner]:
    """Start a process of `worker.serve`."""
    with _process(command, {}, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def reply() -> str:
            line = process.stdout.readline()
            if not line:
                raise PeerError(f"{' '.join(command[:3])} has ended:\n{_tail(log)}")
            return line

        def run(job: Job) -> Outcome:
            process.stdin.write(worker.job_line(job))
            process.stdin.flush()
            return worker.parse_outcome(reply())

        yield Runner(process.pid, reply, run)


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str], log: Path, **pipes) -> Iterator[subprocess.Popen]:
    """Start a process group with its output in `log`; end the whole group."""
    with log.open("w") as file:
        options = {"cwd": ROOT, "env": os.environ | OFFLINE | environment, "start_new_session": True}
        options |= {"stdout": file, "stderr": file} | pipes
        process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        stop_group(process)


def stop_group(process: subprocess.Popen) -> None:
    """End a process and all processes of its group: SIGTERM first, SIGKILL for those that remain."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    """Wait until `url` answers with 200. Raise `PeerError` with the log's end."""
    until = time.monotonic() + START_S
    with httpx.Client(timeout=5, trust_env=False) as http:
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if http.get(url).status_code == httpx.codes.OK:
                    return
            time.sleep(0.5)
    raise PeerError(f"{process.args[0]} does not answer at {url}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])
