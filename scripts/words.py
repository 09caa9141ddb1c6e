"""Count words in prose that make a sentence hard to read (docs and docstrings), per 1,000 words.

Prints one row for each folder and exits with 1 if a checked row reaches the limit.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE_FOLDERS = ("handler", "client", "deploy", "web")
LIMIT = 1.0  # matches per 1,000 words, of each pattern
PATTERNS = {
    "told, tells": re.compile(r"\b(told|tells)\b", re.IGNORECASE),
    "wanted": re.compile(r"\bwanted\b", re.IGNORECASE),
    "whoever ...": re.compile(r"\b(whoever|nobody|somebody)\b", re.IGNORECASE),
    "lies, stands": re.compile(r"\b(lies|stands)\b", re.IGNORECASE),
    "what is ...": re.compile(r"\bwhat (is|has|can|it|they)\b", re.IGNORECASE),
}
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_QUESTION_HEADING = re.compile(r"^#+ .*\?\s*$", re.MULTILINE)


@dataclass
class Count:
    """Words and matches of each pattern. `checked` rows are held to the limit; the others show where matches are."""

    name: str
    checked: bool = False
    words: int = 0
    matches: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PATTERNS, 0))

    def add(self, text: str) -> None:
        """Count a piece of prose."""
        self.words += len(_WORD.findall(text))
        for label, pattern in PATTERNS.items():
            self.matches[label] += len(pattern.findall(text))

    def rate(self, label: str) -> float:
        """Return the matches of a pattern per 1,000 words."""
        return 1000 * self.matches[label] / self.words if self.words else 0.0

    def is_above(self) -> bool:
        """Return whether a pattern of a checked row reaches the limit."""
        return self.checked and any(self.rate(label) >= LIMIT for label in PATTERNS)


def docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def prose(markdown: str) -> str:
    """Return a Markdown page without its code blocks and without headings that are questions."""
    return _QUESTION_HEADING.sub("", _FENCE.sub("", markdown))


def count_code(root: Path, folder: str) -> list[Count]:
    """Return one row for the docstrings below `folder` and one for each folder in it."""
    total = Count(f"{folder}/", checked=True)
    rows: dict[str, Count] = {}
    for path in sorted((root / folder).rglob("*.py")):
        name = path.parent.relative_to(root).as_posix()
        row = rows.setdefault(name, Count(f"  {name}/"))
        for text in docstrings(path.read_text(encoding="utf-8")):
            row.add(text)
            total.add(text)
    return [total, *rows.values()]


def count_pages(root: Path) -> list[Count]:
    """Return a row for README.md, one for docs/, and one for each page of docs/."""
    readme = Count("README.md", checked=True)
    docs = Count("docs/", checked=True)
    readme.add(prose((root / "README.md").read_text(encoding="utf-8")))
    rows = []
    for path in sorted((root / "docs").rglob("*.md")):
        text = prose(path.read_text(encoding="utf-8"))
        row = Count(f"  {path.relative_to(root).as_posix()}")
        row.add(text)
        docs.add(text)
        rows.append(row)
    return [readme, docs, *rows]


def table(rows: Iterable[Count]) -> str:
    """Return the rows as text. A row that reaches the limit ends with an exclamation mark."""
    lines = [f"{'matches per 1,000 words':<36}{'words':>8}" + "".join(f"{label:>14}" for label in PATTERNS)]
    for row in rows:
        rates = "".join(f"{row.rate(label):>14.2f}" for label in PATTERNS)
        lines.append(f"{row.name:<36}{row.words:>8}{rates}{'  !' if row.is_above() else ''}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Return 1 if a row reaches the limit."""
    parser = argparse.ArgumentParser(prog="scripts/words.py", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="the checkout (default: this one)")
    root = parser.parse_args(argv).root
    rows = [row for folder in CODE_FOLDERS for row in count_code(root, folder)] + count_pages(root)
    total = Count("total", checked=True)
    for row in rows:
        if row.checked:
            total.words += row.words
            for label, matches in row.matches.items():
                total.matches[label] += matches
    print(table([*rows, total]))
    too_many = [row.name for row in [*rows, total] if row.is_above()]
    if too_many:
        print(f"words: {', '.join(too_many)} must be below {LIMIT:g} per 1,000 words", file=sys.stderr)
    return 1 if too_many else 0


if __name__ == "__main__":
    sys.exit(main())
