"""The error of packing, and its progress messages."""

from __future__ import annotations

import sys
from collections.abc import Iterable


class PackError(Exception):
    """A reason why the model is not packed: a headline and every problem that was found."""

    def __init__(self, headline: str, problems: Iterable[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__("\n  - ".join([headline, *self.problems]))


def say(text: str) -> None:
    """Print progress to stderr, so that stdout holds only the result."""
    print(text, file=sys.stderr, flush=True)
