"""The container's `serve`: finds the model that SageMaker mounted, gives up root, and has the launcher serve it.

Owns: what SageMaker promises a container, and nothing of serving itself: where the model lies, which port to listen on,
which user to be; and the duties of process 1, which it is there (the Dockerfile's exec-form entrypoint): signals are
passed on to the launcher, and whatever dies without a parent is reaped. Must not know: what the model is.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from deploy.container import figures
from deploy.serve import command

MODEL = Path("/opt/ml/model")  # SageMaker puts the model there; read-only
MANIFEST = "MAR-INF/MANIFEST.json"
USER = "llava"  # made in the Dockerfile
PORT = "8080"
PORT_VARIABLE = "SAGEMAKER_BIND_TO_PORT"  # set where a container shares its host with others
LOAD_TIMEOUT_S = 3600  # SageMaker's longest start-up limit; within it the platform decides
EVERY_INTERFACE = "0.0.0.0"
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
METRICS_BEHIND = 2  # the launcher puts the metrics page on this port behind the public one, on loopback

USAGE = f"""usage: serve

Serves the model in {MODEL} on port {PORT} ({PORT_VARIABLE} chooses another) until SIGTERM.
Temporary files and logs go to the system's temporary folder (TMPDIR; default: /tmp)."""


class ContainerError(RuntimeError):
    """What the container was given can't be served. One line, for the person who reads the endpoint's log."""


def find_model(root: Path) -> Path:
    """The folder of the packed model: `root` itself, or the only folder in it that holds one."""
    if (root / MANIFEST).is_file():
        return root
    found = sorted(path.parent.parent for path in root.glob(f"*/{MANIFEST}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ContainerError(f"{root} holds {len(found)} models ({_names(found)}); wanted one")
    entries = sorted(root.iterdir()) if root.is_dir() else []
    raise ContainerError(
        f"no model in {root}: no {MANIFEST} there or in a folder below it, found {_names(entries) or 'nothing'}; "
        "pack one: ./build_mar.sh --sagemaker"
    )


def _names(paths: Sequence[Path]) -> str:
    shown = ", ".join(path.name for path in paths[:5])
    return f"{shown} and {len(paths) - 5} more" if len(paths) > 5 else shown


def chosen_port() -> int:
    """The port to listen on."""
    text = os.environ.get(PORT_VARIABLE, PORT)
    if not text.isdecimal() or not 1 <= int(text) <= 65533:  # the two after it are taken too
        raise ContainerError(f"{PORT_VARIABLE}={text!r}: wanted a port, 1 to 65533")
    return int(text)


def give_up_root(model: Path) -> None:
    """Go on as an ordinary user for good. Only where SageMaker left files that nobody but root may read do we stay
    root, and say so: a model that can't be read could not be served at all."""
    if os.geteuid() != 0:
        return
    user = pwd.getpwnam(USER)
    os.setgroups([])
    os.setegid(user.pw_gid)
    os.seteuid(user.pw_uid)  # only the effective one, so that there is a way back
    unreadable = _unreadable(model)
    os.seteuid(0)
    os.setegid(0)
    if unreadable:
        print(f"serve: {unreadable} can't be read by the user {USER}: going on as root", file=sys.stderr, flush=True)
        return
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    os.environ["HOME"] = user.pw_dir


def _unreadable(folder: Path) -> Path | None:
    """A folder or file in the model's folder that the effective user may not read, if there is one."""
    if not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
        return folder
    for parent, folders, files in os.walk(folder):
        for names, mode in ((folders, os.R_OK | os.X_OK), (files, os.R_OK)):
            for name in names:
                if not os.access(os.path.join(parent, name), mode, effective_ids=True):
                    return Path(parent, name)
    return None


def as_first(serve: Callable[[], int]) -> int:
    """Have a child `serve`; its exit code. Meanwhile signals go to it, and every process that the kernel hands to
    process 1 is reaped: a killed worker's engine, a killed java's worker. The launcher can't do that beside its own
    waiting for java and HAProxy, nor tini before it: that would have to stay root.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # none is lost between the fork and the handlers
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        return serve()

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code  # by a signal, as shells tell it


def main(argv: Sequence[str] | None = None, root: Path = MODEL) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments != ["serve"]:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        model, port = find_model(root), chosen_port()
        give_up_root(model)
    except ContainerError as err:
        print(f"serve: error: {err}", file=sys.stderr)
        return 2
    return as_first(lambda: launch_model(model, port))


def launch_model(model: Path, port: int) -> int:
    """Serve until a signal; the exit code."""
    # CloudWatch reads what it prints; autoscaling and the alarms of deploy/sagemaker/endpoint.yaml follow that.
    metrics = f"http://127.0.0.1:{port + METRICS_BEHIND}/metrics"
    threading.Thread(target=figures.main, args=(["--url", metrics],), name="figures", daemon=True).start()
    words = ["--model-store", str(model.parent), "--name", model.name, "--host", EVERY_INTERFACE, "--port", str(port)]
    return command.main([*words, "--timeout", str(LOAD_TIMEOUT_S)])


if __name__ == "__main__":
    sys.exit(main())
