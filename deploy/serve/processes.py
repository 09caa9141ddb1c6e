"""Processes that must not outlive this one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

LOOPBACK = "127.0.0.1"

# Reads "watch PID", "done PID" and "released". If its input ends without a "released", it ends the process groups that
# are still watched: each PID leads one.
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
    """End the watched process groups and remove a folder if this process dies first (kill -9, crash, aborted tests).

    The guard is a process that waits on a pipe; only this process holds the other end. PR_SET_PDEATHSIG is no
    alternative: it fires when the *thread* that started the server ends, needs code between fork and exec, and exists
    on Linux only.
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
        """Guard the process group that this process leads."""
        self._send(f"watch {pid}")

    def done(self, pid: int) -> None:
        """Stop guarding a process group that was ended in order: the system may reuse its number."""
        self._send(f"done {pid}")

    def release(self) -> None:
        """End the guard without ending any process."""
        self._send("released")
        self._shell.communicate()

    def _send(self, line: str) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # the guard was killed, or released before
            self._shell.stdin.write(f"{line}\n".encode())
            self._shell.stdin.flush()


def kill_group(pid: int) -> None:
    """Kill every process of a group, without waiting for it. Safe in a signal handler."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
