"""The fake engine in a process of its own, behind the same pipe as the real one.

`EngineSettings.checkpoint` names a folder. If it does not exist, the engine reports that it can't start.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from llava_sessions.ipc.messages import EngineFacts, EngineSettings, Ping, Report, StartFailed
from llava_sessions.ipc.pipe import receive, send
from llava_sessions.worker.engines import EngineProcess
from tests.support.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
# Time that a start takes, for tests that stop an engine while it loads.
LOAD_S = 0.3


class FakeEngineProcess(EngineProcess):
    """Starts this module instead of the real engine."""

    module = "tests.support.fake_engine_process"


def main() -> None:
    """Serve until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(int(sys.argv[1]))
    settings: EngineSettings = receive(pipe)
    time.sleep(LOAD_S)
    if not Path(settings.checkpoint).is_dir():
        send(pipe, StartFailed(f"there is no checkpoint in {settings.checkpoint}"))
        sys.exit(1)
    send(pipe, EngineFacts("cpu", "float32", 4096, 0, 0))
    engine = FakeEngine()
    while True:
        try:
            while not engine.has_work or pipe.poll(0):
                command = receive(pipe)
                if isinstance(command, Ping):
                    send(pipe, Report([], engine.memory()))
                else:
                    engine.apply(command)
            for events in engine.phases():
                send(pipe, Report(events, engine.memory()))
        except (EOFError, OSError):
            os._exit(0)


if __name__ == "__main__":
    main()
