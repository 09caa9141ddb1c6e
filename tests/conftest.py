"""Set up every test run: how threads wait, how Java starts, Ctrl-C, and which tests share a worker of `pytest -n`.

Threads of OpenMP wait passively, here and in the servers that the tests start: on few shared cores a thread that spins
takes time from the others. OpenMP reads its variable when torch is imported.
"""

from __future__ import annotations

import os
import signal

import pytest

# Folders in the order in which they start. The longest come first, so that no worker waits for the other at the end.
FOLDERS = ("server", "deploy", "engine", "aws", "worker", "unit")
# Fixtures that start servers for several files. Their tests run in one worker, so that each server starts once.
SHARED_SERVERS = ("server", "instances", "stand_in")

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Java's quick compiler alone: a start takes half the CPU time, and no test runs long enough to earn the rest back.
os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")

# Each worker of `pytest -n` chooses ports from a range of its own. Two servers that start at the same time would else
# find the same port free.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    first_port = 20_000 + 2_000 * (int(worker.removeprefix("gw")) % 6)
    os.environ["LLAVA_FREE_PORTS"] = f"{first_port}-{first_port + 1_999}"

# A shell starts background jobs with Ctrl-C ignored, which their children inherit. Tests send it to processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give each test its group for `--dist loadgroup`: the server that it shares, else its file."""
    if item.get_closest_marker("xdist_group") is None:
        fixtures = getattr(item, "fixturenames", ())
        shared = [name for name in SHARED_SERVERS if name in fixtures]
        item.add_marker(pytest.mark.xdist_group(shared[0] if shared else f"{item.path.parent.name}/{item.path.stem}"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by folder; inside a folder their order stays."""
    places = {name: place for place, name in enumerate(FOLDERS)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(places)))
