"""The commands of a terminal chat."""

from __future__ import annotations

from dataclasses import dataclass


class UsageError(Exception):
    """A command is unknown or lacks something."""


@dataclass(frozen=True)
class Command:
    """A command. `argument`: what follows its name, "" if nothing does."""

    name: str
    argument: str
    help: str

    @property
    def usage(self) -> str:
        """The command as it is typed."""
        return f"/{self.name} {self.argument}".rstrip()


COMMANDS = (
    Command("image", "PATH_OR_URL", "show a picture with the next question"),
    Command("video", "PATH_OR_URL", "show a clip with the next question"),
    Command("drop", "", "drop the pictures and the clip that wait for the next question"),
    Command("edit", "N TEXT", "replace question N and answer it; later turns are dropped"),
    Command("retry", "", "ask the last question again"),
    Command("history", "", "print the conversation with the numbers of its turns"),
    Command("stats", "", "print tokens and times of each answer"),
    Command("save", "FILE", "save the conversation: JSON for .json, else Markdown"),
    Command("help", "", "print this list"),
    Command("quit", "", "end the chat and close the session"),
)
_BY_NAME = {command.name: command for command in COMMANDS}


def parse_line(line: str) -> tuple[Command | None, str]:
    """Return the command of a line and its argument; None for a question. Raise `UsageError`.

    A line with two slashes at its start is a question that begins with one.
    """
    if not line.startswith("/"):
        return None, line
    if line.startswith("//"):
        return None, line[1:]
    name, _, argument = line[1:].partition(" ")
    command = _BY_NAME.get(name)
    if command is None:
        raise UsageError(f"/{name} is not a command; /help lists them")
    argument = argument.strip()
    if bool(command.argument) != bool(argument):
        raise UsageError(f"usage: {command.usage}")
    return command, argument
