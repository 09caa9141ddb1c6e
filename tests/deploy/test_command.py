"""`python -m deploy.local_endpoint` as a user starts it, and the documented examples as printed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.local_endpoint.app import listen
from deploy.local_endpoint.command import main

from .conftest import ROOT


def example(page: str, marker: str) -> str:
    """Return the bash example with `marker` in the page's section about the local endpoint."""
    section = (ROOT / page).read_text().split("## A SageMaker endpoint on this machine")[1].split("\n## ")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if marker in block]
    return found.replace(".venv/bin/", f"{Path(sys.executable).parent}/")


@pytest.fixture
def command(shapes_store: Path) -> Iterator[subprocess.Popen]:
    """The command with one instance, once it says that it is ready; `said` has its words."""
    words = ["--instances", "1", "--port", "0", "--model-store", str(shapes_store)]
    command = subprocess.Popen(
        [sys.executable, "-m", "deploy.local_endpoint", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    command.said = ""
    for line in command.stdout:
        command.said += line
        if "Ctrl-C" in line:
            break
    yield command
    if command.poll() is None:
        command.kill()
    command.communicate()


def test_the_documented_examples_run_on_the_started_endpoint(command: subprocess.Popen) -> None:
    assert "loopback only; signatures are not checked" in command.said
    started = psutil.Process(command.pid).children(recursive=True)
    assert len(started) >= 3, "java, its worker and the guard"
    exports = dict(re.findall(r"(AWS_\w+)=(\S+)", command.said))
    assert exports["AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"].startswith("http://127.0.0.1:")

    def run(script: str) -> str:
        words = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(words, cwd=ROOT, env=os.environ | exports, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    by_boto3 = run(example("README.md", "boto3"))
    by_cli = run(example("docs/sagemaker.md", "invoke()"))
    answer = by_boto3.splitlines()[0]
    assert answer.startswith("There ")
    assert f'"response_text": "{answer}"' in by_cli
    assert "'finish_reason': 'stop'" in by_boto3

    command.send_signal(signal.SIGTERM)
    out, _ = command.communicate(timeout=60)
    assert command.returncode == 0
    assert "stopped in" in out
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_help_names_every_switch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    for option in ("--instances", "--port", "--name", "--model-store", "--model ", "--max-body-bytes", "--answer-s"):
        assert option in told
    for option in ("--stream-s", "--new-session", "--lost-instance", "--create-header", "loopback only"):
        assert option in " ".join(told.split())


def test_a_store_without_the_model_ends_in_one_line(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "deploy.local_endpoint", "--model-store", str(tmp_path), "--port", "0"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no archive 'llava'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_parts_of_a_stream_leave_at_once() -> None:
    """asyncio turns Nagle's algorithm off for sockets of this protocol number, and for no others."""
    with listen(0) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        with socket.create_connection((host, port)):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.proto == socket.IPPROTO_TCP
