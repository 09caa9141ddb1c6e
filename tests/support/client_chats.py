"""A chat that uses every operation of the Python client, undisturbed or through a `FaultProxy`.

Each greedy answer, and each number of prompt tokens, must be the undisturbed chat's: a turn that ran twice, or that was
lost, would change the prompts of all later questions.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llava_sessions_client import Answer, AsyncChat, AsyncEndpoint, Chat, Endpoint
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene

from .encoding import to_png
from .fault_proxy import Fault, FaultProxy

PICTURE, CLOSER = (to_png(make_scene(seed).draw()) for seed in HELD_OUT_SEEDS[5_200:5_202])
SHORT: dict[str, Any] = {"max_new_tokens": 4}
# The request of an operation has these bytes in its body.
MARKS = {
    "open": b"start_session",
    "ask": b"send_text_prompt",
    "stream": b"send_text_prompt",
    "add_image": b"send_text_prompt",
    "edit": b'"messages"',
    "close": b"close_session",
}
OPERATIONS = tuple(MARKS)
_SESSION = re.compile(rb'"session_id": *"([^"]+)"')


@dataclass(frozen=True)
class Said:
    """What must be equal of an answer in every run of the same chat."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    replayed: bool

    @classmethod
    def by(cls, answer: Answer) -> Said:
        """Return it of one answer."""
        usage = answer.usage
        return cls(answer.text, usage.prompt_tokens, usage.completion_tokens, answer.replayed)


@dataclass
class Run:
    """One run of the chat. The next request of each of `operations` meets `fault` in `proxy`."""

    proxy: FaultProxy | None = None
    fault: Fault = field(default_factory=Fault)
    operations: tuple[str, ...] = ()
    answers: dict[str, Said] = field(default_factory=dict)
    turns: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    session_id: str = ""

    @contextlib.contextmanager
    def step(self, operation: str) -> Iterator[None]:
        """Disturb and time one operation. Fail if its request did not meet the fault."""
        planned = self.proxy is not None and operation in self.operations
        if self.proxy is not None and planned:
            self.proxy.disturb(self.fault, MARKS[operation])
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            raise AssertionError(f"{operation}: {type(error).__name__}: {error}") from error
        self.seconds[operation] = time.monotonic() - began
        if self.proxy is not None and planned:
            assert self.proxy.waiting() == 0, f"{operation} has not met its fault"

    def keep(self, operation: str, answer: Answer) -> None:
        """Keep an answer."""
        self.answers[operation] = Said.by(answer)

    def finish(self, chat: Chat | AsyncChat) -> None:
        """Keep the turns and the session's ID."""
        self.session_id = chat.session_id
        self.turns = [(turn.text, turn.answer.text) for turn in chat.turns]


def run_chat(endpoint: Endpoint, run: Run) -> Run:
    """Hold the chat."""
    with run.step("open"):
        chat = endpoint.open(PICTURE)
    with chat:
        with run.step("ask"):
            run.keep("ask", chat.ask("Which shapes are there?", **SHORT))
        with run.step("stream"):
            stream = chat.stream("What is in the middle?", **SHORT)
            text = "".join(stream)
            run.keep("stream", stream.answer)
            assert text == stream.answer.text
        with run.step("add_image"):
            chat.add_image(CLOSER)
            run.keep("add_image", chat.ask("And here?", **SHORT))
        with run.step("edit"):
            run.keep("edit", chat.edit(1, "How many shapes are there?", **SHORT))
        run.keep("last", chat.ask("Is there a circle?", **SHORT))
        run.finish(chat)
        with run.step("close"):
            chat.close()
    return run


async def run_async_chat(endpoint: AsyncEndpoint, run: Run) -> Run:
    """Hold the same chat with the asynchronous client."""
    with run.step("open"):
        chat = await endpoint.open(PICTURE)
    async with chat:
        with run.step("ask"):
            run.keep("ask", await chat.ask("Which shapes are there?", **SHORT))
        with run.step("stream"):
            stream = chat.stream("What is in the middle?", **SHORT)
            text = "".join([piece async for piece in stream])
            run.keep("stream", stream.answer)
            assert text == stream.answer.text
        with run.step("add_image"):
            await chat.add_image(CLOSER)
            run.keep("add_image", await chat.ask("And here?", **SHORT))
        with run.step("edit"):
            run.keep("edit", await chat.edit(1, "How many shapes are there?", **SHORT))
        run.keep("last", await chat.ask("Is there a circle?", **SHORT))
        run.finish(chat)
        with run.step("close"):
            await chat.close()
    return run


def announced(proxy: FaultProxy) -> set[str]:
    """Return the sessions that the server has named in replies, whether or not the client received them."""
    return {found.decode() for exchange in proxy.exchanges for found in _SESSION.findall(exchange.reply)}
