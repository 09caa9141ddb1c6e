"""An answer as server-sent events. A thread reads the client's stream; the page's request reads the events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool

from llava_sessions_client import AnswerChanged, AnswerStream

from .chats import WebChat, alone
from .problems import in_words

log = logging.getLogger(__name__)
Ask = Callable[[], AnswerStream]
_END = None


async def events(chat: WebChat, ask: Ask, index: int) -> AsyncIterator[str]:
    """Ask, and yield the answer's events: `piece` for text, and at last `end`, `stopped` or `problem`.

    `index`: that of the new turn. If the page leaves, the answer is cancelled and the turn rolled back.
    """
    queue: asyncio.Queue[str | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def put(name: str, data: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event(name, data))

    def work() -> None:
        try:
            _answer(chat, ask, put, index)
        finally:
            loop.call_soon_threadsafe(queue.put_nowait, _END)

    worker = asyncio.ensure_future(run_in_threadpool(work))
    try:
        while (text := await queue.get()) is not _END:
            yield text
    finally:
        if not worker.done():
            loop.run_in_executor(None, _leave, chat)


def event(name: str, data: dict[str, Any]) -> str:
    """Return one server-sent event. JSON has no line breaks, so the data is one line."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _answer(chat: WebChat, ask: Ask, put: Callable[[str, dict[str, Any]], None], index: int) -> None:
    try:
        with alone(chat):
            try:
                is_kept = _read(chat, ask, put)
                if is_kept:
                    chat.asked(index)
            finally:
                chat.running = None
                chat.sending = []
        put("end" if is_kept else "stopped", {"chat": chat.shown()})
    except Exception as error:
        problem = in_words(error)
        if problem.code == "internal":
            log.exception("answer_failed")
        put("problem", problem.body())


def _read(chat: WebChat, ask: Ask, put: Callable[[str, dict[str, Any]], None]) -> bool:
    """Ask, and put the pieces of the answer. Return whether the turn is part of the conversation."""
    stream = chat.running = ask()
    try:
        for piece in stream:
            put("piece", {"text": piece})
    except AnswerChanged as error:  # the turn has the new answer, which the page shows at the end
        return error.answer.is_kept
    return stream.answer.is_kept


def _leave(chat: WebChat) -> None:
    try:
        chat.stop()
    except Exception as error:
        log.info("cancel_failed error=%s", type(error).__name__)
