"""The container's `serve`: find the model that SageMaker mounted, drop root, and serve it.

SageMaker mounts the model at /opt/ml/model and chooses the port. This process is process 1 of the container (the
Dockerfile's exec-form entrypoint). Therefore it forwards signals to the service and reaps orphaned processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from deploy.container import metric_lines
from deploy.options import port_range, version_line
from deploy.serve import command
from deploy.serve.configuration import PUBLIC_METRICS_VARIABLE
from deploy.serve.ports import fixed_ports
from deploy.serve.processes import ServeError

MODEL = Path("/opt/ml/model")  # SageMaker mounts the model here, read-only
MANIFEST = "MAR-INF/MANIFEST.json"
USER = "llava"  # the Dockerfile makes this user
PORT = "8080"
PORT_VARIABLE = "SAGEMAKER_BIND_TO_PORT"  # set if the container shares its host with others
RANGE_VARIABLE = "SAGEMAKER_SAFE_PORT_RANGE"  # then too: LOW-HIGH, for all ports but the public one
LOAD_TIMEOUT_S = 3600  # SageMaker's longest start-up limit; below it the platform decides
ALL_INTERFACES = "0.0.0.0"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

USAGE = f"""usage: serve [--help | --version]

Serves the model in {MODEL} on port {PORT} ({PORT_VARIABLE} sets another) until SIGTERM.
All other ports are from {RANGE_VARIABLE}, if that is set, such as 23000-23999.
/metrics is served on the same port; {PUBLIC_METRICS_VARIABLE}=off turns it off.
Temporary files and logs are written to the system's temporary folder (TMPDIR; default: /tmp)."""


class ContainerError(RuntimeError):
    """The container's input cannot be served. The message is one line for the endpoint's log."""


def find_model(root: Path) -> Path:
    """Return the folder of the packed model: `root`, or the only folder in it with a model. Raise `ContainerError`."""
    if (root / MANIFEST).is_file():
        return root
    found = sorted(path.parent.parent for path in root.glob(f"*/{MANIFEST}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ContainerError(f"{root} must hold one model, got {len(found)} ({_names(found)})")
    entries = sorted(root.iterdir()) if root.is_dir() else []
    raise ContainerError(
        f"no model in {root}: no {MANIFEST} there or in a folder below it, found {_names(entries) or 'nothing'}; "
        "pack one: ./build_mar.sh --sagemaker"
    )


def _names(paths: Sequence[Path]) -> str:
    shown = ", ".join(path.name for path in paths[:5])
    return f"{shown} and {len(paths) - 5} more" if len(paths) > 5 else shown


def public_port() -> int:
    """Return the port to listen on. Raise `ContainerError` for an invalid one."""
    text = os.environ.get(PORT_VARIABLE, PORT)
    if not text.isdecimal() or not 1 <= int(text) <= 65533:  # the next two ports are used too
        raise ContainerError(f"`{PORT_VARIABLE}` must be a port from 1 to 65533, got {text!r}")
    return int(text)


def safe_ports() -> range | None:
    """Return the range of all other ports, or None if they are free to choose. Raise `ContainerError`."""
    text = os.environ.get(RANGE_VARIABLE)
    try:
        return port_range(text) if text else None
    except argparse.ArgumentTypeError as err:
        raise ContainerError(f"`{RANGE_VARIABLE}` {err}") from None


def metrics_port(port: int, within: range | None) -> int:
    """Return the port of the metrics page, which is on loopback. Raise `ContainerError` if the range is too small."""
    try:
        return fixed_ports(port, "front", within)["metrics"]
    except ServeError as err:
        raise ContainerError(f"`{RANGE_VARIABLE}`: {err}") from None


def drop_root(model: Path) -> None:
    """Become an ordinary user for good.

    If only root can read a file of the model, stay root and print a message: the model could not be served otherwise.
    """
    if os.geteuid() != 0:
        return
    user = pwd.getpwnam(USER)
    os.setgroups([])
    os.setegid(user.pw_gid)
    os.seteuid(user.pw_uid)  # only the effective user, which can be undone
    unreadable = _unreadable(model)
    os.seteuid(0)
    os.setegid(0)
    if unreadable:
        print(f"serve: the user {USER} cannot read {unreadable}: serving as root", file=sys.stderr, flush=True)
        return
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    os.environ["HOME"] = user.pw_dir


def _unreadable(folder: Path) -> Path | None:
    """Return a folder or file of the model that the effective user cannot read, or None."""
    if not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
        return folder
    for parent, folders, files in os.walk(folder):
        for names, mode in ((folders, os.R_OK | os.X_OK), (files, os.R_OK)):
            for name in names:
                if not os.access(os.path.join(parent, name), mode, effective_ids=True):
                    return Path(parent, name)
    return None


def run_as_init(serve: Callable[[], int]) -> int:
    """Run `serve` in a child and return its exit code. Forward signals to it, and reap every orphaned process.

    The kernel makes orphans children of process 1: the engine of a killed worker, the worker of a killed java. The
    service cannot reap them, since it waits for java and HAProxy. tini could, but would have to stay root.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # no signal is lost between the fork and the handlers
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return serve()

    def forward(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):  # the child has just ended
            os.kill(child, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code  # killed by a signal: the exit code that a shell would report


def main(argv: Sequence[str] | None = None, root: Path = MODEL) -> int:
    """Serve the model in `root`. Return the exit code: 2 if it cannot be served."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if {"--help", "-h"} & set(arguments):
        print(USAGE)
        return 0
    if "--version" in arguments:
        print(version_line())
        return 0
    if arguments != ["serve"]:
        given = " ".join(arguments) or "nothing"
        print(f"serve: error: the argument must be serve, got {given!r}", file=sys.stderr)
        return 2
    try:
        model = find_model(root)
        port = public_port()
        within = safe_ports()
        metrics = metrics_port(port, within)
        drop_root(model)
    except ContainerError as err:
        print(f"serve: error: {err}", file=sys.stderr)
        return 2
    return run_as_init(lambda: serve_model(model, port, within, metrics))


def serve_model(model: Path, port: int, within: range | None, metrics: int) -> int:
    """Serve until a signal, and print metric lines. Return the exit code."""
    os.environ.setdefault(
        PUBLIC_METRICS_VARIABLE, "on"
    )  # SageMaker reads /metrics, and passes no client's request to it
    url = f"http://127.0.0.1:{metrics}/metrics"
    threading.Thread(target=metric_lines.main, args=(["--url", url],), name="metric_lines", daemon=True).start()
    words = ["--model-store", str(model.parent), "--name", model.name, "--host", ALL_INTERFACES, "--port", str(port)]
    if within is not None:
        words += ["--safe-ports", f"{within.start}-{within.stop - 1}"]
    return command.main([*words, "--timeout", str(LOAD_TIMEOUT_S)])
