"""Owns the engine process from the outside: starts it, talks to it, notices that it died or hangs, and replaces it.

Runs in the worker process. Must not know torch, sessions, payloads or TorchServe. What the engine held is lost with it;
whoever used it hears `EngineLost`, and `EngineUp` with a new door once another one answers.
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

import psutil

from ..ipc.messages import Command, EngineFacts, EngineSettings, Ping, StartFailed
from ..ipc.pipe import receive, send

log = logging.getLogger(__name__)

# Silence after which a ready engine is asked whether it still answers; then it has `hang_s` for that.
PING_S = 1.0
# Longer than the largest weights take from a slow disk: as `startupTimeout` in model-config.yaml.
START_LIMIT_S = 900.0
# What a process may take from the end of its pipe to its own.
EXIT_S = 5.0
# Engines in a row that never got ready, after which the worker ends too: something is wrong that a restart won't mend.
MAX_FAILED_STARTS = 5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0


class EngineStartError(Exception):
    """The engine could not be started; the message says why."""


@dataclass(frozen=True)
class EngineLost:
    """The engine is gone with all that it held. `retry_after_s`: how long the next one will probably take."""

    reason: str
    retry_after_s: int


@dataclass(frozen=True)
class EngineUp:
    """An engine that holds nothing yet is ready behind `door`."""

    door: EngineClient
    facts: EngineFacts


class EngineClient:
    """The way to one engine process. Once that is gone, what is submitted here is lost, as `EngineLost` tells."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def submit(self, command: Command) -> None:
        """Hand a command over. Never waits, even where the engine is stopped and the pipe is full."""
        self._commands.put(command)

    def close(self) -> None:
        """Have `serve` return."""
        self._commands.put(None)

    def serve(self) -> None:
        """Write commands until `close`, or until nobody reads."""
        while (command := self._commands.get()) is not None:
            try:
                send(self._pipe, command)
            except OSError:
                return  # the reader of the pipe notices too, and tells


class EngineSupervisor:
    """Keeps one engine process running, and tells `inbox` of reports, losses and new engines, in order."""

    def __init__(
        self, settings: EngineSettings, inbox: queue.SimpleQueue, hang_s: float, give_up: Callable[[], None]
    ) -> None:
        """`hang_s`: silence after which an engine is taken for hung and killed: longer than its longest step.

        `give_up` is called when no engine gets ready any more.
        """
        self._settings = settings
        self._inbox = inbox
        self._hang_s = hang_s
        self._give_up = give_up
        self._process: subprocess.Popen | None = None
        self._door: EngineClient | None = None
        self._heard = False
        self._start_s = 0.0
        self._hung = False
        self._stopping = False
        self._first: queue.SimpleQueue[EngineUp | str] = queue.SimpleQueue()

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return None if self._process is None else self._process.pid

    def start(self) -> EngineUp:
        """Start the first engine and wait until it answers. Raises `EngineStartError`."""
        self.launch()
        return self.wait()

    def launch(self) -> None:
        """Start the first engine; `wait` comes next."""
        # One thread for all engines: Linux ends a child that asked for it when the thread that started it ends.
        threading.Thread(target=self._run, name="engine-supervisor", daemon=True).start()

    def wait(self) -> EngineUp:
        """Wait until the first engine answers. Raises `EngineStartError`."""
        first = self._first.get()
        if isinstance(first, str):
            raise EngineStartError(first)
        threading.Thread(target=self._watch, name="engine-watchdog", daemon=True).start()
        return first

    def stop(self) -> None:
        """End the engine for good."""
        self._stopping = True
        self._kill()

    def _run(self) -> None:
        failed, pause_s, first = 0, _FIRST_PAUSE_S, True
        while not self._stopping:
            pipe = self._spawn()
            answer = self._await_start(pipe)
            if isinstance(answer, EngineFacts):
                failed, pause_s = 0, _FIRST_PAUSE_S
                up = EngineUp(EngineClient(pipe), answer)
                (self._first if first else self._inbox).put(up)
                first = False
                reason = self._serve(pipe, up.door)
                if self._stopping:
                    return
                log.error("engine_lost reason=%s", reason)
                self._inbox.put(EngineLost(reason, math.ceil(self._start_s) + 1))
                continue
            self._end(pipe)
            if first:
                self._first.put(answer)
                return
            failed += 1
            log.error("engine_start_failed attempt=%d of=%d reason=%s", failed, MAX_FAILED_STARTS, answer)
            if failed == MAX_FAILED_STARTS:
                self._give_up()
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _spawn(self) -> Connection:
        """Start a process with one end of a new pipe; settings are its first message."""
        ours, theirs = socket.socketpair()
        # The package's own folder first, wherever the archive was unpacked.
        folder = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llava_sessions.engine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        pipe = Connection(ours.detach())
        self._started_at = time.monotonic()
        with contextlib.suppress(OSError):  # where it died at once, the next read tells
            send(pipe, self._settings)
        return pipe

    def _await_start(self, pipe: Connection) -> EngineFacts | str:
        """What the engine turned out to be, or why there is none."""
        stopped_rounds = 0
        try:
            for _ in range(int(START_LIMIT_S / PING_S)):
                if pipe.poll(PING_S):
                    break
                stopped_rounds = stopped_rounds + 1 if self._is_stopped() else 0
                if stopped_rounds * PING_S > self._hang_s:
                    return f"it stood still for {self._hang_s:g} s while starting"
            else:
                return f"it was not ready after {START_LIMIT_S:.0f} s"
            answer = receive(pipe)
        except (EOFError, OSError):
            self._await_end()
            return f"it ended while starting ({self._exit()})"
        self._start_s = time.monotonic() - self._started_at
        return answer.problem if isinstance(answer, StartFailed) else answer

    def _serve(self, pipe: Connection, door: EngineClient) -> str:
        """Pass reports on until the engine is gone; why it is."""
        self._heard, self._hung = True, False
        writer = threading.Thread(target=door.serve, name="engine-pipe", daemon=True)
        writer.start()
        self._door = door
        try:
            while True:
                report = receive(pipe)
                self._heard = True
                if report.events:
                    self._inbox.put(report)
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("engine_pipe_broken")  # not a message of ours: nothing behind it can be trusted
        self._door = None
        self._await_end()
        door.close()
        writer.join()  # before its pipe is closed: the number of a closed one may soon name something else
        self._end(pipe)
        return f"no answer for {self._hang_s:g} s" if self._hung else self._exit()

    def _watch(self) -> None:
        """Ping an engine that is silent; kill one that stays so. That ends its pipe, and with it `_serve`.

        Counted in rounds of this thread: where the whole machine was paused, nobody was asked in that time.
        """
        silent_rounds = 0
        while not self._stopping:
            time.sleep(PING_S)
            door = self._door
            if door is None or self._heard:
                silent_rounds, self._heard = 0, False
                continue
            silent_rounds += 1
            if silent_rounds == 1:
                door.submit(Ping())
            elif silent_rounds * PING_S > self._hang_s:
                self._hung = True
                self._kill()

    def _is_stopped(self) -> bool:
        """Whether somebody stopped the process (SIGSTOP). While it loads it can't be asked."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED
        return False

    def _await_end(self) -> None:
        """A process that closed its pipe is about to end; one that does not is killed."""
        try:
            self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._kill()

    def _end(self, pipe: Connection) -> None:
        self._kill()
        pipe.close()
        self._process.wait()

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _exit(self) -> str:
        """How the process ended, in words."""
        code = self._process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
