"""The Python client against TorchServe, HAProxy and the local endpoint over two instances, with faults between.

One chat per server and fault. Every operation of the chat meets the fault once. All chats run at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import httpx
import pytest

from deploy.serve.torchserve import TorchServe
from llava_sessions_client import ConnectionFailed, TimedOut, Timeouts
from tests.support.chats import LONG
from tests.support.client_chats import (
    CLOSER,
    MARKS,
    OPERATIONS,
    PICTURE,
    SHORT,
    Run,
    Said,
    announced,
    run_async_chat,
    run_chat,
)
from tests.support.client_servers import SERVERS, Servers, async_client_of, client_of, serving
from tests.support.fault_proxy import BEFORE_REPLY, Fault, FaultProxy, Server, Stop
from tests.support.wire import SESSION_HEADER

# Of one call, all retries included: minutes on a busy machine. A silent connection is given up after `SILENT_S`.
TOTAL_S, SILENT_S = 240.0, 4.0
SLACK_S = 30.0
# Until a session expires whose open was answered, but by a reply that was lost.
CONFIRM_S = 20
FAULTS = {
    "latency, byte by byte": Fault(delay_s=0.03, pause_s=0.05, at=5, pieces=(1,)),
    "odd bytes": Fault(pieces=(7, 1, 5, 3, 17, 2, 61)),
    "a request cut short": Fault(request_bytes=300, stop=Stop.END),
    "a request reset": Fault(request_bytes=0, stop=Stop.RESET),
    "a half-closed request": Fault(half_close=True),
    "a reset before the reply": Fault(stop=Stop.RESET, at=BEFORE_REPLY),
    "a lost reply": Fault(stop=Stop.END, at=BEFORE_REPLY, server=Server.ANSWERS),
    "a reply cut in its body": Fault(stop=Stop.END, at=20),
    "a whole reply cut": Fault(stop=Stop.END, at=30, server=Server.ANSWERS),
    "a reset that the server misses": Fault(stop=Stop.RESET, at=10, server=Server.CONTINUES),
    "a half-closed reply": Fault(stop=Stop.HALF_CLOSE, at=20),
    "silence before the request": Fault(request_bytes=0, stop=Stop.SILENCE),
    "silence in mid-reply": Fault(stop=Stop.SILENCE, at=20, server=Server.ANSWERS),
}
# Each silence costs its time-out.
OPERATIONS_OF = dict.fromkeys(("silence before the request", "silence in mid-reply"), ("ask", "stream"))
CHATS_AT_ONCE = 12
ASYNCHRONOUS = ("odd bytes", "a lost reply", "a reply cut in its body")
CASES = [
    *((server, fault, "sync") for fault in FAULTS for server in SERVERS),
    *((server, fault, "async") for fault in ASYNCHRONOUS for server in SERVERS[1:]),
]


@dataclass
class Case:
    """A chat that runs or has run, and the proxy before its server."""

    proxy: FaultProxy
    chat: Future[Run]


@pytest.fixture(scope="module", autouse=True)
def credentials() -> Iterator[None]:
    """Give boto3 credentials for the local endpoint."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "any")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "any")
        yield


@pytest.fixture(scope="module")
def servers(instances: list[TorchServe], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Run HAProxy and a local endpoint in front of the instances."""
    with serving(instances, tmp_path_factory.mktemp("front")) as servers:
        yield servers


@pytest.fixture(scope="module")
def calm(servers: Servers) -> Run:
    """Hold the chat undisturbed. It is the same with every server."""
    runs = [run_chat(client_of(server, url), Run()) for server, url in servers.urls.items()]
    assert runs[0].answers == runs[1].answers == runs[2].answers
    assert runs[0].turns == runs[1].turns == runs[2].turns
    assert not any(said.replayed for said in runs[0].answers.values())
    return runs[0]


@pytest.fixture(scope="module")
def cases(servers: Servers, calm: Run) -> Iterator[dict[tuple[str, str, str], Case]]:
    """Start all chats, each through a proxy of its own."""
    with contextlib.ExitStack() as stack:
        proxies = contextlib.ExitStack()
        pool = ThreadPoolExecutor(CHATS_AT_ONCE)
        stack.enter_context(proxies)
        stack.callback(pool.shutdown, cancel_futures=True)
        yield {
            (server, fault, client): start_case(pool, proxies, servers.urls[server], server, fault, client)
            for server, fault, client in CASES
        }


def start_case(
    pool: ThreadPoolExecutor, stack: contextlib.ExitStack, url: str, server: str, fault: str, client: str
) -> Case:
    """Start a chat."""
    proxy = stack.enter_context(FaultProxy(url))
    harm = FAULTS[fault]
    silent_s = SILENT_S if harm.stop is Stop.SILENCE else TOTAL_S
    timeouts = Timeouts(
        first_byte_s=silent_s, between_s=silent_s, total_s=TOTAL_S, close_s=TOTAL_S, confirm_s=CONFIRM_S
    )
    run = Run(proxy, harm, OPERATIONS_OF.get(fault, OPERATIONS))

    def hold() -> Run:
        if client == "async":
            endpoint = async_client_of(server, proxy.url, timeout_s=timeouts)
            return asyncio.run(run_async_chat(endpoint, run))
        return run_chat(client_of(server, proxy.url, timeout_s=timeouts), run)

    return Case(proxy, pool.submit(hold))


@pytest.mark.parametrize(("server", "fault", "client"), CASES)
def test_a_disturbed_chat_is_as_if_undisturbed(
    servers: Servers, calm: Run, cases: dict[tuple[str, str, str], Case], server: str, fault: str, client: str
) -> None:
    """No turn is lost or runs twice, no call outlasts its time-out, and no session stays open."""
    case = cases[server, fault, client]
    run = case.chat.result()
    assert run.answers == calm.answers
    assert run.turns == calm.turns
    assert max(run.seconds.values()) < TOTAL_S + SLACK_S
    # At the endpoint, a session whose ID was lost with the reply expires by itself. A request would confirm it.
    for session in {run.session_id} if server == "endpoint" else announced(case.proxy):
        reply = httpx.post(
            f"{servers.urls['haproxy']}/invocations",
            json={"type": "cancel"},
            headers={SESSION_HEADER: session},
            trust_env=False,
            timeout=60,
        )
        assert reply.status_code == httpx.codes.NOT_FOUND, f"{session} is still open: {reply.text}"


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("answered", [False, True], ids=["unsent", "answered"])
def test_a_call_to_a_silent_server_ends_in_time_and_leaves_no_turn(
    servers: Servers, calm: Run, server: str, answered: bool
) -> None:
    """The question was never sent, or the server has answered it. The next question does not know of it."""
    silence = Fault(stop=Stop.SILENCE, at=BEFORE_REPLY, server=Server.ANSWERS)
    if not answered:
        silence = Fault(request_bytes=0, stop=Stop.SILENCE)
    with FaultProxy(servers.urls[server]) as proxy, client_of(server, proxy.url).open(PICTURE) as chat:
        proxy.disturb(silence, MARKS["ask"], times=100)
        began = time.monotonic()
        with pytest.raises(TimedOut):
            chat.ask("Is there a star?", timeout_s=1.0, **SHORT)
        assert time.monotonic() - began < 1.0 + Timeouts().close_s + SLACK_S
        assert chat.turns == ()
        proxy.forget()
        assert Said.by(chat.ask("Which shapes are there?", **SHORT)) == calm.answers["ask"]


@pytest.mark.parametrize("server", SERVERS)
def test_an_open_that_gets_no_reply_ends_in_time(servers: Servers, server: str) -> None:
    with FaultProxy(servers.urls[server]) as proxy:
        proxy.disturb(Fault(request_bytes=0, stop=Stop.SILENCE), times=100)
        began = time.monotonic()
        with pytest.raises(TimedOut):
            client_of(server, proxy.url, timeout_s=0.5).open(PICTURE)
        assert time.monotonic() - began < 2 * 0.5 + SLACK_S
    began = time.monotonic()
    with pytest.raises(ConnectionFailed):
        client_of(server, proxy.url, timeout_s=60).open(PICTURE)
    assert time.monotonic() - began < SLACK_S


@pytest.mark.parametrize("server", SERVERS)
def test_a_stream_that_is_left_leaves_no_turn(servers: Servers, calm: Run, server: str) -> None:
    with client_of(server, servers.urls[server]).open(PICTURE) as chat:
        for _ in chat.stream("Say something long", **LONG):
            break
        assert Said.by(chat.ask("Which shapes are there?", **SHORT)) == calm.answers["ask"]


@pytest.mark.parametrize("server", SERVERS)
def test_a_rewrite_keeps_the_pictures_of_the_open(servers: Servers, server: str) -> None:
    """The first question shows a picture of its own, or the session was opened with a history."""
    endpoint = client_of(server, servers.urls[server])
    with endpoint.open(PICTURE) as chat:
        asked = chat.ask("Which shapes are there?", images=[CLOSER], **SHORT)
        assert Said.by(chat.retry(**SHORT)) == Said.by(asked)
        turns = chat.turns
    with endpoint.open(PICTURE, history=turns) as chat:
        asked = chat.ask("Is there a circle?", **SHORT)
        assert Said.by(chat.retry(**SHORT)) == Said.by(asked)
    with endpoint.open(PICTURE, history=[("How many shapes are there?", "Two.")]) as chat:
        asked = chat.ask("Is there a circle?", **SHORT)
        assert Said.by(chat.retry(**SHORT)) == Said.by(asked)


def test_a_client_that_leaves_while_it_sends_is_no_error_of_the_endpoint(
    servers: Servers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    uvicorn = logging.getLogger("uvicorn.error")
    monkeypatch.setattr(uvicorn, "handlers", [*uvicorn.handlers, caplog.handler])
    with FaultProxy(servers.urls["endpoint"]) as proxy, client_of("endpoint", proxy.url).open(PICTURE) as chat:
        proxy.disturb(Fault(request_bytes=-10, stop=Stop.END), MARKS["ask"])
        chat.ask("Which shapes are there?", **SHORT)
        assert proxy.waiting() == 0
    assert not [record.getMessage() for record in caplog.records if record.name == "uvicorn.error"]


def test_no_session_stays_open(servers: Servers, cases: dict[tuple[str, str, str], Case]) -> None:
    """Also none whose ID was lost with the reply to its open."""
    wait([case.chat for case in cases.values()])
    assert servers.open_sessions(CONFIRM_S + 20) == [0, 0]
