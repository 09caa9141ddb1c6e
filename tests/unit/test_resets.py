"""Servers that reset each connection while a client opens it, under uvloop, as the death of an instance does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from deploy.local_endpoint.container_client import ContainerClient, Health
from deploy.local_endpoint.contract import Corners
from deploy.local_endpoint.pins import Instance
from llava_sessions_client.effects import Limits
from llava_sessions_client.errors import ConnectionFailed
from llava_sessions_client.http_async import AsyncHttpTransport
from llava_sessions_client.wire import Request

# Without the mend about one of eight attempts raised an AttributeError.
ROUNDS, AT_ONCE = 30, 10
RESET = struct.pack("ii", 1, 0)  # SO_LINGER


@pytest.fixture
def url() -> Iterator[str]:
    """URL of a server that resets each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_reset_all, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def _reset_all(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the end of the test
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.close()


def _run_all(attempt: Callable[[], Awaitable[None]]) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def rounds() -> None:
        for _ in range(ROUNDS):
            await asyncio.gather(*(attempt() for _ in range(AT_ONCE)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(rounds())


def test_the_endpoint_sees_that_the_instance_is_lost(url: str) -> None:
    client = ContainerClient(Corners())

    async def attempt() -> None:
        assert await client.ping(Instance(1, url, logs="")) is Health.LOST

    _run_all(attempt)


def test_the_client_raises_its_own_error(url: str) -> None:
    transport = AsyncHttpTransport(url)

    async def attempt() -> None:
        with pytest.raises(ConnectionFailed):
            await transport.call(Request({}), Limits(5, 5, 5, time.monotonic() + 5))

    _run_all(attempt)
