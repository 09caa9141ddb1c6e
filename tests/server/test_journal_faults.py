"""Shows on the real server that a journal which can't be written costs no chat: answers go on and say that they are not
durable, one warning and a metric tell the operator, and what is said to be durable is there after the worst end.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.serve.torchserve import TorchServe
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.server_metrics import wait_for_metrics
from tests.support.serving import pack, running
from tests.support.wire import ApiError, ChatSession

PICTURE = make_scene(HELD_OUT_SEEDS[0]).draw(72)
QUESTIONS = ["Which shapes are there?", "How many shapes are there?", "What is in the middle?"]


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / "sessions"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, journal: Path) -> Path:
    """The demo model with a journal in that directory."""
    return pack(tmp_path_factory.mktemp("faults"), 8, journal_dir=str(journal))


class FullDisk:
    """A directory on which nothing more can be written, and then can again."""

    def __init__(self, server: TorchServe, folder: Path) -> None:
        self._folder = folder
        self._filler = folder / ".filler"
        (self._worker,) = server.worker_pids()
        self._mounted = os.path.ismount(folder)
        self._limit = psutil.Process(self._worker).rlimit(resource.RLIMIT_FSIZE)

    def fill(self) -> None:
        """Take the last byte: of the file system, where it is one of its own, else of what the worker may write."""
        if not self._mounted:
            psutil.Process(self._worker).rlimit(resource.RLIMIT_FSIZE, (0, self._limit[1]))
            return
        with self._filler.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        assert os.statvfs(self._folder).f_bavail == 0

    def make_room(self) -> None:
        """Undo it."""
        if self._mounted:
            self._filler.unlink()
        else:
            psutil.Process(self._worker).rlimit(resource.RLIMIT_FSIZE, self._limit)


@pytest.fixture(scope="module")
def small_disk(journal: Path) -> Iterator[None]:
    """The journal's directory as a file system of one MiB, where we may mount one."""
    journal.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(journal)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield
    if mounted:
        subprocess.run(["umount", "-l", str(journal)], check=True, capture_output=True)


def undisturbed(http: httpx.Client) -> list[str]:
    """The answers of a session whose journal is well."""
    chat = ChatSession.open(http, PICTURE)
    answers = [chat.ask(question) for question in QUESTIONS]
    chat.close()
    assert [answer["durable"] for answer in answers] == [True] * len(QUESTIONS)
    return [answer["response_text"] for answer in answers]


def client(server: TorchServe) -> httpx.Client:
    """Make a client of the server itself, without HAProxy."""
    return httpx.Client(base_url=server.url, timeout=30, trust_env=False)


def warnings(server: TorchServe) -> list[str]:
    return [line for line in server.log_path.read_text().splitlines() if " journal_failing " in line]


def await_warning(server: TorchServe, timeout_s: float = 20) -> list[str]:
    """The warnings, once there is one: the log is written by another process."""
    until = time.monotonic() + timeout_s
    while not (found := warnings(server)) and time.monotonic() < until:
        time.sleep(0.05)
    return found


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_costs_durability_and_nothing_else(store: Path, journal: Path) -> None:
    with (
        running(TorchServe(store)) as (server,),
        httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http,
    ):
        expected = undisturbed(http)
        disk = FullDisk(server, journal)
        kept, late = ChatSession.open(http, PICTURE), ChatSession.open(http, PICTURE)
        assert kept.ask(QUESTIONS[0])["durable"] is True
        disk.fill()
        lost = ChatSession.open(http, PICTURE)
        said = [late.ask(question) for question in QUESTIONS[:2]]
        lost_said = lost.ask(QUESTIONS[0])
        assert [answer["durable"] for answer in [*said, lost_said]] == [False] * 3
        (warning,) = await_warning(server)
        assert "store=directory work=write" in warning
        assert "chats go on, turns are not durable" in warning
        failures = wait_for_metrics(server.metrics_url, llava_running_turns=0)["llava_journal_failures_total"]
        assert failures >= 4  # an open and three turns
        disk.make_room()
        said.append(late.ask(QUESTIONS[2]))
        assert said[-1]["durable"] is True
        assert [answer["response_text"] for answer in said] == expected
        assert lost_said["response_text"] == expected[0]
        assert len(warnings(server)) == 1
        server.kill()  # the worst end: nobody is asked to write anything more
    with (
        running(TorchServe(store)) as (server,),
        httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http,
    ):
        assert wait_for_metrics(server.metrics_url, llava_running_turns=0)["llava_open_sessions"] == 2
        again = ChatSession(http, kept.session_id, kept.expires)
        assert [again.ask(question)["response_text"] for question in QUESTIONS[1:]] == expected[1:]
        # The turns that were not durable came with the one that is.
        after = ChatSession(http, late.session_id, late.expires).ask(QUESTIONS[0])
        assert after["usage"]["prompt_tokens"] > said[-1]["usage"]["prompt_tokens"]
        with pytest.raises(ApiError, match="404 session_not_found"):
            ChatSession(http, lost.session_id, lost.expires).ask(QUESTIONS[1])
        for chat in (again, ChatSession(http, late.session_id, late.expires)):
            chat.close()


def test_a_directory_that_can_not_be_made_costs_durability_and_nothing_else(tmp_path: Path) -> None:
    parent = tmp_path / "a-file"
    parent.write_text("where a directory should be")
    store = pack(tmp_path / "packed", 4, journal_dir=str(parent / "sessions"))
    with (
        running(TorchServe(store)) as (server,),
        httpx.Client(base_url=server.url, timeout=30, trust_env=False) as http,
    ):
        (warning,) = await_warning(server)  # at start already
        assert "store=directory work=write" in warning
        chat = ChatSession.open(http, PICTURE)
        answers = [chat.ask(question) for question in QUESTIONS]
        assert [answer["durable"] for answer in answers] == [False] * len(QUESTIONS)
        failures = wait_for_metrics(server.metrics_url, llava_running_turns=0)["llava_journal_failures_total"]
        assert failures >= len(QUESTIONS) + 1
        assert len(warnings(server)) == 1
        parent.unlink()  # and the operator mends it
        mended = ChatSession.open(http, PICTURE)
        said = [mended.ask(question) for question in QUESTIONS]
        assert [answer["durable"] for answer in said] == [True] * len(QUESTIONS)
        assert [answer["response_text"] for answer in said] == [answer["response_text"] for answer in answers]
        chat.close()
        mended.close()
