"""The engine's supervisor with processes of a fake engine: started, killed, stopped and kept from starting.

Two tests at the end are about the real engine's process.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from llava_sessions.ipc.messages import (
    Admitted,
    AskSession,
    EngineFacts,
    EngineSettings,
    Finished,
    OpenSession,
    Ping,
    Report,
    Sampling,
)
from llava_sessions.ipc.pipe import receive, send
from llava_sessions.worker import engines as supervisor_module
from llava_sessions.worker.engines import EngineClient, EngineLost, EngineStartError, EngineSupervisor, EngineUp
from tests.support.fake_engine_process import FakeEngineProcess

PATIENCE_S = 120.0
PING_S = 0.25
HANG_S = 1.5
HANDLER = Path(supervisor_module.__file__).parents[2]
# Starts an engine, tells its pid and waits to be killed.
PARENT = """
import queue, sys, time
from llava_sessions.ipc.messages import EngineSettings
from llava_sessions.worker.engines import EngineSupervisor
settings = EngineSettings(sys.argv[1], "", "float32", "cpu", 256)
supervisor = EngineSupervisor(settings, queue.SimpleQueue(), 60, give_up=lambda: None)
supervisor.start()
print(supervisor.pid, flush=True)
time.sleep(600)
"""


def settings(checkpoint: Path) -> EngineSettings:
    return EngineSettings(str(checkpoint), "", "float32", "cpu", 256)


class Kept:
    """A supervised engine, and what its user hears of it."""

    def __init__(self, checkpoint: Path, hang_s: float) -> None:
        """`checkpoint`: a folder that exists as long as engines can start."""
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.given_up = threading.Event()
        self.supervisor = EngineSupervisor(
            settings(checkpoint), self.inbox, hang_s, self.given_up.set, FakeEngineProcess
        )
        self.up = self.supervisor.start()

    def hear(self, kind: type) -> object:
        """The next thing of that kind; what else comes before is passed over."""
        while not isinstance(item := self.inbox.get(timeout=PATIENCE_S), kind):
            pass
        return item

    def answer(self, name: str) -> list[int]:
        """The answer to a conversation, from the engine that is up."""
        self.up.client.submit(OpenSession(name, [1, 2, 3], ()))
        self.up.client.submit(AskSession(name, name, [4, 5], Sampling(max_new_tokens=12)))
        told: list = []
        while not any(isinstance(event, Finished) for event in told):
            told += self.hear(Report).events
        assert Admitted(name) in told
        return told[-1].answer_ids

    def lose(self, harm: Callable[[int], None]) -> EngineLost:
        """Harm the engine, and wait for the next one; what was told of the loss."""
        pid = self.supervisor.pid
        harm(pid)
        lost = self.hear(EngineLost)
        self.up = self.hear(EngineUp)
        assert self.supervisor.pid != pid
        return lost


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor_module, "PING_S", PING_S)
        kept = Kept(tmp_path_factory.mktemp("checkpoint"), HANG_S)
        yield kept
        kept.supervisor.stop()


def ends(pid: int) -> bool:
    """Whether the process ends soon. One that nobody has waited for yet, as init may be slow to, has ended too."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_killed_engine_is_replaced_by_one_that_answers_alike(kept: Kept) -> None:
    before = kept.answer("before")
    files = psutil.Process().num_fds()
    lost = kept.lose(lambda pid: os.kill(pid, signal.SIGKILL))
    assert lost.reason == "signal SIGKILL"
    assert 1 <= lost.retry_after_s < PATIENCE_S
    assert kept.answer("after") == before
    assert psutil.Process().num_fds() == files


def test_a_stopped_engine_is_taken_for_hung_and_replaced(kept: Kept) -> None:
    before = kept.answer("before")
    lost = kept.lose(lambda pid: os.kill(pid, signal.SIGSTOP))
    assert lost.reason == "no answer for 1.5 s"
    assert kept.answer("after") == before


def test_an_engine_that_is_stopped_while_it_loads_is_replaced_too(kept: Kept, caplog) -> None:
    before, first = kept.answer("before"), kept.supervisor.pid
    os.kill(first, signal.SIGKILL)
    kept.hear(EngineLost)
    until = time.monotonic() + PATIENCE_S
    while (loading := kept.supervisor.pid) == first and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(loading, signal.SIGSTOP)
    kept.up = kept.hear(EngineUp)
    assert kept.supervisor.pid not in (first, loading)
    assert "reason=it was stopped for 1.5 s while starting" in caplog.text
    assert kept.answer("after") == before


def test_an_idle_engine_is_not_taken_for_hung(kept: Kept) -> None:
    pid = kept.supervisor.pid
    with pytest.raises(queue.Empty):
        kept.inbox.get(timeout=2.75)  # longer than hang_s and two rounds of the watchdog
    assert kept.supervisor.pid == pid


def test_what_a_dead_engines_door_is_given_is_lost_and_holds_nobody_up(kept: Kept) -> None:
    door, large = kept.up.client, AskSession("none", "none", list(range(1_000_000)), Sampling(1))

    def harm(pid: int) -> None:
        # Stopped, it does not empty its pipe: a writer in this thread would be here until the watchdog comes.
        os.kill(pid, signal.SIGSTOP)
        for _ in range(20):
            door.submit(large)

    kept.lose(harm)
    for _ in range(20):
        door.submit(large)
    assert kept.answer("after")


def test_a_checkpoint_that_is_not_there_is_an_error_that_says_so(tmp_path: Path) -> None:
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    nothing = EngineSupervisor(settings(tmp_path / "nothing"), inbox, 60, lambda: None, FakeEngineProcess)
    with pytest.raises(EngineStartError, match="nothing"):
        nothing.start()
    assert inbox.empty()
    assert ends(nothing.pid)


def test_it_gives_up_when_no_engine_starts_any_more(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(supervisor_module, "MAX_FAILED_STARTS", 2)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    kept = Kept(checkpoint, hang_s=60)
    checkpoint.rmdir()
    os.kill(kept.supervisor.pid, signal.SIGKILL)
    kept.hear(EngineLost)
    assert kept.given_up.wait(PATIENCE_S)
    assert kept.inbox.empty()
    assert ends(kept.supervisor.pid)


def test_an_engine_ends_with_the_worker_even_where_it_is_stopped(tiny: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("the death signal is Linux's")
    command = [sys.executable, "-c", PARENT, str(tiny)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(HANDLER)}, stdout=subprocess.PIPE) as parent:
        engine = int(parent.stdout.readline())
        os.kill(engine, signal.SIGSTOP)
        parent.kill()
    assert ends(engine)


def test_an_engine_ends_when_nobody_is_at_the_other_end_of_its_pipe(tiny: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        engine = subprocess.Popen(
            [sys.executable, "-m", "llava_sessions.engine.process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": str(HANDLER)},
        )
    pipe = Connection(ours.detach())
    send(pipe, settings(tiny))
    assert isinstance(receive(pipe), EngineFacts)
    send(pipe, Ping())
    assert receive(pipe).events == []
    pipe.close()
    assert engine.wait(PATIENCE_S) == 0


def test_a_door_that_is_closed_returns() -> None:
    ours, theirs = socket.socketpair()
    with Connection(ours.detach()) as pipe, Connection(theirs.detach()) as other:
        door = EngineClient(pipe)
        door.submit(Ping())
        door.close()
        door.serve()
        assert receive(other) == Ping()
