"""The OpenAI route: answer whole `messages` over sessions of the endpoint.

An OpenAI client keeps no session; it sends the whole conversation with each request. A continued conversation is
recognised by its earlier messages, and its session is asked only the new question. For any other conversation (new,
branched, or without its session) a session is opened and the earlier questions are asked again. If an answer then
differs, the request is refused. The containers receive the handler's native protocol, through `service`.
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
from .calls import ApiCall, EndpointReply, StreamedReply
from .faults import Fault, StreamFault
from .service import EndpointService

Result = TypeVar("Result")

IDLE_SESSIONS = 16
# OpenAI's name of an option -> the handler's name.
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


class OpenAIError(Exception):
    """The error reply to a request, as OpenAI's clients read it."""

    def __init__(self, status: int, message: str, code: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}

    @classmethod
    def of(cls, fault: Fault) -> OpenAIError:
        """Return the error of the container if there is one, else that of the platform."""
        status = fault.body.get("OriginalStatusCode") or fault.status
        kind = "invalid_request_error" if status < 500 and status != 424 else "server_error"
        try:
            error = json.loads(fault.body["OriginalMessage"])["error"]
            return cls(status, error["message"], error["code"], kind)
        except (KeyError, TypeError, ValueError):
            return cls(status, fault.body["Message"], fault.kind, kind)


@dataclass(frozen=True)
class UserMessage:
    """One user message: its text, and its pictures as URLs (data: or https:)."""

    text: str
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exchange:
    """A question and its answer."""

    question: UserMessage
    answer: str


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion request. `options` have the handler's names."""

    model: str
    history: tuple[Exchange, ...]
    question: UserMessage
    options: dict[str, Any]
    stream: bool = False
    with_usage: bool = False

    @property
    def first(self) -> UserMessage:
        """The first question of the conversation."""
        return self.history[0].question if self.history else self.question

    @property
    def prompt(self) -> UserMessage:
        """The new question for its session. The pictures of a first question belong to the open."""
        return self.question if self.history else replace(self.question, pictures=())


def parse_request(body: bytes) -> ChatRequest:
    """Parse a chat completion request. Raise `OpenAIError`."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        raise _bad("The body must be JSON.") from None
    if not isinstance(payload, dict):
        raise _bad("The body must be a JSON object.")
    given = {name: value for name, value in payload.items() if value is not None}
    if unknown := sorted(given.keys() - _KNOWN):
        raise _bad(f"Not supported: {', '.join(unknown)}; supported are {', '.join(sorted(_KNOWN))}.")
    if given.get("n", 1) != 1:
        raise _bad("'n' must be 1.")
    history, question = _turns(given.get("messages"))
    chat = ChatRequest(str(given.get("model", "")), history, question, {})
    if not chat.first.pictures:
        raise _bad("The first message must have a picture (an 'image_url' part).")
    usage = given.get("stream_options", {})
    return replace(
        chat,
        options={name: given[theirs] for theirs, name in _OPTIONS.items() if theirs in given},
        stream=given.get("stream", False) is True,
        with_usage=isinstance(usage, dict) and usage.get("include_usage") is True,
    )


def _turns(messages: Any) -> tuple[tuple[Exchange, ...], UserMessage]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _bad("'messages' must be an array of objects.")
    roles = [message.get("role") for message in messages]
    if "system" in roles or "developer" in roles:
        raise _bad("A system message is not supported: the operator sets the system prompt (model-config.yaml).")
    if roles != [("user", "assistant")[index % 2] for index in range(len(roles))] or len(roles) % 2 == 0:
        raise _bad("'messages' must alternate between user and assistant, and end with a user's.")
    read = [_content(message.get("content")) for message in messages]
    pairs = zip(read[:-1:2], read[1::2], strict=True)
    return tuple(Exchange(question, answer.text) for question, answer in pairs), read[-1]


def _content(content: Any) -> UserMessage:
    if isinstance(content, str):
        return UserMessage(content)
    texts: list[str] = []
    pictures: list[str] = []
    for part in content if isinstance(content, list) else [None]:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                pictures.append(url)
            case _:
                raise _bad("A message's 'content' must be a string, or 'text' and 'image_url' parts.")
    return UserMessage("\n".join(texts), tuple(pictures))


def _bad(message: str) -> OpenAIError:
    return OpenAIError(400, message, "invalid_request")


class Conversations:
    """Conversations of OpenAI clients and their sessions. Idle sessions are closed least recently used first."""

    def __init__(self, service: EndpointService) -> None:
        self._service = service
        self._idle: OrderedDict[str, str] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    async def answer(self, chat: ChatRequest) -> dict[str, Any]:
        """Return the `chat.completion`. Raise `OpenAIError` or `Fault`."""
        session, answer = await self._ask(chat, lambda session: self._whole(session, chat.prompt, chat.options))
        self._keep(chat, session, answer["response_text"])
        message = {"role": "assistant", "content": answer["response_text"]}
        choice = {"index": 0, "message": message, "finish_reason": _FINISH[answer["finish_reason"]], "logprobs": None}
        return {**_head(chat, "chat.completion"), "choices": [choice], "usage": _usage(answer["usage"])}

    async def stream(self, chat: ChatRequest) -> AsyncIterator[str]:
        """Return `chat.completion.chunk`s as server-sent events. Raise `OpenAIError` or `Fault` before the first."""
        session, answer = await self._ask(chat, lambda session: self._streamed(session, chat.prompt, chat.options))
        return self._events(chat, session, answer)

    async def close(self) -> None:
        """Close the idle sessions."""
        while self._idle:
            self._close_soon(self._idle.popitem()[1])
        await asyncio.gather(*self._closing)

    async def _events(self, chat: ChatRequest, session: str, answer: StreamedReply) -> AsyncIterator[str]:
        head = _head(chat, "chat.completion.chunk")
        text = ""
        finished = False
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
                    if finished and chat.with_usage:
                        yield _event({**head, "choices": [], "usage": _usage(line["usage"])})
            yield "data: [DONE]\n\n"
        except StreamFault as fault:
            yield _event(OpenAIError(500, str(fault), fault.body["ErrorCode"], "server_error").body)
        finally:
            if finished:
                self._keep(chat, session, text)
            else:
                self._close_soon(session)

    # --- sessions ---

    async def _ask(self, chat: ChatRequest, ask: Callable[[str], Awaitable[Result]]) -> tuple[str, Result]:
        """Ask the session of the conversation, or a new session after a replay. Return the session and the answer."""
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

    async def _replayed(self, chat: ChatRequest) -> str:
        """Return a new session in which the earlier questions were asked again."""
        session = await self._opened(chat.first)
        try:
            for index, turn in enumerate(chat.history):
                question = replace(turn.question, pictures=()) if index == 0 else turn.question
                answer = (await self._whole(session, question, chat.options))["response_text"]
                if answer != turn.answer:
                    message = "The conversation cannot be continued: an earlier question now has another answer."
                    raise OpenAIError(400, message, "history_differs")
        except BaseException:
            self._close_soon(session)
            raise
        return session

    async def _opened(self, question: UserMessage) -> str:
        """Open a session on the question's pictures. Without capacity, close the oldest idle session and retry."""
        while True:
            try:
                body = {"type": "start_session", **_pictures(question)}
                return json.loads((await self._invoke(contract.NEW_SESSION, body)).body)["session_id"]
            except Fault as fault:
                if fault.body.get("OriginalStatusCode") != 429 or not self._idle:
                    raise
                await self._close(self._idle.popitem(last=False)[1])

    def _keep(self, chat: ChatRequest, session: str, answer: str) -> None:
        self._put(_key((*chat.history, Exchange(chat.question, answer))), session)
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
        with contextlib.suppress(Fault):  # the session is already gone
            await self._invoke(session, {"type": "close_session"})

    # --- the native protocol ---

    async def _whole(self, session: str, question: UserMessage, options: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads((await self._invoke(session, _prompt(question, options))).body)
        if "error" in answer:  # the question is large, and failed after its status was sent
            error = answer["error"]
            raise Fault(500, "ModelError", error["message"], OriginalStatusCode=500, OriginalMessage=json.dumps(answer))
        return answer

    async def _streamed(self, session: str, question: UserMessage, options: dict[str, Any]) -> StreamedReply:
        body = {**_prompt(question, options), "stream": True}
        return await self._service.invoke_stream(_call(contract.INVOKE_STREAM, session, body))

    async def _invoke(self, session: str, body: dict[str, Any]) -> EndpointReply:
        return await self._service.invoke(_call(contract.INVOKE, session, body))


def _call(api: str, session: str, body: dict[str, Any]) -> ApiCall:
    headers = httpx.Headers({"Content-Type": "application/json", contract.SESSION_HEADER: session})
    return ApiCall(api, headers, json.dumps(body).encode())


def _prompt(question: UserMessage, options: dict[str, Any]) -> dict[str, Any]:
    return {"type": "send_text_prompt", "prompt_text": question.text, **options, **_pictures(question)}


def _pictures(question: UserMessage) -> dict[str, Any]:
    if len(question.pictures) > 1:
        return {"images": list(question.pictures)}
    return {"path": question.pictures[0]} if question.pictures else {}


def _is_lost(fault: Fault) -> bool:
    """Return whether the session is gone, or may be."""
    if fault.kind == "ModelError":
        return fault.body["OriginalStatusCode"] in (0, 404, 410)
    return fault.kind in ("ValidationError", "ServiceUnavailable")


def _key(history: tuple[Exchange, ...]) -> str:
    return hashlib.sha256(repr(history).encode()).hexdigest()


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _head(chat: ChatRequest, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": chat.model}


def _chunk(head: dict[str, Any], delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
        "prompt_tokens_details": {"cached_tokens": usage["cached_tokens"]},
    }
