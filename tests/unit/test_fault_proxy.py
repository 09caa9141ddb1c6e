"""Each fault of the proxy does what it says: with a real HTTP server, and httpx or a plain socket as the client."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.fault_proxy import BEFORE_REPLY, Fault, FaultProxy, Server, Stop
from tests.support.recorder import STREAMS, TEXT, Recorder, recording

PATIENCE_S = 20.0


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Run the server."""
    with recording() as recorder:
        yield recorder


@pytest.fixture
def proxy(recorder: Recorder) -> Iterator[FaultProxy]:
    """Run the proxy before the server."""
    with FaultProxy(f"http://127.0.0.1:{recorder.server_address[1]}") as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[httpx.Client]:
    """Make a client whose requests pass the proxy."""
    with httpx.Client(base_url=proxy.url, timeout=PATIENCE_S, trust_env=False) as client:
        yield client


def raw(proxy: FaultProxy, path: str = "/", body: bytes = b"x") -> socket.socket:
    """Send a request through a plain socket."""
    connection = socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), PATIENCE_S)
    connection.sendall(
        b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body)
    )
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Read until the stream ends."""
    parts = []
    while part := connection.recv(4096):
        parts.append(part)
    return b"".join(parts)


def eventually(values: list, count: int = 1) -> list:
    """Return the values once there are so many."""
    until = time.monotonic() + PATIENCE_S
    while len(values) < count and time.monotonic() < until:
        time.sleep(0.005)
    return values


def test_undisturbed_exchanges_share_one_connection(
    proxy: FaultProxy, client: httpx.Client, recorder: Recorder
) -> None:
    for number in range(3):
        assert client.post("/", content=str(number)).content == TEXT
    assert client.post("/stream", content="s").content == b"line\n" * 50
    assert recorder.received == [b"0", b"1", b"2", b"s"]
    assert recorder.connections == 1
    assert [exchange.ended for exchange in proxy.exchanges[:3]] == [True] * 3


def test_a_fault_meets_the_requests_that_it_was_planned_for(
    proxy: FaultProxy, client: httpx.Client, recorder: Recorder
) -> None:
    proxy.disturb(Fault(stop=Stop.END, at=BEFORE_REPLY), containing=b"ask", times=2)
    assert client.post("/", content="open").content == TEXT
    for _ in range(2):
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/", content="ask")
    assert proxy.waiting() == 0
    assert client.post("/", content="ask").content == TEXT


def test_latency_delays_the_request_and_the_reply(proxy: FaultProxy, client: httpx.Client) -> None:
    proxy.disturb(Fault(delay_s=0.1))
    began = time.monotonic()
    assert client.post("/", content="x").content == TEXT
    assert time.monotonic() - began >= 0.2


def test_a_pause_comes_in_mid_reply(proxy: FaultProxy) -> None:
    proxy.disturb(Fault(pause_s=0.2, at=3))
    connection = raw(proxy)
    with connection:
        seen, began = b"", time.monotonic()
        while not seen.endswith(TEXT[:3]):
            seen += connection.recv(1)
        connection.recv(1)
        assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_cut_sends_so_much_of_the_body(proxy: FaultProxy, at: int) -> None:
    proxy.disturb(Fault(stop=Stop.END, at=at))
    with raw(proxy) as connection:
        assert read_all(connection).partition(b"\r\n\r\n")[2] == TEXT[:at]


def test_a_cut_before_the_reply_sends_nothing(proxy: FaultProxy) -> None:
    proxy.disturb(Fault(stop=Stop.END, at=BEFORE_REPLY))
    with raw(proxy) as connection:
        assert read_all(connection) == b""


def test_a_reset_is_a_reset(proxy: FaultProxy, client: httpx.Client) -> None:
    proxy.disturb(Fault(stop=Stop.RESET, at=4), times=2)
    with raw(proxy) as connection, pytest.raises(ConnectionResetError):
        read_all(connection)
    with pytest.raises(httpx.ReadError):
        client.post("/", content="x")


def test_a_half_closed_reply_ends_but_the_client_can_still_send(proxy: FaultProxy) -> None:
    proxy.disturb(Fault(stop=Stop.HALF_CLOSE, at=2))
    with raw(proxy) as connection:
        assert read_all(connection).endswith(b"\r\n\r\n" + TEXT[:2])
        time.sleep(0.05)
        for _ in range(2):  # the second one would raise after a close in both directions
            connection.sendall(b"more")
            time.sleep(0.02)


def test_a_half_closed_request_is_answered(proxy: FaultProxy, client: httpx.Client, recorder: Recorder) -> None:
    proxy.disturb(Fault(half_close=True))
    assert client.post("/", content="x").content == TEXT
    with contextlib.suppress(httpx.ReadError):  # the client may use the connection before it sees its end
        assert client.post("/", content="y").content == TEXT
    assert client.post("/", content="z").content == TEXT
    assert recorder.connections == 2, "the half-closed connection carries no further request"


def test_silence_lasts_until_the_client_leaves(proxy: FaultProxy, recorder: Recorder) -> None:
    proxy.disturb(Fault(request_bytes=0, stop=Stop.SILENCE))
    proxy.disturb(Fault(stop=Stop.SILENCE, at=5))
    for received, beginning in (([], b""), ([b"x"], TEXT[:5])):
        with raw(proxy) as connection:
            seen = b""
            while not seen.endswith(beginning):
                part = connection.recv(1)
                assert part, "the proxy closed the connection"
                seen += part
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            assert recorder.received == received


def test_a_cut_request_is_never_whole_at_the_server(proxy: FaultProxy, recorder: Recorder) -> None:
    proxy.disturb(Fault(request_bytes=60, stop=Stop.RESET))
    with raw(proxy, body=b"x" * 100) as connection, pytest.raises(ConnectionResetError):
        read_all(connection)
    assert eventually(recorder.cut) == [100]
    assert recorder.received == []


def test_a_reply_can_be_lost_after_the_server_has_answered(proxy: FaultProxy, recorder: Recorder) -> None:
    proxy.disturb(Fault(stop=Stop.END, at=BEFORE_REPLY, server=Server.ANSWERS))
    with raw(proxy, "/stream") as connection:
        assert read_all(connection) == b""
    assert proxy.exchanges[0].answered, "the server has sent all of it before the client saw the end"
    assert eventually(recorder.lines) == [50]


def test_the_server_may_notice_a_cut_or_go_on(proxy: FaultProxy, recorder: Recorder) -> None:
    proxy.disturb(Fault(stop=Stop.END, at=20, server=Server.LEAVES))
    with raw(proxy, "/endless") as connection:
        assert len(read_all(connection).partition(b"\r\n\r\n")[2]) == 20
    assert eventually(recorder.lines)[0] < STREAMS["/endless"]
    proxy.disturb(Fault(stop=Stop.RESET, at=20, server=Server.CONTINUES))
    with raw(proxy, "/stream") as connection, pytest.raises(ConnectionResetError):
        read_all(connection)
    assert eventually(recorder.lines, 2)[1] == STREAMS["/stream"]


def test_a_client_that_leaves_leaves_the_server_too(proxy: FaultProxy, recorder: Recorder) -> None:
    with raw(proxy, "/endless") as connection:
        connection.recv(200)
    assert eventually(recorder.lines)[0] < STREAMS["/endless"]
    assert not proxy.exchanges[0].ended


@pytest.mark.parametrize("pieces", [(1,), (7,), (1, 5, 3)])
def test_pieces_cut_inside_characters(proxy: FaultProxy, client: httpx.Client, pieces: tuple[int, ...]) -> None:
    for piece_s in (0.0005, 0.005, 0.05, 0.5):  # a busy machine may read several pieces as one part
        proxy.disturb(Fault(pieces=pieces, piece_s=piece_s))
        with client.stream("POST", "/", content="x") as reply:
            parts = list(reply.iter_raw())
        assert b"".join(parts) == TEXT
        if any(part[0] & 0xC0 == 0x80 for part in parts):
            return
    pytest.fail("no part begins inside a character")


def test_many_exchanges_at_once(proxy: FaultProxy, client: httpx.Client, recorder: Recorder) -> None:
    proxy.disturb(Fault(pieces=(3,)), containing=b"odd", times=6)
    replies: list[bytes] = []

    def call(number: int) -> None:
        body = f"{'odd' if number % 2 else 'even'} {number}"
        replies.append(client.post("/", content=body).content)

    threads = [threading.Thread(target=call, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [TEXT] * 12
    assert len(recorder.received) == 12
    assert proxy.waiting() == 0
