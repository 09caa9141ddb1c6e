"""Progress messages of `llava-deploy`."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print progress to stderr, so that stdout holds only the result."""
    print(text, file=sys.stderr, flush=True)


def format_size(count: int) -> str:
    """Return a number of bytes as text in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
