"""Test on servers of their own that sessions expire, and that a worker without the session headers does not start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.serve.configuration import CONFIG, LOG_CONFIG, render_properties
from deploy.serve.ports import choose_ports
from deploy.serve.torchserve import TorchServe
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.chats import LONG
from tests.support.commands import kill_tree
from tests.support.server_metrics import wait_for_metrics
from tests.support.serving import pack, running
from tests.support.wire import ApiError, ChatSession

SESSIONS, TTL_S = 8, 2
PICTURE = make_scene(HELD_OUT_SEEDS[0]).draw(72)


@pytest.fixture(scope="module")
def short_lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """Run a server with few sessions that expire after two seconds."""
    store = pack(tmp_path_factory.mktemp("short"), SESSIONS, dtype="auto", session_ttl_s=TTL_S)
    with running(TorchServe(store)) as (server,):
        yield server


def test_an_expired_session_is_gone_with_its_memory_and_its_place(short_lived: TorchServe) -> None:
    places = 2 * SESSIONS + 16  # of TorchServe, which by itself would keep each for two minutes more
    with httpx.Client(base_url=short_lived.url, timeout=30, trust_env=False) as http:
        for _ in range(places // SESSIONS + 1):
            chats = [ChatSession.open(http, PICTURE) for _ in range(SESSIONS)]
            with pytest.raises(ApiError, match="429 capacity"):
                ChatSession.open(http, PICTURE)
            gone = wait_for_metrics(short_lived.metrics_url, llava_open_sessions=0, llava_device_bytes=0)
            assert (gone["llava_open_sessions"], gone["llava_device_bytes"]) == (0, 0)
        for request in (lambda: chats[0].ask("Still there?"), chats[0].close):
            with pytest.raises(ApiError, match="410 session_expired"):
                request()


def test_a_worker_without_the_session_headers_refuses_to_start(model_store: Path, tmp_path: Path) -> None:
    """Started by hand with the stock launcher, and `. deploy/serve/local.env` forgotten."""
    config = tmp_path / "config.properties"
    properties = render_properties(CONFIG, choose_ports(), {})
    config.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TS_")}
    environment |= {"TMPDIR": str(tmp_path), "TEMP": str(tmp_path), "LOG_LOCATION": str(tmp_path / "logs")}
    options = ["--start", "--foreground", "--ncs", "--ts-config", config, "--log-config", LOG_CONFIG]
    options += ["--model-store", model_store, "--models", "llava"]
    log = tmp_path / "out.log"
    with log.open("w") as out:
        launcher = Path(sys.executable).with_name("torchserve")
        process = subprocess.Popen(
            [launcher, *map(str, options)], env=environment, stdout=out, stderr=out, cwd=tmp_path
        )
    try:
        wanted = r"startup_error the worker's TS_REQUEST_SEQUENCE_ID must be X-Amzn-SageMaker-Session-Id, got \(unset\)"
        until = time.monotonic() + 60
        while not re.search(wanted, log.read_text()):
            assert time.monotonic() < until, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.03)
    finally:
        kill_tree(process)
        process.wait()


def open_when_there_is_room(http: httpx.Client) -> ChatSession:
    """A chat as soon as TorchServe has a place for one: a sequence that ended keeps its own for `sequences.LINGER_S`,
    and on a fast machine more of them end in that time than there are places.
    """
    until = time.monotonic() + 20
    while True:
        try:
            return ChatSession.open(http, PICTURE)
        except ApiError as error:
            if error.status != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > until:
                raise
            time.sleep(0.1)


def test_closing_while_an_answer_runs_takes_nothing_from_the_frontend(short_lived: TorchServe) -> None:
    """Each of these would cost TorchServe a thread, if the sequence were ended at the wrong moment; it has 33."""
    with httpx.Client(base_url=short_lived.url, timeout=20, trust_env=False) as http:
        for _ in range(40):
            chat = open_when_there_is_room(http)
            lines = chat.stream("Say something long", **LONG)
            next(lines)
            assert chat.close().json()["success"] is True
            list(lines)
        chats = [open_when_there_is_room(http) for _ in range(SESSIONS)]
        assert {chat.ask("How many shapes are there?")["finish_reason"] for chat in chats} == {"stop"}
        for chat in chats:
            chat.close()
