"""Pages and diagrams of docs/ are what their scripts print. test_config.py and test_metrics.py check two more."""

from __future__ import annotations

from pathlib import Path

from scripts import commands_page, diagrams, openapi_page

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_the_http_api_is_up_to_date() -> None:
    assert (DOCS / "http-api.md").read_text(encoding="utf-8") == openapi_page.page()


def test_the_help_of_every_command_is_up_to_date() -> None:
    """Versions of Python break the lines of a help text at different places."""
    assert (DOCS / "commands.md").read_text(encoding="utf-8").split() == commands_page.page().split()


def test_every_diagram_is_up_to_date() -> None:
    made = diagrams.diagrams()
    assert {name: (DOCS / "img" / name).read_text(encoding="utf-8") for name in made} == made
    assert {"states-SessionState.svg", "states-Residency.svg", "states-TurnState.svg"} <= set(made)
