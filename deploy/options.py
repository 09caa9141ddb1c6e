"""Options of the project's commands: `--version`, checked numbers, and errors that name an option as the user typed it.

`make` turns its variables into options. It lists them in the environment variable `LLAVA_MAKE`, after the target:
`serve --port=PORT --dtype=DTYPE`. An error message then contains the name of the variable.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import Any, NoReturn

VERSION = "0.2.0"
MAKE_VARIABLE = "LLAVA_MAKE"
LAST_PORT = 65535
USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """A parser with `--version`, whose errors are one line on stderr without the usage."""

    def __init__(self, *args: Any, version: bool = True, **options: Any) -> None:
        """`version` is False for a parser that declares its own `--version`."""
        super().__init__(*args, **options)
        if version and self.add_help:
            about = "print the version and exit"
            self.add_argument("--version", action="version", version=version_line(), help=about)

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with 2."""
        self.exit(USAGE_ERROR, f"{error_prefix(self.prog)}error: {_reworded(message)}\n")


def version_line() -> str:
    """Return the output of `--version`."""
    return f"LLaVA Sessions {VERSION}"


def typed(option: str) -> str:
    """Return the name that the user typed for an option: that of a make variable, or the option itself."""
    return _make()[1].get(option, option)


def error_prefix(prog: str) -> str:
    """Return the start of an error line: the make target, or the program."""
    return f"{_make()[0] or prog}: "


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argparse type for whole numbers from `least` to `most`."""
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}, got {text!r}")
        return value

    return parse


def decimal_number(least: float) -> Callable[[str], float]:
    """Return an argparse type for finite numbers of at least `least`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number of at least {least:g}, got {text!r}")
        return value

    return parse


def port_number(further: int = 0) -> Callable[[str], int]:
    """Return an argparse type for a port; 0 chooses a free one. The `further` ports after it must exist too."""
    return whole_number(0, LAST_PORT - further)


def port_range(text: str) -> range:
    """Parse LOW-HIGH, both included. An argparse type."""
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= LAST_PORT:
        raise argparse.ArgumentTypeError(f"must be LOW-HIGH with ports from 1 to {LAST_PORT}, got {text!r}")
    return range(int(match[1]), int(match[2]) + 1)


def _make() -> tuple[str, dict[str, str]]:
    """Return `make <target>` and the variable of each option; empty if `make` did not start this program."""
    target, *pairs = os.environ.get(MAKE_VARIABLE, "").split() or [""]
    return f"make {target}" if target else "", dict(pair.split("=", 1) for pair in pairs)


def _reworded(message: str) -> str:
    """Return argparse's message with the option as typed, in the form "NAME must be <expected>, got <actual>"."""
    missing = re.fullmatch(r"the following arguments are required: (.*)", message)
    if missing:
        return f"{', '.join(map(typed, missing[1].split(', ')))} must be given"
    about = re.fullmatch(r"argument ([^:]+): (.*)", message, re.DOTALL)
    if not about:
        return message
    name = typed(about[1].split("/")[-1])
    rest = about[2]
    if choice := re.fullmatch(r"invalid choice: (.*) \(choose from (.*)\)", rest, re.DOTALL):
        return f"{name} must be one of {choice[2].replace(chr(39), '')}, got {choice[1]}"
    if value := re.fullmatch(r"invalid (\w+) value: (.*)", rest, re.DOTALL):
        kinds = {"int": "a whole number", "float": "a number"}
        return f"{name} must be {kinds.get(value[1], 'valid')}, got {value[2]}"
    if rest.startswith("expected "):
        return f"{name} must have a value"
    return f"{name} {rest}"
