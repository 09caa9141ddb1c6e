"""`make image-test`: builds the image for real, runs it as SageMaker would, holds a chat through it, and measures it.

Owns: the steps, the limits that must hold, and their record (bench/results/image.json and image.log). Needs root and
nothing from a container registry: the base is made with debootstrap, the image with buildah in a storage of its own
that is removed at the end. Must not know: how the image is built (image.py) and what serves in it; it speaks to the
container by HTTP and signals only.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil

from deploy.container.image import REPO, ImageError, build
from llava_sessions_client import ApiError, ChatSession
from models.shapes.scenes import HELD_OUT_SEEDS, dialogue, make_scene

READY_LIMIT_S = 20.0
STOP_LIMIT_S = 30.0
OWN_LAYERS_LIMIT_BYTES = 400_000_000
DISK_BYTES = 12 << 30  # what the builder's copies of all layers take
SAGEMAKER_PORT = 8080
MODEL = REPO / "models" / "shapes"

DEBIAN = "bookworm"
BASE, IMAGE = "localhost/llava-base:test", "localhost/llava-sessions:test"
TOOLS = ("buildah", "debootstrap")

# What `docker run -v MODEL:/opt/ml/model:ro IMAGE serve` does: namespaces in which the entrypoint is process 1 and sees
# the image as its root. (`buildah run` would not make it process 1.) /dev/shm is as small as docker's, and SageMaker's.
# The network stays the machine's.
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


class CheckError(RuntimeError):
    """The image does not do what it must. The message says what it did."""


class Log:
    """What is done, on the terminal and in a file, with the seconds since the start."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self._began:6.1f} s  {text}"
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


@dataclass(frozen=True)
class Layer:
    """One layer of the image: what made it, and its bytes as a tar file and gzipped, as registries keep it."""

    what: str
    made_by: str
    bytes: int
    gzip_bytes: int


# --- building ---------------------------------------------------------------------------------------------------------


def need_tools(log: Log) -> None:
    """Buildah and debootstrap, installed when they are missing."""
    if os.geteuid() != 0:
        raise ImageError("root is needed: debootstrap and the container's mounts don't work without it")
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        log.say(f"apt-get install {' '.join(missing)}")
        _run(["apt-get", "update", "-q"])
        _run(["apt-get", "install", "-qy", "--no-install-recommends", *missing])


def make_base(builder: Sequence[str], work: Path) -> None:
    """An image with Debian's Python 3.11 and pip, and without documentation, like the default BASE_IMAGE."""
    root = work / "base"
    packages = "ca-certificates,python3,python3-pip,python3-venv"
    _run(["debootstrap", "--variant=minbase", f"--include={packages}", DEBIAN, str(root), *_mirror()])
    for folder in ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/lib/apt/lists", "var/cache/apt"):
        shutil.rmtree(root / folder, ignore_errors=True)
    container = _run([*builder, "from", "scratch"])
    _run([*builder, "add", "--quiet", container, str(root), "/"])
    _run([*builder, "commit", "--quiet", "--rm", container, BASE])
    shutil.rmtree(root)


def _mirror() -> list[str]:
    """Where this machine's apt gets Debian's packages; nothing where it has another system's."""
    asked = ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", f"Codename: {DEBIAN}"]
    listing = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return listing[:1]


def layers(builder: Sequence[str], work: Path) -> list[Layer]:
    """The image's layers, from the files that a push to a registry would send."""
    folder = work / "oci"
    _run([*builder, "push", "--quiet", "--format", "oci", IMAGE, f"oci:{folder}:test"])
    index = json.loads((folder / "index.json").read_text())
    manifest = json.loads(_blob(folder, index["manifests"][0]).read_text())
    history = json.loads(_blob(folder, manifest["config"]).read_text())["history"]
    made_by = [entry["created_by"] for entry in history if not entry.get("empty_layer")]
    found = []
    for number, (made, entry) in enumerate(zip(made_by, manifest["layers"], strict=True)):
        what = "base" if number == 0 else "torch" if "torch===" in made else "own"
        found.append(Layer(what, " ".join(made.split())[-80:], _unzipped_bytes(_blob(folder, entry)), entry["size"]))
    shutil.rmtree(folder)
    return found


def _blob(folder: Path, entry: dict) -> Path:
    return folder / "blobs" / entry["digest"].replace(":", "/")


def _unzipped_bytes(path: Path) -> int:
    count = 0
    with gzip.open(path) as file:
        while chunk := file.read(1 << 20):
            count += len(chunk)
    return count


def _run(command: Sequence[str]) -> str:
    """The command's output. Raises `ImageError` with its last lines."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise ImageError(f"{' '.join(command[:2])} ended with {done.returncode}\n{last}")
    return done.stdout.strip()


# --- running ----------------------------------------------------------------------------------------------------------


class Container:
    """The image as a running container; its entrypoint is process 1 of a process namespace."""

    def __init__(
        self, builder: Sequence[str], root: Path, model: Path | None, env: dict[str, str], output: Path
    ) -> None:
        config = json.loads(_run([*builder, "inspect", "--type", "image", IMAGE]))["Docker"]["config"]
        variables = [*config["Env"], *(f"{key}={value}" for key, value in env.items())]
        command = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=SIGKILL"]
        command += ["sh", "-c", CONTAINER, "container", str(root), str(model or "")]
        command += ["-C", config["WorkingDir"], *variables, *config["Entrypoint"], "serve"]
        if config["User"]:
            raise CheckError(f"the image's USER is {config['User']}; SageMaker expects root")
        self.output = output
        self.started_at = time.monotonic()
        with output.open("wb") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def first(self) -> psutil.Process:
        """Process 1 of the container, as this machine sees it."""
        return psutil.Process(self._process.pid).children()[0]

    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> int:
        """Its exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise CheckError(f"the container still runs {timeout_s:.0f} s later") from None

    def kill(self) -> None:
        """End whatever is left."""
        self._process.kill()  # and, by --kill-child, process 1, and with it all others
        self._process.wait()

    def tail(self) -> str:
        return "\n".join(self.output.read_text(errors="replace").splitlines()[-15:])


def choose_port() -> int:
    """SageMaker's, or one that is free with the two after it."""
    taken = {connection.laddr.port for connection in psutil.net_connections("inet") if connection.laddr}
    return next(port for port in (SAGEMAKER_PORT, *range(21080, 31080, 10)) if not taken & {port, port + 1, port + 2})


def wait_ping(container: Container, http: httpx.Client) -> float:
    """Seconds from the start to the first 200 of /ping."""
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


def hold_chat(container: Container, http: httpx.Client, seed: int) -> dict:
    """Open with a picture, two questions, close. The answers must be right: this model knows such pictures."""
    scene = make_scene(seed)
    chat = ChatSession.open(http, scene.draw())
    opened_s = time.monotonic() - container.started_at
    turns = []
    for question in dialogue(scene, seed, 2):
        reply = chat.ask(question.text)
        turns.append({"question": question.text, "answer": reply["response_text"], "usage": reply["usage"]})
        if reply["response_text"] != question.answer:
            raise CheckError(f"to {question.text!r} it said {reply['response_text']!r}; right is {question.answer!r}")
    if not turns[1]["usage"]["cached_tokens"]:
        raise CheckError("the second question found nothing in the KV cache")
    chat.close()
    with contextlib.suppress(ApiError):
        chat.ask("Are you there?")
        raise CheckError("the closed session still answers")
    return {"ready_s": round(opened_s, 2), "turns": turns}


def check_confinement(first: psutil.Process, port: int) -> dict:
    """Who it runs as, what it may write, and what it shows to the network."""
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
        raise CheckError(f"ports open to the network: {shown}; wanted {port} alone")
    return {"uid": first.uids().real, "processes": len(everyone), "ports_shown": shown}


def lose_worker(container: Container, http: httpx.Client, seed: int) -> float:
    """Kill the Python worker, as the kernel does when memory is short; the seconds until a chat is possible again. What
    lost its parent by that must not stay as a zombie.
    """
    began, first = time.monotonic(), container.first
    everyone = first.children(recursive=True)
    (worker,) = [process for process in everyone if any("model_service_worker" in word for word in process.cmdline())]
    worker.kill()
    _wait(lambda: not _pings(http), "/ping never told of a killed worker")
    _wait(lambda: _pings(http), "no worker came after the killed one")
    hold_chat(container, http, seed)
    seconds = time.monotonic() - began
    _wait(lambda: not _zombies(first), "the killed worker left a zombie")
    return seconds


def _wait(condition: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + 3 * READY_LIMIT_S
    while not condition():
        if time.monotonic() > until:
            raise CheckError(f"{otherwise} ({3 * READY_LIMIT_S:.0f} s)")
        time.sleep(0.1)


def _zombies(first: psutil.Process) -> list[int]:
    found = []
    for process in first.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def check_refusal(builder: Sequence[str], root: Path, output: Path) -> str:
    """Without a model it must say so in one line and end with an error."""
    container = Container(builder, root, None, {}, output)
    code = container.wait(READY_LIMIT_S)
    said = output.read_text().strip()
    if code == 0 or len(said.splitlines()) != 1 or "no model in /opt/ml/model" not in said:
        raise CheckError(f"without a model: exit code {code}, and\n{said}")
    return said


def stop(container: Container) -> float:
    """SIGTERM to process 1, as SageMaker does; the seconds until the container's end, which must have code 0."""
    began = time.monotonic()
    container.first.send_signal(signal.SIGTERM)
    code = container.wait(2 * STOP_LIMIT_S)
    if code:
        raise CheckError(f"SIGTERM ended it with exit code {code}")
    return time.monotonic() - began


# --- the whole --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A folder for the builder's storage and all else; gone afterwards, images and containers with it."""
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < DISK_BYTES:
        raise ImageError(f"{folder} has {free / 1e9:.1f} GB free; {DISK_BYTES / 1e9:.0f} GB are needed")
    work = Path(tempfile.mkdtemp(prefix="image-test-", dir=folder))
    try:
        yield work
    finally:
        if str(work) in Path("/proc/self/mountinfo").read_text():
            print(f"something is still mounted under {work}: it was not removed", file=sys.stderr)
        else:
            shutil.rmtree(work, ignore_errors=True)


def test(work: Path, log: Log) -> dict:
    """Every step, and what was measured. Raises `ImageError` or `CheckError`."""
    os.environ["BUILDAH_ISOLATION"] = "chroot"
    builder = ["buildah", "--root", f"{work}/storage", "--runroot", f"{work}/run", "--storage-driver", "vfs"]
    need_tools(log)
    log.say("packing models/shapes")
    _run([str(REPO / "build_mar.sh"), "--dtype", "float32", "--model", str(MODEL), "--output", str(work)])
    found = make_image(builder, work, log)
    root = Path(_run([*builder, "mount", _run([*builder, "from", IMAGE])]))
    log.say(f"without a model: {check_refusal(builder, root, work / 'refusal.log')}")
    return found | try_container(builder, root, work, log)


def make_image(builder: Sequence[str], work: Path, log: Log) -> dict:
    """Base, image, and the sizes of its layers."""
    log.say(f"making a base image from Debian {DEBIAN} with debootstrap")
    make_base(builder, work)
    log.say("building the image with torch for CPU")
    with (work / "build.log").open("wb") as file:
        try:
            seconds = build(builder, IMAGE, {"BASE_IMAGE": BASE, "TORCH": "cpu", "TORCH_CPU_INDEX": ""}, log=file)
        except ImageError as err:
            last = (work / "build.log").read_text(errors="replace").splitlines()[-15:]
            raise ImageError("\n".join([str(err), *last])) from None
    log.say(f"built in {seconds:.0f} s; measuring its layers")
    image_layers = layers(builder, work)
    for layer in image_layers:
        log.say(f"  {layer.what:5}  {layer.bytes / 1e6:7.1f} MB, gzipped {layer.gzip_bytes / 1e6:6.1f} MB")
    own = [layer for layer in image_layers if layer.what == "own"]
    own_bytes, own_gzip_bytes = sum(layer.bytes for layer in own), sum(layer.gzip_bytes for layer in own)
    log.say(f"own layers {own_bytes / 1e6:.1f} MB, gzipped {own_gzip_bytes / 1e6:.1f} MB")
    return {
        "build_s": round(seconds),
        "layers": [asdict(layer) for layer in image_layers],
        "own_bytes": own_bytes,
        "own_gzip_bytes": own_gzip_bytes,
        "image_bytes": sum(layer.bytes for layer in image_layers),
    }


def try_container(builder: Sequence[str], root: Path, work: Path, log: Log) -> dict:
    """Start, chat, look at it from outside, stop; what it took."""
    port = choose_port()
    env = {} if port == SAGEMAKER_PORT else {"SAGEMAKER_BIND_TO_PORT": str(port)}
    log.say(f"running it: serve, read-only model, port {port}")
    container = Container(builder, root, work / "llava", env, work / "container.log")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            ping_s = wait_ping(container, http)
            chat = hold_chat(container, http, HELD_OUT_SEEDS[0])
            log.say(f"/ping 200 after {ping_s:.1f} s, first session open after {chat['ready_s']:.1f} s")
            for turn in chat["turns"]:
                log.say(f"  {turn['question']}  {turn['answer']}")
            confined = check_confinement(container.first, port)
            log.say(f"uid {confined['uid']} in all {confined['processes']} processes, port {port} alone is open")
            again_s = lose_worker(container, http, HELD_OUT_SEEDS[0])
            log.say(f"its worker killed: a chat again after {again_s:.1f} s, and no zombie is left")
        stopped_s = stop(container)
        log.say(f"SIGTERM: exit code 0 after {stopped_s:.1f} s")
    except (CheckError, ApiError, httpx.HTTPError) as err:
        raise CheckError(f"{err}\n--- the container said\n{container.tail()}") from err
    finally:
        container.kill()
    seconds = {"ping_s": ping_s, "again_s": again_s, "stopped_s": stopped_s}
    return {**chat, **confined, **{name: round(value, 2) for name, value in seconds.items()}}


def missed(found: dict) -> list[str]:
    """The limits that do not hold."""
    limits = {"own_bytes": OWN_LAYERS_LIMIT_BYTES, "ready_s": READY_LIMIT_S, "stopped_s": STOP_LIMIT_S}
    return [f"{name} is {found[name]:,}; at most {limit:,}" for name, limit in limits.items() if found[name] > limit]


NOTES = [
    "own_bytes: tar files of the layers above the base, less that with torch and what it requires; no weights there.",
    "gzip_bytes: what a registry keeps and counts. Both sizes are those of the files that `buildah push` writes.",
    "The base is a stand-in for python:3.11-slim-bookworm, made with debootstrap.",
    "ready_s: from the container's start until its first session is open.",
    "again_s: from the worker's death by SIGKILL to the end of the next chat.",
]


def facts() -> dict:
    """Where and when this was measured."""
    ask = ["git", "describe", "--always", "--dirty=+", "--abbrev=7"]
    commit = subprocess.run(ask, cwd=REPO, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "commit": commit or None,
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.image",
        description="Build the container's image with buildah, run it as SageMaker would, chat through it, measure it.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=REPO / "bench" / "results", metavar="DIR", help="of the record (bench/results)")
    add(
        "--work",
        type=Path,
        default=REPO / ".cache",
        metavar="DIR",
        help="where the image is built, and removed (.cache)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    log = Log(args.out / "image.log")
    try:
        with workplace(args.work) as work:
            found = test(work, log)
    except (ImageError, CheckError, OSError) as err:
        log.say(f"error: {err}")
        return 1
    except KeyboardInterrupt:
        log.say("interrupted")
        return 130
    document = {"bench": "image", "facts": facts(), **found, "notes": NOTES}
    (args.out / "image.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    problems = missed(found)
    for problem in problems:
        log.say(f"error: {problem}")
    log.say("a limit was missed" if problems else "all of it held")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
