"""Test on servers of their own that sessions expire, and that a worker without the session headers does not start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from bench import harness, sessions, users
from bench.users import Plan
from deploy.serve.configuration import CONFIG, LOG_CONFIG, render_properties
from deploy.serve.ports import choose_ports
from deploy.serve.torchserve import TorchServe
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.browser import PageServer, Visit, chromium
from tests.support.chats import LONG
from tests.support.commands import eventually, kill_tree
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


def test_the_web_chat_says_that_a_session_has_expired_and_opens_another(short_lived: TorchServe) -> None:
    with PageServer(short_lived.url) as server, chromium() as browser, Visit.to(browser, server.url) as visit:
        visit.may_fail = True
        visit.open()
        [chat] = server.app.state.chats.all()
        expired = chat.session.session_id
        expect(visit.page.locator("[data-banner]")).to_contain_text("The session of this chat has ended.")
        expect(visit.page.locator("[data-place=ended]")).to_be_attached()
        visit.page.locator("[data-text]").fill("Still there?")
        visit.page.locator("[data-text]").press("Enter")
        expect(visit.page.locator("[data-note]")).to_contain_text("The session of this chat has expired.")
        visit.page.locator(".turn [data-reopen]").click()
        assert eventually(lambda: chat.session.session_id != expired)


def test_the_bench_of_sessions_counts_what_becomes_of_each_user(short_lived: TorchServe, tmp_path: Path) -> None:
    """On the short-lived server, so that users who pause lose their session for certain. No test checks a time."""
    options = sessions.parse(["--smoke", "--url", short_lived.url, "--out", str(tmp_path)])
    run = harness.Run(options)
    pause_s = TTL_S + 1.0
    plan = Plan(turns=2, think_s=0.0, return_s=pause_s, expire_s=pause_s, tokens=6, picture_px=72)
    served = sessions.Server(short_lived.url, short_lived.openai_url, short_lived.worker_metrics_url)
    log, counted, left = sessions.measure(run, served, plan)
    run.finish(sessions.report(options, log, counted, left), sessions.paint)

    assert len(log.opens) == len(users.SCRIPTS)
    assert log.count("lost", users.RETURNS) == log.errors[users.RETURNS, "session_expired"] == 1
    assert log.count("recovered") + sum(n for (kind, _), n in log.errors.items() if kind == users.EXPIRES) == 1
    assert set(left) == set(sessions.MEMORY)
    assert not any(left.values())
    assert counted
    document = json.loads((tmp_path / "sessions.json").read_text())
    assert {row["users"] for row in document["rows"]} == set(sessions.LABELS)
    assert document["ratios"]["sessions lost"] == log.count("lost") > 0
    assert (tmp_path / "sessions.png").read_bytes().startswith(b"\x89PNG")


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
