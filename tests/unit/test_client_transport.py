"""The client's transports end in time, however slowly the bytes of a reply arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from llava_sessions_client import TimedOut
from llava_sessions_client.effects import Limits
from llava_sessions_client.http import HttpTransport
from llava_sessions_client.http_async import AsyncHttpTransport
from llava_sessions_client.wire import Request
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.recorder import recording

REQUEST = Request({"type": "cancel"}, "a-session")
# The head of the reply takes minutes. Each of its bytes arrives in time.
DRIP = Fault(pieces=(1,), piece_s=0.9)


def call(url: str, limits: Limits) -> None:
    """Send a request with the synchronous client."""
    transport = HttpTransport(url)
    try:
        transport.call(REQUEST, limits)
    finally:
        transport.close()


async def call_async(url: str, limits: Limits) -> None:
    """Send a request with the asynchronous client."""
    transport = AsyncHttpTransport(url)
    try:
        await transport.call(REQUEST, limits)
    finally:
        await transport.close()


@pytest.mark.parametrize("send", [call, lambda *arguments: asyncio.run(call_async(*arguments))], ids=["sync", "async"])
def test_a_head_that_arrives_byte_by_byte_has_the_time_of_one_reply(send: Callable[[str, Limits], None]) -> None:
    with recording() as server, FaultProxy(f"http://127.0.0.1:{server.server_address[1]}") as proxy:
        proxy.disturb(DRIP)
        began = time.monotonic()
        limits = Limits(connect_s=10, first_byte_s=1, between_s=1, deadline_s=began + 2)
        with pytest.raises(TimedOut):
            send(proxy.url, limits)
        assert time.monotonic() - began < 60
