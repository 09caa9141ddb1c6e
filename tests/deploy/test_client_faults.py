"""The Python client against TorchServe, HAProxy and the local endpoint over two instances, with faults between.

One chat per server and fault. Every operation of the chat meets the fault once. All chats run at the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from deploy.serve.haproxy import HAProxy, find_haproxy
from deploy.serve.ports import free_ports
from deploy.serve.processes import Guard
from deploy.serve.torchserve import TorchServe
from llava_sessions_client import (
    AsyncEndpoint,
    ClientError,
    ConnectionFailed,
    Endpoint,
    Retries,
    SessionLost,
    TimedOut,
    Timeouts,
)
from tests.support.client_chats import (
    MARKS,
    OPERATIONS,
    PICTURE,
    SHORT,
    Run,
    announced,
    run_async_chat,
    run_chat,
)
from tests.support.fault_proxy import BEFORE_REPLY, Fault, FaultProxy, Server, Stop
from tests.support.local_endpoint import NAME
from tests.support.local_endpoint import Endpoint as LocalEndpoint
from tests.support.server_metrics import wait_for_metrics

from .conftest import runtime_at

SERVERS = ("torchserve", "haproxy", "endpoint")
ODD = (1, 5, 3, 17, 2, 61)
# Of one call, all retries included: minutes on a busy machine. A silent connection is given up after `SILENT_S`.
TOTAL_S, SILENT_S = 120.0, 4.0
SLACK_S = 10.0
EVERYWHERE = OPERATIONS
# A silence costs its whole time-out.
SOMEWHERE = ("ask", "stream")
FAULTS = {
    "latency": (Fault(delay_s=0.05), EVERYWHERE),
    "a pause in mid-reply": (Fault(pause_s=0.1, at=5), EVERYWHERE),
    "single bytes": (Fault(pieces=(1,)), EVERYWHERE),
    "seven bytes": (Fault(pieces=(7,)), EVERYWHERE),
    "odd bytes": (Fault(pieces=ODD), EVERYWHERE),
    "a request cut short": (Fault(request_bytes=300, stop=Stop.END), EVERYWHERE),
    "a request reset": (Fault(request_bytes=0, stop=Stop.RESET), EVERYWHERE),
    "a half-closed request": (Fault(half_close=True), EVERYWHERE),
    "no reply": (Fault(stop=Stop.END, at=BEFORE_REPLY), EVERYWHERE),
    "a reset before the reply": (Fault(stop=Stop.RESET, at=BEFORE_REPLY), EVERYWHERE),
    "a lost reply": (Fault(stop=Stop.END, at=BEFORE_REPLY, server=Server.ANSWERS), EVERYWHERE),
    "a reply cut in its body": (Fault(stop=Stop.END, at=20), EVERYWHERE),
    "a reply reset in its body": (Fault(stop=Stop.RESET, at=20), EVERYWHERE),
    "a whole answer cut": (Fault(stop=Stop.END, at=30, server=Server.ANSWERS), EVERYWHERE),
    "a cut that the server misses": (Fault(stop=Stop.RESET, at=10, server=Server.CONTINUES), EVERYWHERE),
    "a half-closed reply": (Fault(stop=Stop.HALF_CLOSE, at=20), EVERYWHERE),
    "silence before the request": (Fault(request_bytes=0, stop=Stop.SILENCE), SOMEWHERE),
    "silence in mid-reply": (Fault(stop=Stop.SILENCE, at=20, server=Server.ANSWERS), SOMEWHERE),
}
ASYNCHRONOUS = ("odd bytes", "a lost reply", "a reply cut in its body", "a cut that the server misses")


@dataclass
class Servers:
    """The URL of each server; the endpoint's is that of its runtime API."""

    urls: dict[str, str]
    instances: list[TorchServe]
    cases: dict[tuple[str, ...], Future[Run]] = field(default_factory=dict)
    calm: dict[str, Run] = field(default_factory=dict)


def client_of(server: str, url: str, **options: object) -> Endpoint:
    """Return the client for a server at `url`."""
    if server == "endpoint":
        return Endpoint(NAME, boto_client=runtime_at(url), **options)
    return Endpoint(url, **options)


def async_client_of(server: str, url: str, **options: object) -> AsyncEndpoint:
    """Return the asynchronous client for a server at `url`."""
    if server == "endpoint":
        return AsyncEndpoint(NAME, boto_client=runtime_at(url), **options)
    return AsyncEndpoint(url, **options)
