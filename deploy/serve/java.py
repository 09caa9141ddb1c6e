"""The java process of TorchServe's frontend.

Java is started directly, with the arguments that `torchserve --start --foreground` would give it. That launcher is one
process more, which dies on SIGTERM and leaves java and the workers running. Without it, a signal reaches the right
process and its exit code reaches us.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from .configuration import LOG_CONFIG, REPO
from .home import ServerHome
from .logs import NOISE
from .processes import Guard, ServeError, kill_group

MIN_JAVA = 17
# The first part of the heap is allocated at start: memory is constant in common use, so that a leak is visible.
FIRST_HEAP_MIB = 384
# The whole heap: an eighth of the memory, within these limits. A request takes about three times its body.
MIN_HEAP_MIB = 512
MAX_HEAP_MIB = 2048
# The memory limit of the container, in the files of cgroup v2 and v1.
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class JavaProcess:
    """Java and its workers as one process group. `quiet` writes java's console to a log instead of to stdout."""

    def __init__(self, home: ServerHome, guard: Guard | None, *, quiet: bool) -> None:
        self._home = home
        self._quiet = quiet
        self._own_guard = Guard(home.folder if home.is_temporary else None) if guard is None else None
        self._guard = guard or self._own_guard
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    @property
    def pid(self) -> int:
        """The process ID of java, which leads the process group."""
        if self._process is None:
            raise ServeError("the server is not started")
        return self._process.pid

    def start(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start java. Return at once."""
        with contextlib.ExitStack() as stack:
            log = stack.enter_context((self._home.logs / "console.log").open("ab")) if self._quiet else None
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log or subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self._home.folder,  # TorchServe writes some files into its working directory
                env=env,
                start_new_session=True,  # Ctrl-C reaches only us, and we stop java in order
            )
        if self._guard is not None:
            self._guard.watch(self._process.pid)
        if self._process.stdout is not None:
            threading.Thread(target=self._relay, args=(self._process.stdout,), daemon=True).start()

    def exit_code(self) -> int | None:
        """Return java's exit code, or None while it runs or if it was never started."""
        return self._process.poll() if self._process else None

    def stop(self, timeout_s: float) -> None:
        """Send SIGTERM to java, which ends its workers. Kill the rest of the group after `timeout_s`.

        May be called again, and for a process that never started or has died.
        """
        self._stopping = True
        if self._process is not None:
            if self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout_s)
            self.kill()
            self._process.wait()
            if self._guard is not None:
                self._guard.done(self._process.pid)
        if self._own_guard is not None:
            self._own_guard.release()
            self._own_guard = None
            self._guard = None

    def kill(self) -> None:
        """Kill every process of the group, without waiting for it. Safe in a signal handler."""
        if self._process is not None:
            kill_group(self._process.pid)

    def _relay(self, pipe: IO[bytes]) -> None:
        """Copy java's console to stdout without the lines of `NOISE` and without stack traces of a stop.

        Reads to the end even if stdout is closed, since a full pipe would stall java.
        """
        noise = tuple(line.encode() for line in NOISE)
        for line in pipe:
            if not self._stopping and not line.startswith(noise):
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.write(line.decode(errors="replace"))
                    sys.stdout.flush()


def java_command(
    home: ServerHome, config: Path, archive: Path, name: str, *, options: Sequence[str], log_level: str
) -> list[str]:
    """Return the command line of TorchServe's frontend. Raise `ServeError` without Java or TorchServe.

    The model store that TorchServe sees is the folder of the archive's version, so that it serves no other version.
    """
    site = _torchserve_site()
    command = [find_java(), f"-Dmodel_server_home={site}", f"-Dlog4j.configurationFile=file://{LOG_CONFIG}"]
    command += [f"-Djava.io.tmpdir={home.temp}", f"-Dllava.log.level={log_level}", *heap_options()]
    command += [*light_options(options), *options]
    command += ["-cp", str(site / "ts" / "frontend" / "*"), "org.pytorch.serve.ModelServer"]
    command += ["--python", sys.executable, "-f", str(config), "-s", str(archive.parent), "-ncs"]
    command += ["-m", f"{name}={archive.name}"]
    return command


def light_options(given: Sequence[str]) -> list[str]:
    """Return the JVM's options for little CPU time: on a CPU, Java takes the cores from the engine.

    One thread collects garbage, and the first compiler alone compiles. `given`: an operator's options. The JVM does not
    start with two collectors, so an operator's replaces ours.
    """
    collectors = [option for option in given if re.fullmatch(r"-XX:\+Use\w+GC", option)]
    return [*([] if collectors else ["-XX:+UseSerialGC"]), "-XX:TieredStopAtLevel=1"]


def heap_options(cgroup_limits: Sequence[Path] = CGROUP_LIMITS) -> list[str]:
    """Return the JVM's options for the heap. An operator's option of the same name follows them and wins."""
    heap_mib = min(max(_memory_bytes(cgroup_limits) // 8 >> 20, MIN_HEAP_MIB), MAX_HEAP_MIB)
    return [f"-Xms{FIRST_HEAP_MIB}m", f"-Xmx{heap_mib}m", "-XX:+AlwaysPreTouch"]


def _memory_bytes(cgroup_limits: Sequence[Path]) -> int:
    """Return the memory of the container, or of the machine if it is less (cgroup v1 writes a huge number for none)."""
    sizes = [psutil.virtual_memory().total]
    for path in cgroup_limits:
        with contextlib.suppress(OSError, ValueError):  # no such cgroup version; "max"
            sizes.append(int(path.read_text()))
    return min(sizes)


def find_java() -> str:
    """Return the path of Java, from JAVA_HOME or PATH. Raise `ServeError` if it is missing or older than 17."""
    java_home = os.environ.get("JAVA_HOME")
    java = str(Path(java_home, "bin", "java")) if java_home else shutil.which("java")
    script = REPO / "scripts" / "need_java.sh"
    help_line = f"TorchServe needs Java {MIN_JAVA} or later; {script} prints how to install it"
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


def _torchserve_site() -> Path:
    """Return the folder that contains the `ts` package."""
    spec = importlib.util.find_spec("ts")
    if spec is None or not spec.submodule_search_locations:
        raise ServeError("torchserve is not installed in this Python; run: make env")
    return Path(next(iter(spec.submodule_search_locations))).resolve().parent
