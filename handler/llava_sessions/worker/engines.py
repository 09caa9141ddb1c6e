"""Start, supervise and replace one engine process, and send commands to it. `supervisors` does so for several.

A new engine holds no sessions. The inbox receives `EngineLost` when an engine has died, and `EngineUp` when another
one is ready.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import psutil

from ..ipc.messages import Command, EngineFacts, EngineSettings, Ping, Report, StartFailed
from ..ipc.pipe import receive, send

log = logging.getLogger(__name__)

# Resolved once: another model may be packed, and a link switched to it, before an engine is started again.
_PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])
# A ready engine that is silent for this long is pinged. It must answer within `hang_s`.
PING_S = 1.0
# As `startupTimeout` in model-config.yaml: longer than the largest checkpoint takes to load from a slow disk.
START_LIMIT_S = 900.0
# Time from the end of a process's pipe to the end of the process.
EXIT_S = 5.0
# Consecutive starts that may fail before the worker process ends too.
MAX_FAILED_STARTS = 5
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0


class EngineStartError(Exception):
    """The first engine could not be started; the message names the reason."""


@dataclass(frozen=True)
class EngineLost:
    """The engine process has ended. `retry_after_s`: the expected start-up time of the next one."""

    reason: str
    retry_after_s: int


@dataclass(frozen=True)
class EngineUp:
    """A new engine, which holds no session yet, takes commands from `client`."""

    client: CommandSink
    facts: EngineFacts | None


@dataclass(frozen=True)
class FromEngine:
    """An item of the inbox with the number of the engine that it is about."""

    engine: int
    item: Report | EngineLost | EngineUp


class CommandSink(Protocol):
    """Takes commands for an engine."""

    def submit(self, command: Command) -> None:
        """Take a command. Its events arrive as a `Report` in the inbox."""


class EventSink(Protocol):
    """Takes reports of the engine and news of its process."""

    def put(self, item: Report | EngineLost | EngineUp) -> None:
        """Take an item. Thread-safe."""


class EngineClient:
    """Sends commands to one engine process. Commands to an engine that has died are lost."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def submit(self, command: Command) -> None:
        """Queue a command. Never blocks, even if the pipe is full."""
        self._commands.put(command)

    def close(self) -> None:
        """Make `serve` return."""
        self._commands.put(None)

    def serve(self) -> None:
        """Write commands to the pipe until `close`, or until the engine has died."""
        while (command := self._commands.get()) is not None:
            try:
                send(self._pipe, command)
            except OSError:
                return  # the reader of the pipe reports it


class EngineProcess:
    """One child process that runs `module`, and the pipe to it."""

    module = "llava_sessions.engine.process"

    def __init__(self, settings: EngineSettings) -> None:
        """Start the process; the settings are its first message. Raise OSError if the system has no room for it."""
        ours, theirs = socket.socketpair()
        # The folder of the package comes first, wherever the archive was unpacked.
        path = os.pathsep.join(filter(None, [_PACKAGE_FOLDER, os.environ.get("PYTHONPATH")]))
        with contextlib.ExitStack() as on_error:
            on_error.callback(ours.close)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", self.module, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": path},
                )
            on_error.pop_all()
        self.pipe = Connection(ours.detach())
        self.pid = self._process.pid
        with contextlib.suppress(OSError):  # if the process died at once, the next read finds out
            send(self.pipe, settings)

    def is_stopped(self) -> bool:
        """Return whether the process was stopped by a signal (SIGSTOP)."""
        with contextlib.suppress(psutil.Error):
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        return False

    def await_end(self) -> None:
        """Wait for a process that has closed its pipe; kill it after `EXIT_S`."""
        try:
            self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Kill the process if it runs."""
        if self._process.poll() is None:
            self._process.kill()

    def end(self) -> None:
        """Kill the process, close the pipe and wait for the end."""
        self.kill()
        self.pipe.close()
        self._process.wait()

    def exit_reason(self) -> str:
        """Wait for the end and describe it."""
        code = self._process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class EngineSupervisor:
    """Keeps one engine process running. Puts reports, losses and new engines into the inbox, in order."""

    def __init__(
        self,
        settings: EngineSettings,
        inbox: EventSink,
        hang_s: float,
        give_up: Callable[[], bool],
        spawn: Callable[[EngineSettings], EngineProcess] = EngineProcess,
        *,
        mark: Callable[[bool], None] = lambda absent: None,
        label: str = "",
    ) -> None:
        """`hang_s`: silence after which an engine is killed; it must be longer than the longest step.

        `give_up` is called when starts keep failing, and returns whether to try again. `mark` is called with True when
        the engine is lost, and with False when an engine is ready. Both are called in the supervisor's thread. `spawn`
        starts a process, for tests. `label`: the device, for the log; by default the one that the engine reports.
        """
        self._settings = settings
        self._inbox = inbox
        self._hang_s = hang_s
        self._give_up = give_up
        self._spawn = spawn
        self._mark = mark
        self._label = label
        self._process: EngineProcess | None = None
        self._client: EngineClient | None = None
        self._has_reported = False
        self._start_s = 0.0
        self._is_hung = False
        self._is_stopping = False
        self._is_first = True
        self._first: queue.SimpleQueue[EngineUp | str] = queue.SimpleQueue()

    @property
    def pid(self) -> int | None:
        """Process ID of the current engine."""
        return None if self._process is None else self._process.pid

    def start(self) -> EngineUp:
        """Start the first engine and wait until it is ready. Raise `EngineStartError`."""
        self.launch()
        return self.wait()

    def launch(self) -> None:
        """Start the first engine without waiting; call `wait` next."""
        # One thread starts all engines: Linux kills a child with PR_SET_PDEATHSIG when its starting thread ends.
        threading.Thread(target=self._run, name="engine-supervisor", daemon=True).start()

    def wait(self) -> EngineUp:
        """Wait until the first engine is ready. Raise `EngineStartError`."""
        first = self._first.get()
        if isinstance(first, str):
            raise EngineStartError(first)
        threading.Thread(target=self._watch, name="engine-watchdog", daemon=True).start()
        return first

    def stop(self) -> None:
        """Kill the engine and start no other."""
        self._is_stopping = True
        if self._process is not None:
            self._process.kill()

    def _run(self) -> None:
        """Run engines until `stop`. No error may end this thread silently: without it the device is useless."""
        while not self._is_stopping:
            try:
                self._run_engines()
                return
            except Exception as error:
                log.exception("engine_supervisor_failed device=%s", self._label)
                if self._is_first:
                    self._first.put(f"{type(error).__name__}: {error}")
                    return
                if not self._give_up():
                    return
                time.sleep(_LONGEST_PAUSE_S)

    def _run_engines(self) -> None:
        failed = 0
        pause_s = _FIRST_PAUSE_S
        while not self._is_stopping:
            started = self._start_engine()
            if isinstance(started, EngineUp):
                self._mark(False)
                (self._first if self._is_first else self._inbox).put(started)
                self._is_first = False
                failed = 0
                pause_s = _FIRST_PAUSE_S
                self._serve_until_lost()
                continue
            if self._is_first:
                self._first.put(started)
                return
            failed += 1
            log.error(
                "engine_start_failed device=%s attempt=%d of=%d reason=%s",
                self._label,
                failed,
                MAX_FAILED_STARTS,
                started,
            )
            if failed >= MAX_FAILED_STARTS and not self._give_up():
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _start_engine(self) -> EngineUp | str:
        """Start a process and wait until it is ready. Return the reason if it is not."""
        began_s = time.monotonic()
        try:
            process = self._process = self._spawn(self._settings)
        except OSError as error:
            return f"the process could not be started: {error}"
        answer = self._await_ready(process)
        if isinstance(answer, str):
            process.end()
            return answer
        self._start_s = time.monotonic() - began_s
        self._label = self._label or answer.device
        self._client = EngineClient(process.pipe)
        return EngineUp(self._client, answer)

    def _await_ready(self, process: EngineProcess) -> EngineFacts | str:
        stopped_rounds = 0
        try:
            for _ in range(int(START_LIMIT_S / PING_S)):
                if process.pipe.poll(PING_S):
                    break
                stopped_rounds = stopped_rounds + 1 if process.is_stopped() else 0
                if stopped_rounds * PING_S > self._hang_s:
                    return f"it was stopped for {self._hang_s:g} s while starting"
            else:
                return f"it was not ready after {START_LIMIT_S:.0f} s"
            answer = receive(process.pipe)
        except (EOFError, OSError):
            process.await_end()
            return f"it ended while starting ({process.exit_reason()})"
        if isinstance(answer, EngineFacts):
            return answer
        return answer.problem if isinstance(answer, StartFailed) else f"unexpected message {type(answer).__name__}"

    def _serve_until_lost(self) -> None:
        """Forward reports until the engine has ended, and announce its end. An error of this thread ends it too."""
        process = self._process
        client = self._client
        assert process is not None
        assert client is not None
        try:
            reason = self._serve(process, client)
        except Exception as error:
            self._client = None
            client.close()
            process.kill()
            process.exit_reason()  # waits for the end: the process must not stay as a zombie
            self._announce_loss(f"{type(error).__name__}: {error}")
            raise
        self._announce_loss(reason)

    def _serve(self, process: EngineProcess, client: EngineClient) -> str:
        """Forward reports until the engine has ended. Return the reason of its end."""
        self._has_reported = True
        self._is_hung = False
        writer = threading.Thread(target=client.serve, name="engine-pipe", daemon=True)
        writer.start()
        self._forward_reports(process)
        self._client = None
        process.await_end()
        client.close()
        writer.join()  # before the pipe is closed: its file descriptor may be reused at once
        process.end()
        return f"no answer for {self._hang_s:g} s" if self._is_hung else process.exit_reason()

    def _announce_loss(self, reason: str) -> None:
        if not self._is_stopping:
            log.error("engine_lost device=%s reason=%s", self._label, reason)
            self._mark(True)
            self._inbox.put(EngineLost(reason, math.ceil(self._start_s) + 1))

    def _forward_reports(self, process: EngineProcess) -> None:
        try:
            while True:
                report = receive(process.pipe)
                self._has_reported = True
                if report.events:
                    self._inbox.put(report)
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("engine_pipe_broken")  # an unknown message: the rest of the stream cannot be trusted

    def _watch(self) -> None:
        """Ping a silent engine, and kill it if it stays silent. That ends its pipe, and with it the forwarding.

        Silence is counted in rounds of this thread, so a pause of the whole machine does not count.
        """
        silent_rounds = 0
        while not self._is_stopping:
            time.sleep(PING_S)
            client = self._client
            if client is None or self._has_reported:
                silent_rounds = 0
                self._has_reported = False
                continue
            silent_rounds += 1
            if silent_rounds == 1:
                client.submit(Ping())
            elif silent_rounds * PING_S > self._hang_s and self._process is not None:
                self._is_hung = True
                self._process.kill()
