"""What the servers that we start have in common: ports, the ends of their logs, and that nothing outlives us.

Must not know which programs these are.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
from pathlib import Path

LOOPBACK = "127.0.0.1"

# Reads "watch PID", "done PID" and "released". At the end of its input without a "released" it ends what is still
# watched: each PID leads a process group.
_GUARD = r"""
watched=""
while read -r word pid; do
  case "$word" in
    watch) watched="$watched $pid" ;;
    done)
      rest=""
      for one in $watched; do [ "$one" = "$pid" ] || rest="$rest $one"; done
      watched="$rest"
      ;;
    released) exit 0 ;;
  esac
done
for one in $watched; do kill -TERM "$one"; done
for _ in 1 2 3 4 5 6 7 8 9 10; do
  alive=""
  for one in $watched; do kill -0 "$one" && alive=yes; done
  [ -n "$alive" ] && sleep 1 || break
done
for one in $watched; do kill -KILL -- "-$one"; done
if [ -n "$1" ]; then rm -rf -- "$1"; fi
"""


class ServeError(RuntimeError):
    """A server cannot start, did not become ready, or died. The message is for the person at the terminal."""


class Guard:
    """Ends the process groups that it watches, and removes a folder, when we die without doing so (kill -9, a crash, an
    aborted test run).

    A process that waits on a pipe whose other end only we hold. PR_SET_PDEATHSIG would do without one, but it fires
    when the *thread* that started the server ends, needs code between fork and exec, and is Linux's alone.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(folder or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, pid: int) -> None:
        """From now on, the group of this leader must not outlive us."""
        self._tell(f"watch {pid}")

    def done(self, pid: int) -> None:
        """The group was ended in order; its number may soon be somebody else's."""
        self._tell(f"done {pid}")

    def release(self) -> None:
        """Nothing is left to guard."""
        self._tell("released")
        self._shell.communicate()

    def _tell(self, line: str) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # somebody ended it, or it was released before
            self._shell.stdin.write(f"{line}\n".encode())
            self._shell.stdin.flush()


def kill_group(pid: int) -> None:
    """End every process of a group, without waiting for it. Safe in a signal handler."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def free_ports(count: int, taken: set[int] | None = None) -> list[int]:
    """Ports that nothing listens on. From below the range that the kernel hands to outgoing connections: none of those
    can slip in before java binds, which takes seconds."""
    ports: list[int] = []
    for number in random.SystemRandom().sample(range(20000, 32000), 1000):
        if number not in (taken or set()) and is_free(number):
            ports.append(number)
        if len(ports) == count:
            return ports
    raise ServeError("no free ports on this machine")


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of loopback now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def file_size(path: Path) -> int:
    """In bytes; 0 where there is no file."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def tail(path: Path, count: int, since: int = 0) -> list[str]:
    """The last lines of a log, of what was written behind the first `since` bytes; all of it where it has rolled."""
    size = file_size(path)
    start = since if since <= size else 0
    try:
        with path.open("rb") as file:
            file.seek(max(start, size - (1 << 16)))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
