"""Cut a streamed answer into lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class LineSplitter:
    """Lines of a body that arrives in parts, without their LF.

    A part may end inside a character or hold several lines. Only LF ends a line: text may contain U+2028 and other
    characters that `str.splitlines` cuts at. Empty lines are left out.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, part: bytes) -> list[bytes]:
        """Return the lines that the next part completes."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        return [line for line in lines if line.strip()]

    def end(self) -> list[bytes]:
        """Return the line that the end of the body completes, if there is one."""
        rest, self._rest = self._rest, b""
        return [rest] if rest.strip() else []


def split_lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a body that arrives in parts."""
    splitter = LineSplitter()
    for part in parts:
        yield from splitter.feed(part)
    yield from splitter.end()
