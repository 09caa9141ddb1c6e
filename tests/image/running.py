"""Run the image as SageMaker does, chat through it, and check it from outside."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from models.shapes.scenes import HELD_OUT_SEEDS, dialogue, make_scene
from tests.support.wire import ApiError, ChatSession

from .building import IMAGE
from .log import CheckError, Log, run

READY_LIMIT_S = 20.0
STOP_LIMIT_S = 30.0
SAGEMAKER_PORT = 8080

# As `docker run -v MODEL:/opt/ml/model:ro IMAGE serve` does: namespaces in which the entrypoint is process 1 and the
# image is its root. (`buildah run` would not make it process 1.) /dev/shm is as small as with docker and SageMaker. The
# network is the machine's.
CONTAINER = r"""
set -e
root=$1; model=$2; shift 2
mount --make-rprivate /
mount --rbind /dev "$root/dev"
mount -t tmpfs -o size=64m shm "$root/dev/shm"
mount -t proc proc "$root/proc"
mkdir -p "$root/opt/ml/model"
if [ -n "$model" ]; then
  mount --bind "$model" "$root/opt/ml/model"
  mount -o remount,bind,ro "$root/opt/ml/model"
fi
exec chroot "$root" /usr/bin/env -i "$@"
"""


class Container:
    """The image as a running container. Its entrypoint is process 1 of a process namespace."""

    def __init__(
        self, builder: Sequence[str], root: Path, model: Path | None, env: dict[str, str], output: Path
    ) -> None:
        config = json.loads(run([*builder, "inspect", "--type", "image", IMAGE]))["Docker"]["config"]
        variables = [*config["Env"], *(f"{key}={value}" for key, value in env.items())]
        command = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=SIGKILL"]
        command += ["sh", "-c", CONTAINER, "container", str(root), str(model or "")]
        command += ["-C", config["WorkingDir"], *variables, *config["Entrypoint"], "serve"]
        if config["User"]:
            raise CheckError(f"the image's USER must be root, as SageMaker expects, got {config['User']}")
        self.output = output
        self.started_at = time.monotonic()
        with output.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def first(self) -> psutil.Process:
        """Process 1 of the container, seen from this machine."""
        return psutil.Process(self._process.pid).children()[0]

    def running(self) -> bool:
        """Return whether the container runs."""
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> int:
        """Wait for the end. Return the exit code. Raise `CheckError` after `timeout_s`."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise CheckError(f"the container still runs {timeout_s:.0f} s later") from None

    def kill(self) -> None:
        """Kill all its processes."""
        self._process.kill()  # by --kill-child also process 1, and with it all others
        self._process.wait()

    def tail(self) -> str:
        """Return the last lines of the output."""
        return "\n".join(self.output.read_text(errors="replace").splitlines()[-15:])


def check_refusal(builder: Sequence[str], root: Path, output: Path) -> str:
    """Check that the container fails with one line without a model. Return the line."""
    container = Container(builder, root, None, {}, output)
    code = container.wait(READY_LIMIT_S)
    text = output.read_text().strip()
    if code == 0 or len(text.splitlines()) != 1 or "no model in /opt/ml/model" not in text:
        raise CheckError(f"without a model: exit code {code}, and\n{text}")
    return text


def try_container(builder: Sequence[str], root: Path, work: Path, log: Log) -> dict[str, Any]:
    """Start the container, chat, check it from outside, stop it. Return the measurements."""
    port = _choose_port()
    env = {} if port == SAGEMAKER_PORT else {"SAGEMAKER_BIND_TO_PORT": str(port)}
    log.say(f"running it: serve, read-only model, port {port}")
    container = Container(builder, root, work / "llava", env, work / "container.log")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            ping_s = _wait_ping(container, http)
            chat = _hold_chat(container, http, HELD_OUT_SEEDS[0])
            http.get("/metrics").raise_for_status()  # SageMaker's collector reads it
            log.say(f"/ping 200 after {ping_s:.1f} s, first session open after {chat['ready_s']:.1f} s")
            for turn in chat["turns"]:
                log.say(f"  {turn['question']}  {turn['answer']}")
            confined = _check_confinement(container.first, port)
            log.say(f"uid {confined['uid']} in all {confined['processes']} processes, only port {port} is open")
            again_s = _lose_worker(container, http, HELD_OUT_SEEDS[0])
            log.say(f"its worker killed: a chat again after {again_s:.1f} s, without a zombie")
        stopped_s = _stop(container)
        log.say(f"SIGTERM: exit code 0 after {stopped_s:.1f} s")
    except (CheckError, ApiError, httpx.HTTPError) as err:
        raise CheckError(f"{err}\n--- output of the container\n{container.tail()}") from err
    finally:
        container.kill()
    seconds = {"ping_s": ping_s, "again_s": again_s, "stopped_s": stopped_s}
    return {**chat, **confined, **{name: round(value, 2) for name, value in seconds.items()}}


def _choose_port() -> int:
    """Return SageMaker's port, or one that is free with the next two."""
    taken = {connection.laddr.port for connection in psutil.net_connections("inet") if connection.laddr}
    return next(port for port in (SAGEMAKER_PORT, *range(21080, 31080, 10)) if not taken & {port, port + 1, port + 2})


def _wait_ping(container: Container, http: httpx.Client) -> float:
    """Return the seconds from the start to the first 200 of /ping."""
    while time.monotonic() - container.started_at < 3 * READY_LIMIT_S:
        if not container.running():
            raise CheckError("the container ended while starting")
        if _pings(http):
            return time.monotonic() - container.started_at
        time.sleep(0.1)
    raise CheckError(f"/ping did not answer 200 within {3 * READY_LIMIT_S:.0f} s")


def _pings(http: httpx.Client) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return http.get("/ping", timeout=2).status_code == httpx.codes.OK
    return False


def _hold_chat(container: Container, http: httpx.Client, seed: int) -> dict[str, Any]:
    """Open a session, ask two questions, close it. The answers must be right: the model is trained on such pictures."""
    scene = make_scene(seed)
    chat = ChatSession.open(http, scene.draw())
    opened_s = time.monotonic() - container.started_at
    turns = []
    for question in dialogue(scene, seed, 2):
        reply = chat.ask(question.text)
        turns.append({"question": question.text, "answer": reply["response_text"], "usage": reply["usage"]})
        if reply["response_text"] != question.answer:
            raise CheckError(f"to {question.text!r} must be {question.answer!r}, got {reply['response_text']!r}")
    if not turns[1]["usage"]["cached_tokens"]:
        raise CheckError("the second question used no KV cache")
    chat.close()
    with contextlib.suppress(ApiError):
        chat.ask("Are you there?")
        raise CheckError("the closed session still answers")
    return {"ready_s": round(opened_s, 2), "turns": turns}


def _check_confinement(first: psutil.Process, port: int) -> dict[str, Any]:
    """Check the users of the processes, the read-only model, and the open ports."""
    status = Path(f"/proc/{first.pid}/status").read_text()
    if "NSpid:" in status and status.split("NSpid:")[1].split("\n")[0].split()[-1] != "1":
        raise CheckError("the entrypoint is not process 1")
    everyone = [first, *first.children(recursive=True)]
    roots = [process.name() for process in everyone if process.uids().effective == 0]
    if roots:
        raise CheckError(f"running as root: {', '.join(roots)}")
    mounts = [line.split() for line in Path(f"/proc/{first.pid}/mountinfo").read_text().splitlines()]
    if not any(mount[4].endswith("/opt/ml/model") and "ro" in mount[5].split(",") for mount in mounts):
        raise CheckError("/opt/ml/model is not mounted read-only")
    sockets = [socket for process in everyone for socket in process.net_connections("inet")]
    listening = {socket.laddr for socket in sockets if socket.status == psutil.CONN_LISTEN}
    shown = sorted({at.port for at in listening if at.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")})
    if shown != [port]:
        raise CheckError(f"only port {port} must be open to the network, got {shown}")
    return {"uid": first.uids().real, "processes": len(everyone), "ports_shown": shown}


def _lose_worker(container: Container, http: httpx.Client, seed: int) -> float:
    """Kill the Python worker, as the kernel does when memory is short. Return the seconds until the next chat ends.

    The processes that lose their parent must not stay as zombies.
    """
    began = time.monotonic()
    first = container.first
    everyone = first.children(recursive=True)
    (worker,) = [process for process in everyone if any("model_service_worker" in word for word in process.cmdline())]
    worker.kill()
    _wait(lambda: not _pings(http), "/ping never reported a killed worker")
    _wait(lambda: _pings(http), "no worker started after the killed one")
    _hold_chat(container, http, seed)
    seconds = time.monotonic() - began
    _wait(lambda: not _zombies(first), "the killed worker left a zombie")
    return seconds


def _wait(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 3 * READY_LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise CheckError(f"{otherwise} ({3 * READY_LIMIT_S:.0f} s)")
        time.sleep(0.1)


def _zombies(first: psutil.Process) -> list[int]:
    found = []
    for process in first.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def _stop(container: Container) -> float:
    """Send SIGTERM to process 1, as SageMaker does. Return the seconds until exit code 0."""
    began = time.monotonic()
    container.first.send_signal(signal.SIGTERM)
    code = container.wait(2 * STOP_LIMIT_S)
    if code:
        raise CheckError(f"exit code after SIGTERM must be 0, got {code}")
    return time.monotonic() - began
