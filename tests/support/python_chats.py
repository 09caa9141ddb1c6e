"""The same conversation through the synchronous and the asynchronous Python client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from llava_sessions_client import Answer, AsyncEndpoint, Endpoint, Turn

Lose = Callable[[str], object]  # closes the session of this ID as another client would
OPTIONS = {"max_new_tokens": 12}
QUESTIONS = ("Which shapes are there?", "How many shapes are there?", "Is there a circle?", "Count the shapes.")


@dataclass(frozen=True)
class Exchanges:
    """Answers of one conversation in their order, the pieces of the streamed ones, and the turns at its end."""

    answers: list[Answer]
    pieces: list[list[str]]
    turns: tuple[Turn, ...]

    @property
    def facts(self) -> list[tuple[str, str, int, int]]:
        """Text, finish reason, prompt tokens and tokens of each answer: the same for every way to ask."""
        answers = self.answers
        return [(a.text, a.finish_reason, a.usage.prompt_tokens, a.usage.completion_tokens) for a in answers]


def chat_sync(endpoint: Endpoint, first: Image.Image, second: Image.Image, lose: Lose) -> Exchanges:
    """Ask, stream, add a picture, leave a stream, edit, retry, lose the session, ask again."""
    answers: list[Answer] = []
    pieces: list[list[str]] = []

    def read(stream: Any) -> None:
        pieces.append(list(stream))
        answers.append(stream.answer)

    with endpoint.open(first, on_lost="replay") as chat:
        answers.append(chat.ask(QUESTIONS[0], **OPTIONS))
        read(chat.stream(QUESTIONS[1], **OPTIONS))
        chat.add_image(second)
        answers.append(chat.ask(QUESTIONS[0], **OPTIONS))
        for _ in chat.stream(QUESTIONS[3], **OPTIONS):
            break
        answers.append(chat.ask(QUESTIONS[2], **OPTIONS))
        read(chat.stream_edit(1, QUESTIONS[3], **OPTIONS))
        answers.append(chat.retry(**OPTIONS))
        lose(chat.session_id)
        answers.append(chat.ask(QUESTIONS[1], **OPTIONS))
        turns = chat.turns
    return Exchanges(answers, pieces, turns)


def chat_async(endpoint: AsyncEndpoint, first: Image.Image, second: Image.Image, lose: Lose) -> Exchanges:
    """Do as `chat_sync`."""
    return asyncio.run(_chat(endpoint, first, second, lose))


async def _chat(endpoint: AsyncEndpoint, first: Image.Image, second: Image.Image, lose: Lose) -> Exchanges:
    answers: list[Answer] = []
    pieces: list[list[str]] = []

    async def read(stream: Any) -> None:
        pieces.append([piece async for piece in stream])
        answers.append(stream.answer)

    async with endpoint.open(first, on_lost="replay") as chat:
        answers.append(await chat.ask(QUESTIONS[0], **OPTIONS))
        await read(chat.stream(QUESTIONS[1], **OPTIONS))
        await chat.add_image(second)
        answers.append(await chat.ask(QUESTIONS[0], **OPTIONS))
        async for _ in chat.stream(QUESTIONS[3], **OPTIONS):
            break
        answers.append(await chat.ask(QUESTIONS[2], **OPTIONS))
        await read(chat.stream_edit(1, QUESTIONS[3], **OPTIONS))
        answers.append(await chat.retry(**OPTIONS))
        await asyncio.to_thread(lose, chat.session_id)
        answers.append(await chat.ask(QUESTIONS[1], **OPTIONS))
        turns = chat.turns
    return Exchanges(answers, pieces, turns)
