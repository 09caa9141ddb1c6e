"""Owns the OpenAI route: whole `messages` in, one answer out, over sessions of the endpoint.

An OpenAI client keeps no session; it sends the whole conversation each time. A conversation that goes on is recognised
by its earlier messages, and its session asked the new question alone. One that is not (new, branched off, or its
session lost) is opened anew and its earlier questions asked again; it goes on only if they are answered as before,
since a session can't be told what it has said. Speaks to the container in the handler's own words, through `service`,
as any client would.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx

from . import contract
from .faults import Fault, StreamFault
from .service import Answer, Call, Service, StreamedAnswer

Result = TypeVar("Result")

IDLE_SESSIONS = 16
# OpenAI's name of an option, and the handler's.
_OPTIONS = {
    "max_completion_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
}
_KNOWN = {"model", "messages", "stream", "stream_options", "n", "user", *_OPTIONS}
_FINISH = {"stop": "stop", "length": "length", "deadline": "length", "cancelled": "stop"}


class ChatError(Exception):
    """A request that is refused, as OpenAI's clients read it."""

    def __init__(self, status: int, message: str, code: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}

    @classmethod
    def of(cls, fault: Fault) -> ChatError:
        """The container's own refusal where it made one, else the platform's."""
        status = fault.body.get("OriginalStatusCode") or fault.status
        kind = "invalid_request_error" if status < 500 and status != 424 else "server_error"
        try:
            said = json.loads(fault.body["OriginalMessage"])["error"]
            return cls(status, said["message"], said["code"], kind)
        except (KeyError, TypeError, ValueError):
            return cls(status, fault.body["Message"], fault.kind, kind)


@dataclass(frozen=True)
class Question:
    """One user message: its text, and its pictures as URLs (data: or https:)."""

    text: str
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """A question, and what was answered."""

    question: Question
    answer: str


@dataclass(frozen=True)
class Chat:
    """What a request asks for. `options` are in the handler's words."""

    model: str
    history: tuple[Turn, ...]
    question: Question
    options: dict[str, Any]
    stream: bool = False
    tell_usage: bool = False

    @property
    def first(self) -> Question:
        """The question that the conversation began with."""
        return self.history[0].question if self.history else self.question

    @property
    def prompt(self) -> Question:
        """The new question as its session is asked it: the first one's pictures are shown at the open."""
        return self.question if self.history else replace(self.question, pictures=())


def read(body: bytes) -> Chat:
    """A chat completion request. Raises `ChatError`."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        raise _bad("The body is not JSON.") from None
    if not isinstance(payload, dict):
        raise _bad("The body must be a JSON object.")
    given = {name: value for name, value in payload.items() if value is not None}
    if unknown := sorted(given.keys() - _KNOWN):
        raise _bad(f"Not supported here: {', '.join(unknown)}; supported are {', '.join(sorted(_KNOWN))}.")
    if given.get("n", 1) != 1:
        raise _bad("'n' must be 1.")
    history, question = _turns(given.get("messages"))
    chat = Chat(str(given.get("model", "")), history, question, {})
    if not chat.first.pictures:
        raise _bad("The first message shows no picture; a chat here is about one (an 'image_url' part).")
    usage = given.get("stream_options", {})
    return replace(
        chat,
        options={name: given[theirs] for theirs, name in _OPTIONS.items() if theirs in given},
        stream=given.get("stream", False) is True,
        tell_usage=isinstance(usage, dict) and usage.get("include_usage") is True,
    )


def _turns(messages: Any) -> tuple[tuple[Turn, ...], Question]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _bad("'messages' must be an array of objects.")
    roles = [message.get("role") for message in messages]
    if "system" in roles or "developer" in roles:
        raise _bad("A system message can't be given here: the system prompt is the operator's (model-config.yaml).")
    if roles != [("user", "assistant")[index % 2] for index in range(len(roles))] or len(roles) % 2 == 0:
        raise _bad("'messages' must be a user's and the assistant's in turn, and end with a user's.")
    read = [_content(message.get("content")) for message in messages]
    pairs = zip(read[:-1:2], read[1::2], strict=True)
    return tuple(Turn(question, answer.text) for question, answer in pairs), read[-1]


def _content(content: Any) -> Question:
    if isinstance(content, str):
        return Question(content)
    texts, pictures = [], []
    for part in content if isinstance(content, list) else [None]:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                pictures.append(url)
            case _:
                raise _bad("A message's 'content' must be a string, or 'text' and 'image_url' parts.")
    return Question("\n".join(texts), tuple(pictures))


def _bad(message: str) -> ChatError:
    return ChatError(400, message, "invalid_request")


class Chats:
    """Conversations of OpenAI clients, and the sessions behind them: those that wait, the latest last."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._idle: OrderedDict[str, str] = OrderedDict()
        self._closing: set[asyncio.Task] = set()

    async def answer(self, chat: Chat) -> dict:
        """The `chat.completion`. Raises `ChatError` or `Fault`."""
        session, answer = await self._ask(chat, lambda session: self._whole(session, chat.prompt, chat.options))
        self._keep(chat, session, answer["response_text"])
        message = {"role": "assistant", "content": answer["response_text"]}
        choice = {"index": 0, "message": message, "finish_reason": _FINISH[answer["finish_reason"]], "logprobs": None}
        return {**_head(chat, "chat.completion"), "choices": [choice], "usage": _usage(answer["usage"])}

    async def stream(self, chat: Chat) -> AsyncIterator[str]:
        """The `chat.completion.chunk`s as server-sent events. Raises `ChatError` or `Fault` before the first."""
        session, answer = await self._ask(chat, lambda session: self._streamed(session, chat.prompt, chat.options))
        return self._events(chat, session, answer)

    async def close(self) -> None:
        """Close the sessions that wait."""
        while self._idle:
            self._close_soon(self._idle.popitem()[1])
        await asyncio.gather(*self._closing)

    async def _events(self, chat: Chat, session: str, answer: StreamedAnswer) -> AsyncIterator[str]:
        head, text, finished = _head(chat, "chat.completion.chunk"), "", False
        try:
            yield _event(_chunk(head, {"role": "assistant", "content": ""}))
            async with contextlib.aclosing(answer.parts) as parts:
                async for line in _lines(parts):
                    if "error" in line:
                        raise StreamFault(line["error"]["code"], line["error"]["message"])
                    text += line["delta"]
                    finish = line.get("finish_reason")
                    yield _event(_chunk(head, {"content": line["delta"]}, _FINISH[finish] if finish else None))
                    finished = finish is not None
                    if finished and chat.tell_usage:
                        yield _event({**head, "choices": [], "usage": _usage(line["usage"])})
            yield "data: [DONE]\n\n"
        except StreamFault as fault:
            yield _event(ChatError(500, str(fault), fault.body["ErrorCode"], "server_error").body)
        finally:
            if finished:
                self._keep(chat, session, text)
            else:
                self._close_soon(session)

    # --- sessions ---

    async def _ask(self, chat: Chat, ask: Callable[[str], Awaitable[Result]]) -> tuple[str, Result]:
        """Ask the conversation's session, or one that is brought to the same point; also the session."""
        key = _key(chat.history)
        session = self._idle.pop(key, None)
        if session is not None:
            try:
                return session, await ask(session)
            except Fault as fault:
                if not _is_lost(fault):
                    self._put(key, session)
                    raise
        session = await self._replayed(chat)
        try:
            return session, await ask(session)
        except BaseException:
            self._close_soon(session)
            raise

    async def _replayed(self, chat: Chat) -> str:
        """A new session in which the history was said again."""
        session = await self._opened(chat.first)
        try:
            for index, turn in enumerate(chat.history):
                question = replace(turn.question, pictures=()) if index == 0 else turn.question
                said = (await self._whole(session, question, chat.options))["response_text"]
                if said != turn.answer:
                    other = "the same question was answered otherwise when it was asked again"
                    raise ChatError(400, f"This conversation can't be continued here: {other}.", "history_differs")
        except BaseException:
            self._close_soon(session)
            raise
        return session

    async def _opened(self, question: Question) -> str:
        """A session on the question's pictures. Where all are taken, one that waits makes room."""
        while True:
            try:
                body = {"type": "start_session", **_pictures(question)}
                return json.loads((await self._invoke(contract.NEW_SESSION, body)).body)["session_id"]
            except Fault as fault:
                if fault.body.get("OriginalStatusCode") != 429 or not self._idle:
                    raise
                await self._close(self._idle.popitem(last=False)[1])

    def _keep(self, chat: Chat, session: str, answer: str) -> None:
        self._put(_key((*chat.history, Turn(chat.question, answer))), session)
        while len(self._idle) > IDLE_SESSIONS:
            self._close_soon(self._idle.popitem(last=False)[1])

    def _put(self, key: str, session: str) -> None:
        other = self._idle.pop(key, None)
        if other is not None:
            self._close_soon(other)
        self._idle[key] = session

    def _close_soon(self, session: str) -> None:
        task = asyncio.create_task(self._close(session))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, session: str) -> None:
        with contextlib.suppress(Fault):  # it is gone already
            await self._invoke(session, {"type": "close_session"})

    # --- the handler's words ---

    async def _whole(self, session: str, question: Question, options: dict) -> dict:
        return json.loads((await self._invoke(session, _prompt(question, options))).body)

    async def _streamed(self, session: str, question: Question, options: dict) -> StreamedAnswer:
        body = {**_prompt(question, options), "stream": True}
        return await self._service.invoke_stream(_call(contract.INVOKE_STREAM, session, body))

    async def _invoke(self, session: str, body: dict) -> Answer:
        return await self._service.invoke(_call(contract.INVOKE, session, body))


def _call(api: str, session: str, body: dict) -> Call:
    headers = httpx.Headers({"Content-Type": "application/json", contract.SESSION_HEADER: session})
    return Call(api, headers, json.dumps(body).encode())


def _prompt(question: Question, options: dict) -> dict:
    return {"type": "send_text_prompt", "prompt_text": question.text, **options, **_pictures(question)}


def _pictures(question: Question) -> dict:
    if len(question.pictures) > 1:
        return {"images": list(question.pictures)}
    return {"path": question.pictures[0]} if question.pictures else {}


def _is_lost(fault: Fault) -> bool:
    """Whether the session is there no more, or nobody knows."""
    if fault.kind == "ModelError":
        return fault.body["OriginalStatusCode"] in (0, 404, 410)
    return fault.kind in ("ValidationError", "ServiceUnavailable")


def _key(history: tuple[Turn, ...]) -> str:
    return hashlib.sha256(repr(history).encode()).hexdigest()


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[dict]:
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _head(chat: Chat, kind: str) -> dict:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": chat.model}


def _chunk(head: dict, delta: dict, finish: str | None = None) -> dict:
    return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]}


def _event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _usage(usage: dict) -> dict:
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
        "prompt_tokens_details": {"cached_tokens": usage["cached_tokens"]},
    }
