"""Cut a streamed answer into lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def split_lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a body that arrives in parts, without their LF.

    A part may end inside a character or hold several lines. Only LF ends a line: text may contain U+2028 and other
    characters that `str.splitlines` cuts at.
    """
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    if rest:
        yield rest
