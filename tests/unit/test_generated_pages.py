"""Pages and diagrams of docs/ are what their scripts print. test_config.py and test_metrics.py check two more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import commands_page, diagrams, openapi_page

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
GENERATORS = [path for path in (REPO / "scripts").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]


def test_the_page_of_the_http_api_is_up_to_date() -> None:
    assert (DOCS / "http-api.md").read_text(encoding="utf-8") == openapi_page.page()


def test_the_help_of_every_command_is_up_to_date() -> None:
    """Versions of Python break the lines of a help text at different places."""
    assert (DOCS / "commands.md").read_text(encoding="utf-8").split() == commands_page.page().split()


def test_a_const_that_is_an_object_is_json_in_the_page() -> None:
    assert '`{"enable_thinking": false}`' in openapi_page.page()


@pytest.mark.parametrize("path", GENERATORS, ids=lambda path: path.stem)
def test_a_generator_has_help_and_rejects_arguments(path: Path) -> None:
    """Else `--help` would write the files."""
    [main] = re.findall(r'^if __name__ == "__main__":\n(.*)', path.read_text(encoding="utf-8"), re.MULTILINE)
    assert main.endswith(".parse_args()") or "sys.exit(main())" in main


def test_every_diagram_is_up_to_date() -> None:
    made = diagrams.diagrams()
    assert {name: (DOCS / "img" / name).read_text(encoding="utf-8") for name in made} == made
    assert {"states-SessionState.svg", "states-Residency.svg", "states-TurnState.svg"} <= set(made)
