"""Fixtures of the server tests: one real TorchServe with the demo model for most files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.serve.configuration import PUBLIC_METRICS_VARIABLE
from deploy.serve.haproxy import HAProxy, find_haproxy
from deploy.serve.ports import free_ports
from deploy.serve.processes import Guard
from deploy.serve.torchserve import TorchServe
from tests.support.serving import pack, running

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "models" / "shapes"
MAX_SESSIONS = 64


@pytest.fixture(scope="session")
def model_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack the demo model."""
    return pack(tmp_path_factory.mktemp("packed"), MAX_SESSIONS)


@pytest.fixture(scope="package")
def server(model_store: Path) -> Iterator[TorchServe]:
    """Run a server. Tests close the sessions that they open."""
    with running(TorchServe(model_store)) as (server,):
        yield server


@pytest.fixture(scope="module")
def front(server: TorchServe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HAProxy]:
    """Run HAProxy with public metrics in front of the shared server."""
    home = tmp_path_factory.mktemp("m")
    (home / "logs").mkdir()
    guard = Guard()
    [port] = free_ports(1)
    ports = server.ports
    front = HAProxy(find_haproxy(), home, guard, port=port, target=ports["inference"], metrics=ports["worker_metrics"])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(PUBLIC_METRICS_VARIABLE, "on")
        front.start()
    front.open()
    yield front
    front.stop()
    guard.release()


@pytest.fixture(scope="package")
def http(server: TorchServe) -> Iterator[httpx.Client]:
    """Make a client for up to 200 requests at once."""
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=server.url, timeout=60, limits=limits, trust_env=False) as client:
        yield client


@pytest.fixture
def same_worker(server: TorchServe) -> Iterator[None]:
    """Check that the test leaves the worker process running."""
    before = server.worker_pids()
    assert len(before) == 1
    yield
    assert server.worker_pids() == before
