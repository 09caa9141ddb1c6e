"""The programs below docs/examples, and the chat in README, against the server that `make serve` starts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_sessions_client import Endpoint
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.snippets import ROOT, blocks

from .conftest import Server

ASSISTANT = ROOT / "docs" / "examples" / "photo_assistant.py"
DESCRIBE = "Which shapes are there?"
COUNT = "How many shapes are there?"


@pytest.fixture
def address(served: Server) -> str:
    return f"http://127.0.0.1:{served.port}"


def answers(address: str, picture: Path, *questions: str) -> list[str]:
    """Return the server's answers in a session of their own."""
    with Endpoint(address) as endpoint, endpoint.open(picture) as chat:
        return [str(chat.ask(question)) for question in questions]


def test_the_chat_of_readme_is_the_servers(address: str) -> None:
    [chat] = [block.text for block in blocks("README.md") if block.text.startswith("> ")]
    questions = re.findall(r"^> (.+)$", chat, re.MULTILINE)
    shown = re.findall(r"^(?!> )(.+)$", chat, re.MULTILINE)
    assert len(questions) >= 3
    assert shown == answers(address, ROOT / "picture.png", *questions)


def test_the_photo_assistant_answers_from_the_session_of_each_picture(address: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(ROOT / "picture.png", folder / "first.png")
    make_scene(HELD_OUT_SEEDS[9_000]).draw().save(folder / "second.png")
    (folder / "third.png").write_bytes(b"no picture")
    asked = f"second {COUNT}\nfirst {COUNT}\nthird {COUNT}\n"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "client")))
    done = subprocess.run(
        [sys.executable, str(ASSISTANT), str(folder), address],
        input=asked,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (answers(address, folder / f"{name}.png", DESCRIBE, COUNT) for name in ("first", "second"))
    assert done.stdout.splitlines() == [f"first: {first[0]}", f"second: {second[0]}", second[1], first[1]]
    failed, unknown = done.stderr.splitlines()
    assert failed.startswith("third: ")
    assert unknown == "expected one of first, second and a question"


def test_the_photo_assistant_has_forty_lines() -> None:
    assert len(ASSISTANT.read_text(encoding="utf-8").splitlines()) <= 40
