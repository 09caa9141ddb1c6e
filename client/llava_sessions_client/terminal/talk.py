"""The loop of a terminal chat: read a line, run its command or ask its question, print the answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory
from rich.console import Console
from rich.text import Text

from ..chat import AnswerStream, Chat
from ..clips import Clip, load_clip
from ..errors import ClientError, SessionLost
from ..options import AskOptions
from .commands import COMMANDS, UsageError, parse_line
from .picture import show_picture
from .report import clip_line, history_lines, save, stats_table

_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class Talk:
    """A chat between a person, or the lines of standard input, and a session."""

    def __init__(
        self, max_new_tokens: int | None = None, temperature: float | None = None, region: str | None = None
    ) -> None:
        """`region`: of the clips at `s3://`. The others are options of each question."""
        self._console = Console(highlight=False)
        self._errors = Console(stderr=True, highlight=False)
        self._options: AskOptions = {}
        if max_new_tokens is not None:
            self._options["max_new_tokens"] = max_new_tokens
        if temperature is not None:
            self._options["temperature"] = temperature
        self._region = region
        self._clip: Clip | None = None  # waits for the next question
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._failed = False

    def run(self, chat: Chat) -> int:
        """Talk until the end of the input. Return 0, or 1 if a question of a non-interactive chat failed."""
        self._greet(chat)
        for line in self._lines(chat):
            try:
                if not self._obey(chat, line):
                    break
            except KeyboardInterrupt:
                self._note("stopped; the session is as before the question")
            except SessionLost:
                raise
            except (ClientError, UsageError, OSError) as error:
                self.fail(str(error))
                self._failed = True
                if chat.waiting_pictures or self._clip is not None:
                    self._note("the next question shows the waiting pictures and clip again; /drop drops them")
        return int(self._failed and not self._interactive)

    def fail(self, message: str) -> None:
        """Print an error."""
        self._errors.print(Text.assemble(("error: ", "bold red"), _clean(message)), soft_wrap=True)

    # --- input --------------------------------------------------------------------------------------------------------

    def _lines(self, chat: Chat) -> Iterator[str]:
        if not self._interactive:
            yield from (line.strip() for line in sys.stdin if line.strip())
            return
        words = WordCompleter([f"/{command.name}" for command in COMMANDS], sentence=True)
        path = state_file()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        session: PromptSession[str] = PromptSession(history=FileHistory(str(path)), completer=words)
        while True:
            try:
                line = session.prompt("> ", bottom_toolbar=lambda: _status(chat)).strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if line:
                yield line

    def _obey(self, chat: Chat, line: str) -> bool:
        """Run a command or ask a question. Return False for the end of the chat."""
        command, argument = parse_line(line)
        if command is None:
            stream = chat.stream(argument, video=self._clip, **self._options)
            self._print_answer(chat, stream)
            if stream.answer.is_kept:
                self._clip = None
            return True
        actions: dict[str, Callable[[Chat, str], None]] = {
            "image": self._add_image,
            "video": self._add_video,
            "drop": self._drop,
            "edit": self._edit,
            "retry": lambda chat, _: self._print_answer(chat, chat.stream_retry(**self._options)),
            "history": lambda chat, _: self._print_lines(history_lines(chat)),
            "stats": lambda chat, _: self._console.print(stats_table(chat)),
            "save": self._save,
            "help": lambda _, __: self._print_lines(_help()),
        }
        if command.name == "quit":
            return False
        actions[command.name](chat, argument)
        return True

    # --- commands -----------------------------------------------------------------------------------------------------

    def _add_image(self, chat: Chat, argument: str) -> None:
        show_picture(self._console, chat.add_image(argument))
        self._note("shown with the next question")

    def _add_video(self, chat: Chat, argument: str) -> None:
        self._clip = load_clip(argument, region=self._region)
        self._note(f"{clip_line(self._clip)} is shown with the next question")

    def _drop(self, chat: Chat, _: str) -> None:
        names = [picture.name for picture in chat.drop_images()]
        if self._clip is not None:
            names.append(self._clip.name)
        self._clip = None
        self._note(f"dropped {', '.join(names)}" if names else "nothing waits for the next question")

    def _edit(self, chat: Chat, argument: str) -> None:
        number, _, text = argument.partition(" ")
        if not number.isdigit() or not 1 <= int(number) <= len(chat.turns) or not text.strip():
            raise UsageError(f"/edit needs a turn from 1 to {len(chat.turns)}, and a text; /history has the numbers")
        self._print_answer(chat, chat.stream_edit(int(number) - 1, text.strip(), **self._options))

    def _save(self, chat: Chat, argument: str) -> None:
        path = Path(argument).expanduser()
        save(chat, path)
        self._note(f"saved to {path}")

    # --- output -------------------------------------------------------------------------------------------------------

    def _greet(self, chat: Chat) -> None:
        for notice in chat.notices:
            self._note(notice)
        if self._interactive:
            for picture in chat.pictures:
                show_picture(self._console, picture)
            if chat.clip is not None:
                self._note(clip_line(chat.clip))
            self._note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat")

    def _print_answer(self, chat: Chat, stream: AnswerStream) -> None:
        known = len(chat.notices)
        try:
            for piece in stream:
                self._console.print(Text(_clean(piece)), end="", soft_wrap=True)
        finally:
            stream.cancel()
            self._console.print()
        for notice in chat.notices[known:]:
            self._note(notice)
        if stream.answer.replayed:
            self._note("the session was lost; a new one continues with the history")
        if stream.answer.finish_reason != "stop":
            self._note(f"the answer ended early: {stream.answer.finish_reason}")

    def _print_lines(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(Text(_clean(line)), soft_wrap=True)

    def _note(self, text: str) -> None:
        """Print a remark: to standard error if standard output is for answers only."""
        console = self._console if self._interactive else self._errors
        console.print(Text(_clean(text), style="dim"), soft_wrap=True)


def state_file() -> Path:
    """Return the file of the input history."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "llava-chat" / "history"


def _help() -> list[str]:
    width = max(len(command.usage) for command in COMMANDS)
    return [f"{command.usage:<{width}}   {command.help}" for command in COMMANDS]


def _status(chat: Chat) -> str:
    """Return the line below the input."""
    parts = [f"turn {len(chat.turns) + 1}"]
    if chat.waiting_pictures:
        parts.append(f"{len(chat.waiting_pictures)} pictures wait for the next question")
    if chat.last is not None:
        usage = chat.last.usage
        parts.append(f"TTFT {chat.last.ttft_s * 1e3:.0f} ms")
        parts.append(f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were cached")
    if chat.expires_at is not None:
        minutes = max(0, int((chat.expires_at - datetime.now(UTC)).total_seconds() // 60))
        parts.append(f"expires in {minutes} min")
    return " | ".join(parts)


def _clean(text: str) -> str:
    """Return text without control characters: an answer must not move the cursor or change the terminal."""
    return text.translate(_CONTROL)
