"""Fixtures of the server tests: one real TorchServe on the demo model for the whole run, and ways to look at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.serve.torchserve import TorchServe
from tests.support.serving import pack, running

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "models" / "shapes"
MAX_SESSIONS = 64


@pytest.fixture(scope="session")
def model_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, packed by the build kit."""
    return pack(tmp_path_factory.mktemp("packed"), MAX_SESSIONS)


@pytest.fixture(scope="package")
def server(model_store: Path) -> Iterator[TorchServe]:
    """A running server, on free ports and in a folder of its own. Tests close what they open."""
    with running(TorchServe(model_store)) as (server,):
        yield server


@pytest.fixture(scope="package")
def http(server: TorchServe) -> Iterator[httpx.Client]:
    """A client with room for many requests at once."""
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=server.url, timeout=60, limits=limits, trust_env=False) as client:
        yield client


@pytest.fixture
def same_worker(server: TorchServe) -> Iterator[None]:
    """The worker process that was there before the test is the one that is there after it."""
    before = server.worker_pids()
    assert len(before) == 1
    yield
    assert server.worker_pids() == before
