"""The frame of a client program: it reads a job, runs its scenarios, and prints each exchange as JSON.

A program runs in an environment of its client, so it imports nothing of this project. It uses its client as the
client's documentation does. The test compares each answer with `generate` on the conversation that was sent.

A conversation is a list of messages `{"role", "text", "pictures"}`, where a picture is the name of one of the job's.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


class Program:
    """A program's job, and the exchanges of its scenarios."""

    def __init__(self) -> None:
        self.job: dict[str, Any] = json.load(sys.stdin)
        self.exchanges: dict[str, list[dict]] = {}
        self.failures: dict[str, str] = {}

    @property
    def questions(self) -> list[str]:
        """Return the questions."""
        return self.job["questions"]

    def data_url(self, name: str) -> str:
        """Return a picture as a data URL."""
        return f"data:image/png;base64,{self.job['pictures'][name]}"

    def scenario(self, run: Callable[[], object]) -> Callable[[], object]:
        """Run a scenario now, unless the job names others. A failure is reported and does not end the program."""
        if run.__name__ in self.job.get("scenarios", [run.__name__]):
            try:
                run()
            except Exception:
                self.failures[run.__name__] = traceback.format_exc()
        return run

    def note(self, scenario: str, sent: list[Message], answer: str, **facts: object) -> None:
        """Record a conversation, which ends with a question, and its answer."""
        self.exchanges.setdefault(scenario, []).append({"sent": list(sent), "answer": answer, **facts})

    def note_error(self, scenario: str, call: Callable[[], object], *facts: str) -> None:
        """Record the exception of a call: the names of its class and its base classes, its text, some attributes."""
        try:
            call()
        except Exception as error:
            names = [kind.__name__ for kind in type(error).__mro__]
            found = {fact: getattr(error, fact, None) for fact in facts}
            self.exchanges.setdefault(scenario, []).append({"names": names, "text": str(error), **found})
            return
        raise AssertionError(f"{scenario}: no exception")

    def finish(self) -> None:
        """Print what happened."""
        json.dump({"exchanges": self.exchanges, "failures": self.failures}, sys.stdout)


def user(text: str = "", *pictures: str) -> Message:
    """Return a user's message."""
    return {"role": "user", "text": text, "pictures": list(pictures)}


def assistant(text: str) -> Message:
    """Return an assistant's message."""
    return {"role": "assistant", "text": text, "pictures": []}


def system(text: str) -> Message:
    """Return a system message."""
    return {"role": "system", "text": text, "pictures": []}


def openai_messages(program: Program, conversation: list[Message]) -> list[dict]:
    """Return a conversation in OpenAI's words."""
    messages = []
    for message in conversation:
        content: Any = message["text"]
        if message["pictures"]:
            urls = [program.data_url(name) for name in message["pictures"]]
            content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            if message["text"]:
                content.append({"type": "text", "text": message["text"]})
        messages.append({"role": message["role"], "content": content})
    return messages
