"""`python -m deploy.local_endpoint` as a user starts it. tests/docs runs the documented examples on it."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local_endpoint.app import listen
from deploy.local_endpoint.command import main

from .conftest import ROOT


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
