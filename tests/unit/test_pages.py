"""docs/operations.md and the console name every log event at its level, and docs/protocol.md names every error code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_sessions.errors import STATUS_OF_CODE

REPO = Path(__file__).resolve().parents[2]
LEVELS = {"INFO": {"info"}, "WARNING": {"warning"}, "ERROR": {"error", "exception"}}
OPERATIONS = (REPO / "docs" / "operations.md").read_text(encoding="utf-8")
PROTOCOL = (REPO / "docs" / "protocol.md").read_text(encoding="utf-8")


def events(methods: set[str]) -> Iterator[str]:
    """Yield the first word of each log call of the handler by one of these methods."""
    for path in (REPO / "handler").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name("log"), attr=method),
                    args=[ast.Constant(value=str(text)), *_],
                ) if method in methods:
                    yield text.split()[0]


@pytest.mark.parametrize("level", LEVELS)
def test_operations_names_every_log_event_at_its_level(level: str) -> None:
    table = OPERATIONS.partition(f"Events at level {level}:\n")[2].strip().partition("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines()]
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(events(LEVELS[level]))


def test_the_console_names_the_level_of_every_error() -> None:
    """TorchServe logs what the worker prints at INFO. `logs --filter ERROR` must find the worker's errors too."""
    layout = (REPO / "deploy" / "serve" / "log4j2.xml").read_text(encoding="utf-8")
    named = re.search(r"\{\^INFO  \(([a-z_|]+)\) \}\{ERROR \$1 \}", layout)
    assert named is not None
    assert set(named[1].split("|")) == set(events(LEVELS["ERROR"]))


def test_protocol_names_every_error_code_with_its_status() -> None:
    missing = [code for code, status in STATUS_OF_CODE.items() if f"| {status} | `{code}` |" not in PROTOCOL]
    assert missing == []
