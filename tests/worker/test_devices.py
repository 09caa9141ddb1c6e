"""The devices of a worker: which ones it takes, their engines' processes, and the file that announces their absence."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from llava_sessions.config import HandlerConfig
from llava_sessions.ipc.messages import CloseSession, EngineSettings
from llava_sessions.worker import devices, engines
from llava_sessions.worker.engines import EngineLost, EngineStartError, EngineUp, FromEngine
from llava_sessions.worker.inbox import Inbox
from llava_sessions.worker.supervisors import Absence, EngineSupervisors
from tests.support.fake_engine_process import FakeEngineProcess

PATIENCE_S = 60.0
DRIVER = """
int cuInit(unsigned int flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = 4; return 0; }
"""


@pytest.mark.parametrize(
    ("config", "gpu_id", "workers", "gpus", "expected"),
    [
        ({}, None, 1, 0, ("auto",)),
        ({}, 0, 1, 1, ("cuda:0",)),
        ({}, 0, 1, 4, ("cuda:0", "cuda:1", "cuda:2", "cuda:3")),
        ({}, None, 1, 2, ("cuda:0", "cuda:1")),
        ({}, 3, 4, 4, ("cuda:3",)),
        ({"device": "cuda:1"}, 0, 1, 4, ("cuda:1",)),
        ({"device": "cpu"}, 0, 1, 4, ("cpu",)),
        ({"devices": ["cuda:2", "cuda:3"]}, 0, 1, 4, ("cuda:2", "cuda:3")),
        ({"devices": ["cpu", "cpu"]}, None, 1, 0, ("cpu", "cpu")),
    ],
)
def test_auto_is_all_gpus_of_a_single_worker(
    config: dict, gpu_id: int | None, workers: int, gpus: int, expected: tuple[str, ...]
) -> None:
    read = HandlerConfig.model_validate({"checkpoint": "x", **config})
    assert devices.engine_devices(read, gpu_id, workers, lambda: gpus) == expected


def test_each_device_has_a_label_of_its_own() -> None:
    assert devices.device_labels(("cuda:1", "cuda:3")) == ("cuda:1", "cuda:3")
    assert devices.device_labels(("cpu", "cpu")) == ("cpu:0", "cpu:1")
    assert devices.device_labels(("cpu",)) == ("cpu",)


def test_gpus_are_counted_by_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert devices.visible_gpus() == 0, "no driver"
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None
    (tmp_path / "driver.c").write_text(DRIVER)
    command = [compiler, "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert devices.visible_gpus() == 4


def test_a_torch_for_the_cpu_has_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torch"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    found = importlib_spec(package)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: found)
    assert not devices._torch_has_cuda()
    (package / "lib" / "libtorch_cuda.so").touch()
    assert devices._torch_has_cuda()


def importlib_spec(package: Path):
    return devices.importlib.util.spec_from_file_location("torch", package / "__init__.py")


def test_the_absence_is_announced_while_no_engine_works(tmp_path: Path) -> None:
    file = tmp_path / "engine-absent-1"
    given_up: list[bool] = []
    absence = Absence(("cuda:0", "cuda:1"), lambda: given_up.append(True), file)
    absence.mark(0, True)
    assert not file.exists()
    absence.mark(1, True)
    assert file.exists()
    absence.mark(0, False)
    assert not file.exists()
    assert absence.give_up(1), "another engine works"
    absence.mark(0, True)
    assert absence.give_up(1), "the other may start again"
    absence.mark(1, False)
    assert absence.give_up(0), "the first one works again"
    absence.mark(1, True)
    assert not given_up
    assert not absence.give_up(1)
    assert given_up == [True]


class Worker:
    """Two engines under supervision."""

    def __init__(self, folders: list[Path], file: Path) -> None:
        self.inbox = Inbox()
        self.given_up = threading.Event()
        settings = [EngineSettings(str(folder), "", "float32", "cpu", 256, engines=2) for folder in folders]
        self.engines = EngineSupervisors(settings, self.inbox, 60, self.given_up.set, file, FakeEngineProcess)
        self.engines.launch()

    def next(self, engine: int, kind: type) -> object:
        """Return the next such item of an engine."""
        while True:
            item = self.inbox.get(PATIENCE_S)
            if isinstance(item, FromEngine) and item.engine == engine and isinstance(item.item, kind):
                return item.item


def test_engines_start_side_by_side_and_are_replaced_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(engines, "_LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(engines, "MAX_FAILED_STARTS", 2)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    file = tmp_path / "absent"
    worker = Worker(folders, file)
    assert len(worker.engines.wait()) == 2
    first, other = worker.engines.pids
    assert worker.engines.labels == ("cpu:0", "cpu:1")
    folders[0].rmdir()
    os.kill(first, signal.SIGKILL)
    assert isinstance(worker.next(0, EngineLost), EngineLost)
    assert eventually(lambda: "engine_unavailable device=cpu:0" in caplog.text)
    assert not worker.given_up.is_set(), "the other engine works"
    assert worker.engines.pids[1] == other
    assert not file.exists()
    os.kill(other, signal.SIGKILL)
    assert eventually(file.exists)
    folders[0].mkdir()
    worker.next(0, EngineUp)
    assert eventually(lambda: not file.exists())
    worker.engines.stop()


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.01)
    return False


def test_one_engine_that_does_not_start_ends_all_and_is_named(tmp_path: Path) -> None:
    worker = Worker([tmp_path, tmp_path / "nothing"], tmp_path / "absent")
    with pytest.raises(EngineStartError, match=r"^cpu:1: there is no checkpoint"):
        worker.engines.wait()
    assert eventually(lambda: all(not psutil.pid_exists(pid) or _is_zombie(pid) for pid in worker.engines.pids))


class BreaksOnce(FakeEngineProcess):
    """A process whose end one supervisor cannot wait for, once."""

    broken: ClassVar[list[int]] = []

    def await_end(self) -> None:
        if not self.broken:
            self.broken.append(self.pid)
            raise RuntimeError("a test")
        super().await_end()


def test_an_error_of_a_supervisor_is_the_loss_of_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(BreaksOnce, "broken", [])
    inbox = Inbox()
    settings = [EngineSettings(str(tmp_path), "", "float32", "cpu", 256, engines=2) for _ in range(2)]
    supervisors = EngineSupervisors(settings, inbox, 60, lambda: None, None, BreaksOnce)
    supervisors.launch()
    (first, _) = supervisors.wait()
    ended = supervisors.pids[0]
    first.client.submit(CloseSession([]))  # ends it with a TypeError: its pipe is closed a moment before its end
    # A new engine has none of the sessions: without the loss the worker would go on asking it for them.
    lost, up = (inbox.get(PATIENCE_S) for _ in range(2))
    assert (lost.engine, lost.item.reason) == (0, "RuntimeError: a test")
    assert not psutil.pid_exists(ended), "not even as a zombie"
    assert (up.engine, type(up.item)) == (0, EngineUp)
    supervisors.stop()


def test_an_error_of_the_first_start_is_reported_and_not_given_up(tmp_path: Path) -> None:
    given_up = threading.Event()

    def spawn(settings: EngineSettings) -> FakeEngineProcess:
        raise ValueError("a test")

    settings = [EngineSettings(str(tmp_path), "", "float32", "cpu", 256)]
    supervisors = EngineSupervisors(settings, Inbox(), 60, given_up.set, None, spawn)
    supervisors.launch()
    with pytest.raises(EngineStartError, match="ValueError: a test"):
        supervisors.wait()
    assert not given_up.is_set(), "it would end the process before the problem is logged"


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
