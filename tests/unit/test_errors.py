"""An error in a log line is whole: the launcher reads the log by lines."""

from __future__ import annotations

from llava_sessions.errors import error_line


def test_an_error_of_several_lines_becomes_one() -> None:
    error = ImportError("\nPixtralProcessor requires the Torchvision library\nbut it was not found.\n")
    assert error_line(error) == "ImportError: PixtralProcessor requires the Torchvision library but it was not found."
    assert error_line(RuntimeError()) == "RuntimeError: no message"
