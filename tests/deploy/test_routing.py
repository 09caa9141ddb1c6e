"""Many sessions on two instances, and the death of one: every turn reaches the instance of its session, and no answer
is another one than it would be with nobody else there.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError, EventStreamError

from deploy.local_endpoint.contract import Corners
from deploy.serve.torchserve import TorchServe
from models.shapes.scenes import dialogue, make_scene
from tests.support.chats import LONG
from tests.support.server_metrics import read_metrics, wait_for_metrics
from tests.support.serving import running

from .conftest import NAME, Endpoint, ask, close_session, open_session, runtime, seed_of

SESSIONS, TURNS = 40, 10
# Each picture is shown in several sessions, none of them neighbours, so that the calm runs stay short.
# ROUTING_PICTURES=40 gives each session its own.
PICTURES = int(os.environ.get("ROUTING_PICTURES", "8"))
SHORT = {"max_new_tokens": 8}
FIRST = 100  # of the pictures


def questions(index: int) -> list[str]:
    """A dialogue about the picture."""
    return [question.text for question in dialogue(make_scene(seed_of(index)), seed_of(index), TURNS)]


def calm(client: BaseClient, index: int) -> list[str]:
    """What is answered when nobody else is there."""
    session = open_session(client, index)
    replies = [ask(client, session, text, **SHORT) for text in questions(index)]
    close_session(client, session)
    return texts(replies)


def turns_total(servers: list[TorchServe]) -> list[float]:
    """Turns that each of the idle instances has answered. They tell them at most a second late."""
    totals, before = [], None
    while totals != before:
        before, totals = totals, [read_metrics(server.metrics_url).get("llava_turns_total", 0) for server in servers]
        time.sleep(1.2)
    return totals


def test_four_hundred_turns_reach_their_instances_and_none_is_answered_wrong(instances: list[TorchServe]) -> None:
    with Endpoint(instances) as endpoint:
        client, pins = runtime(endpoint), endpoint.service.pins
        alone = [calm(client, FIRST + index) for index in range(PICTURES)]
        assert len(set(map(tuple, alone))) == PICTURES, "the chats differ"
        shown = [index % PICTURES for index in range(SESSIONS)]
        sessions = [open_session(client, FIRST + index) for index in shown]
        assert pins.open_sessions() == {1: SESSIONS // 2, 2: SESSIONS // 2}
        before = turns_total(instances)

        def chat_of(index: int) -> list[str]:
            replies = [ask(client, sessions[index], text, **SHORT) for text in questions(FIRST + shown[index])]
            assert {reply["session_id"] for reply in replies} == {sessions[index]}
            assert all(reply["usage"]["cached_tokens"] > 0 for reply in replies)
            return texts(replies)

        with ThreadPoolExecutor(SESSIONS) as pool:
            answers = list(pool.map(chat_of, range(SESSIONS)))
        assert answers == [alone[index] for index in shown]
        share = SESSIONS // 2 * TURNS
        for server, total in zip(instances, before, strict=True):
            told = wait_for_metrics(server.metrics_url, llava_turns_total=total + share)
            assert told["llava_turns_total"] == total + share
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda session: close_session(client, session), sessions))
        assert pins.open_sessions() == {1: 0, 2: 0}


@pytest.fixture
def doomed(shapes_store: Path) -> Iterator[TorchServe]:
    """An instance that the test may kill."""
    with running(TorchServe(shapes_store)) as (server,):
        yield server


def lost(client: BaseClient, session: str) -> str:
    """How a session on a dead instance is answered; that must be soon."""
    began = time.monotonic()
    with pytest.raises(ClientError) as caught:
        ask(client, session, "Which shapes are there?")
    assert time.monotonic() - began < 2
    response = caught.value.response
    return f"{response['Error']['Code']} {response.get('OriginalStatusCode', '')}".strip()


def test_a_dead_instance_takes_no_session_along_that_is_sent_to_another(
    instances: list[TorchServe], doomed: TorchServe
) -> None:
    """One death, seen by three endpoints, each with another answer to what the real platform does then.

    Where the platform sends the session's requests to another instance, that one adopts the session.
    """
    answers = {"400": "ValidationError", "503": "ServiceUnavailable", "reroute": None}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        corners = [Corners(lost_instance=kind) for kind in answers]
        endpoints = [stack.enter_context(Endpoint([instances[0], doomed], corner)) for corner in corners]
        clients = [runtime(endpoint) for endpoint in endpoints]
        homes = [open_on_both(endpoint, client) for endpoint, client in zip(endpoints, clients, strict=True)]
        expected = texts(chat(clients[0], homes[0][1].pop()))
        broken = endless(clients[0], homes[0][2].pop())
        next(broken)

        others = [pool.submit(chat, client, home[1][0]) for client, home in zip(clients, homes, strict=True)]
        doomed.kill()
        with pytest.raises(EventStreamError, match="ModelStreamError"):
            list(broken)
        before = read_metrics(instances[0].metrics_url).get("llava_rebuilds_total", 0)
        for client, home, told in zip(clients, homes, answers.values(), strict=True):
            if told is not None:
                assert lost(client, home[2][0]) == told
                continue
            moved = chat(client, home[2][0])
            assert texts(moved) == expected, "the session goes on at the other instance, under the same ID"
            assert {reply["session_id"] for reply in moved} == {home[2][0]}
            # The first one may share the opening of another session here.
            assert all(reply["usage"]["cached_tokens"] > 0 for reply in moved[1:])
            assert close_session(client, home[2][0])["ClosedSessionId"] == home[2][0]
        assert [texts(other.result()) for other in others] == [expected] * len(others)
        wait_for_metrics(instances[0].metrics_url, llava_rebuilds_total=before + 1)
        assert read_metrics(instances[0].metrics_url)["llava_rebuilds_total"] == before + 1, "in one prefill"

        for endpoint, client, home in zip(endpoints, clients, homes, strict=True):
            new = [open_session(client, FIRST) for _ in range(3)]
            assert {endpoint.service.pins.find(session).number for session in new} == {1}
            assert ask(client, new[0], questions(FIRST)[0], **SHORT)["response_text"] == expected[0]
            for session in [*new, *home[1]]:
                close_session(client, session)


def open_on_both(endpoint: Endpoint, client: BaseClient) -> dict[int, list[str]]:
    """Two sessions on each of two instances, by the instance's number."""
    homes: dict[int, list[str]] = {1: [], 2: []}
    for _ in range(4):
        session = open_session(client, FIRST)
        homes[endpoint.service.pins.find(session).number].append(session)
    assert [len(home) for home in homes.values()] == [2, 2]
    return homes


def chat(client: BaseClient, session: str) -> list[dict]:
    """A whole dialogue in an open session."""
    return [ask(client, session, text, **SHORT) for text in questions(FIRST)]


def texts(replies: list[dict]) -> list[str]:
    """What was said."""
    return [reply["response_text"] for reply in replies]


def endless(client: BaseClient, session: str) -> Iterator[dict]:
    """A stream that goes on for seconds."""
    body = {"type": "send_text_prompt", "prompt_text": "Tell me more.", "stream": True, **LONG}
    reply = client.invoke_endpoint_with_response_stream(
        EndpointName=NAME, ContentType="application/json", Body=json.dumps(body), SessionId=session
    )
    return iter(reply["Body"])
