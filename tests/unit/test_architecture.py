"""docs/architecture.md names the code as it is: the functions of the six hops, and every transition."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from llava_sessions.worker.states import TRANSITIONS, Residency, SessionState, TurnState

REPO = Path(__file__).parents[2]
PAGE = (REPO / "docs" / "architecture.md").read_text()


def section(heading: str) -> str:
    return PAGE.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]


def names_in(module: str) -> set[str]:
    """All functions and methods of a module, as `function` and `Class.method`. The module is not imported."""
    path = REPO / "handler" / (module.replace(".", "/") + ".py")
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def test_every_function_of_the_six_hops_exists() -> None:
    hops = [line for line in section("## The six hops").splitlines() if re.match(r"\| \d ", line)]
    assert [line.split("|")[1].strip() for line in hops] == list("123456")
    for line in hops:
        functions = re.findall(r"`([\w.]+):([\w.]+)`", line)
        assert functions, line
        for module, name in functions:
            assert name in names_in(module), f"{module}:{name}"


@pytest.mark.parametrize("kind", [SessionState, Residency, TurnState])
def test_the_state_diagrams_show_every_transition(kind: type[SessionState | Residency | TurnState]) -> None:
    edges = set(re.findall(r"^ +(\w+) --> (\w+)", section(f"### {kind.__name__}"), re.MULTILINE))
    assert edges == {(old.name, new.name) for old in kind for new in TRANSITIONS[old]}
