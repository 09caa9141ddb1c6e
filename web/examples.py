"""The pictures that the start page offers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PAGE = Path(__file__).parent / "page"
_QUESTION = "Which shapes are there?"


@dataclass(frozen=True)
class Example:
    """A picture to try. `question`: the first question, which the page proposes."""

    name: str
    title: str
    path: Path
    question: str = _QUESTION

    def shown(self) -> dict[str, str]:
        """Return the example as the page reads it."""
        return {"name": self.name, "title": self.title, "url": f"/examples/{self.name}", "question": self.question}


EXAMPLES = (
    Example("picture.png", "Several shapes", Path(__file__).parents[1] / "picture.png"),
    Example("drawing.png", "A drawing", _PAGE / "examples" / "drawing.png", "Is there a star?"),
    Example("square.png", "A square", _PAGE / "examples" / "square.png", "What colour is the square?"),
)


def example_path(name: str) -> Path | None:
    """Return the file of an example, or None."""
    return next((one.path for one in EXAMPLES if one.name == name), None)
