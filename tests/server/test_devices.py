"""A real server with two engines on the CPU: both have sessions, and the death of one concerns its own only."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from llava_sessions.chat.transcript import short_id
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.chats import LONG, PatientChat, client
from tests.support.commands import eventually
from tests.support.encoding import to_png
from tests.support.placements import Placements
from tests.support.serving import Served, pack
from tests.support.wire import ChatSession

QUESTIONS = ("Which shapes are there?", "What is in the middle?")
PICTURES = [to_png(make_scene(seed).draw()) for seed in HELD_OUT_SEEDS[720:724]]
_BY_DEVICE = re.compile(r'^llava_engine_(\w+)\{device="([^"]+)"\} (\S+)$', re.MULTILINE)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(pack(tmp_path_factory.mktemp("devices"), sessions=16, devices="[cpu, cpu]")) as served:
        yield served


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with client(served.url) as http:
        yield http


def by_device(served: Served, gauge: str) -> dict[str, float]:
    """Return a gauge of each device."""
    page = httpx.get(served.server.worker_metrics_url, trust_env=False).text
    return {device: float(value) for name, device, value in _BY_DEVICE.findall(page) if name == gauge}


def stream(http: httpx.Client, chat: PatientChat, started: list[str]) -> dict:
    """Return the last line of a long answer."""
    for line in ChatSession(http, chat.session_id, "").stream("Say something long", **LONG):
        started.append(chat.session_id)
        last = line
    return last


def moved(chats: list[PatientChat], served: Served) -> list[PatientChat]:
    """Return the sessions that were rebuilt once, by the log."""
    found = Placements.read(served.log()).devices
    return [chat for chat in chats if len(found[short_id(chat.session_id)]) == 2]


def test_a_killed_engine_interrupts_and_moves_its_own_sessions_only(served: Served, http: httpx.Client) -> None:
    chats = [PatientChat(http).open(picture) for picture in PICTURES]
    first = [chat.ask(QUESTIONS[0]) for chat in chats]
    assert eventually(lambda: by_device(served, "sessions") == {"cpu:0": 2, "cpu:1": 2}), served.log()
    assert len(served.engine_pids) == 2
    worker = served.worker_pid
    started: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(stream, http, chat, started) for chat in chats]
        assert eventually(lambda: len(set(started)) == 4)
        os.kill(served.engine_pids[0], signal.SIGKILL)
        assert eventually(lambda: min(by_device(served, "up").values()) == 0)
        assert http.get("/ping").status_code == httpx.codes.OK
        lasts = [answer.result() for answer in answers]
    assert eventually(lambda: Placements.read(served.log()).lost)  # TorchServe writes the worker's lines a little later
    [lost] = Placements.read(served.log()).lost
    for chat, last in zip(chats, lasts, strict=True):
        [device] = Placements.read(served.log()).devices[short_id(chat.session_id)]
        if device == lost:
            assert last["error"]["code"] == "engine_restarting"
        else:
            assert last["finish_reason"] == "length"
    # The sessions of the dead engine answer at once, on the other one: the question that failed has left no trace.
    again = [chat.ask(QUESTIONS[1]) for chat in chats]
    assert eventually(lambda: len(moved(chats, served)) == 2)
    assert not Placements.read(served.log()).unexplained
    assert served.gauges(llava_rebuilds_total=2)["llava_rebuilds_total"] == 2
    assert served.worker_pid == worker
    assert eventually(lambda: by_device(served, "up") == {"cpu:0": 1, "cpu:1": 1})
    fresh = PatientChat(http).open(PICTURES[0])
    assert Placements.read(served.log()).lost == [lost]
    for chat, picture, before, after in zip(chats, PICTURES, first, again, strict=True):
        if chat in moved(chats, served):
            calm = PatientChat(http).open(picture)
            assert [calm.ask(question) for question in QUESTIONS] == [before, after]
            calm.close()
        chat.close()
    assert eventually(lambda: Placements.read(served.log()).devices.get(short_id(fresh.session_id)) == [lost])
    fresh.close()
    assert served.gauges(llava_open_sessions=0, llava_device_bytes=0)["llava_device_bytes"] == 0


def test_with_no_engine_left_the_server_waits_for_the_next(served: Served, http: httpx.Client) -> None:
    chat = PatientChat(http).open(PICTURES[0])
    answer = chat.ask(QUESTIONS[0])
    pids = served.engine_pids
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: http.get("/ping").status_code == httpx.codes.SERVICE_UNAVAILABLE)
    assert chat.ask(QUESTIONS[0]).prompt_tokens > answer.prompt_tokens
    assert eventually(lambda: http.get("/ping").is_success)
    chat.close()
