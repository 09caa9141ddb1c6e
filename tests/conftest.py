"""Set up every test run: how threads wait, how Java starts, Ctrl-C, and which tests share a worker of `pytest -n`.

Threads of OpenMP wait passively, here and in the servers that the tests start: on few shared cores a thread that spins
takes time from the others. OpenMP reads its variable when torch is imported.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import Scheduling

# Folders in the order in which they start. The longest come first, so that no worker waits for the other at the end.
FOLDERS = ("server", "deploy", "browser", "docs", "engine", "worker", "aws", "unit")
# Files that share a server. They run in one worker, so that the server starts once.
SHARED = (
    {f"tests/server/test_{name}.py" for name in ("chat", "fidelity", "figures", "front", "inside", "leaving")}
    | {f"tests/server/test_{name}.py" for name in ("conversations", "python_client", "refusals")},
    {
        f"tests/deploy/test_{name}.py"
        for name in ("aws_clients", "boto3", "cli", "invoke", "notebook", "python_client", "routing", "web_chat")
    }
    | {"tests/deploy/test_client_faults.py", "tests/deploy/test_client_lost.py"},
    {f"tests/deploy/test_{name}.py" for name in ("openai_path", "platform")},
    {f"tests/docs/test_{name}.py" for name in ("examples", "snippets")},
    {f"tests/browser/test_{name}.py" for name in ("access", "page")},
)

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Java's quick compiler alone: a start takes half the CPU time, and no test runs long enough to earn the rest back.
os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")

# Servers of the tests are on loopback, which no proxy reaches.
for variable in ("NO_PROXY", "no_proxy"):
    os.environ[variable] = ",".join(filter(None, ["127.0.0.1,localhost", os.environ.get(variable)]))

# A shell starts background jobs with Ctrl-C ignored, which their children inherit. Tests send it to processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by folder; inside a folder their order stays."""
    places = {name: place for place, name in enumerate(FOLDERS)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """Return a scheduler that sends each file, and the files of one entry of `SHARED`, to one worker.

    `--dist loadgroup` would do the same by marks, but pytest-xdist 3.8 has no effect on the test IDs of pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class FileScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((f"shared {number}" for number, files in enumerate(SHARED) if file in files), file)

    config.option.loadscopereorder = False  # it would start files with many tests first, not the longest ones
    return FileScheduling(config, log)
