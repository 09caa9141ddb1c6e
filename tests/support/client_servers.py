"""The servers for tests of the Python client: TorchServe, HAProxy, and a local endpoint over two instances."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.serve.haproxy import HAProxy, find_haproxy
from deploy.serve.ports import free_ports
from deploy.serve.processes import Guard
from deploy.serve.torchserve import TorchServe
from llava_sessions_client import AsyncEndpoint, Endpoint

from .local_endpoint import NAME
from .local_endpoint import Endpoint as LocalEndpoint
from .server_metrics import wait_for_metrics

SERVERS = ("torchserve", "haproxy", "endpoint")


@dataclass
class Servers:
    """The servers under test. `urls`: by name; the endpoint's is that of its runtime API."""

    urls: dict[str, str]
    instances: list[TorchServe]

    def open_sessions(self, timeout_s: float) -> list[float]:
        """Return how many sessions are open on each instance, once all are closed or after `timeout_s`."""
        pages = [wait_for_metrics(each.metrics_url, timeout_s, llava_open_sessions=0) for each in self.instances]
        return [page["llava_open_sessions"] for page in pages]


@contextlib.contextmanager
def serving(instances: list[TorchServe], home: Path) -> Iterator[Servers]:
    """Run HAProxy in front of the first of two instances, and a local endpoint over both. `home`: of HAProxy."""
    (home / "logs").mkdir(parents=True)
    guard = Guard()
    [port] = free_ports(1)
    ports = instances[0].ports
    front = HAProxy(find_haproxy(), home, guard, port=port, target=ports["inference"], metrics=ports["worker_metrics"])
    front.start()
    try:
        front.open()
        with LocalEndpoint(instances, cut_parts=True) as endpoint:
            urls = {"torchserve": instances[0].url, "haproxy": front.url, "endpoint": endpoint.url}
            yield Servers(urls, instances)
    finally:
        front.stop()
        guard.release()


def client_of(server: str, url: str, **options: Any) -> Endpoint:
    """Return the client for a server at `url`."""
    if server == "endpoint":
        return Endpoint(NAME, region="us-west-2", endpoint_url=url, **options)
    return Endpoint(url, **options)


def async_client_of(server: str, url: str, **options: Any) -> AsyncEndpoint:
    """Return the asynchronous client for a server at `url`."""
    if server == "endpoint":
        return AsyncEndpoint(NAME, region="us-west-2", endpoint_url=url, **options)
    return AsyncEndpoint(url, **options)
