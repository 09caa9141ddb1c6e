"""Clients of the served sides: one persistent connection for each chat, streamed answers, greedy, of a fixed length."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import httpx

from ..route import SESSION_HEADER
from .worker import Chat, Job, Outcome, Turn

TIMEOUT_S = 600


class ChatClient(Protocol):
    """A client of one chat."""

    def turn(self, question: str, tokens: int) -> Turn:
        """Run the next turn."""
        ...

    def close(self) -> None:
        """Close the chat and its connection."""
        ...


class Answer:
    """The times and the text of an answer while it arrives."""

    def __init__(self, asked_at: float) -> None:
        self._asked_at = asked_at
        self._first_at = 0.0
        self._last_at = 0.0
        self.text = ""

    def add(self, text: str) -> None:
        """Note a piece of text that has just arrived."""
        if text:
            self._last_at = time.perf_counter()
            self._first_at = self._first_at or self._last_at
            self.text += text

    def turn(self, tokens: int) -> Turn:
        """Return the complete turn."""
        first, last = self._first_at - self._asked_at, self._last_at - self._asked_at
        return Turn(first * 1e3, last * 1e3, tokens, self.text.strip())


class NativeChat:
    """A chat in this project's native protocol: one open, then each question alone."""

    def __init__(self, url: str, chat: Chat) -> None:
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False)
        self._picture = base64.b64encode(chat.jpeg).decode()
        self._headers: dict[str, str] = {}

    def turn(self, question: str, tokens: int) -> Turn:
        """Ask; the first question follows the reply to the open at once."""
        answer = Answer(time.perf_counter())
        if not self._headers:
            body = {"type": "start_session", "image": self._picture}
            opened = self._http.post("/invocations", json=body).raise_for_status().json()
            self._headers = {SESSION_HEADER: opened["session_id"]}
        body = {"type": "send_text_prompt", "prompt_text": question, "stream": True}
        body |= {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
        used = 0
        with self._http.stream("POST", "/invocations", json=body, headers=self._headers) as reply:
            for line in reply.raise_for_status().iter_lines():
                part = json.loads(line)
                answer.add(part["delta"])
                used = part.get("usage", {}).get("completion_tokens", used)
        return answer.turn(used)

    def close(self) -> None:
        """Close the session."""
        self._http.post("/invocations", json={"type": "close_session"}, headers=self._headers).raise_for_status()
        self._http.close()


class OpenAIChat:
    """A chat in OpenAI's API: each request has the picture and the whole conversation.

    `uuid` names the picture, so that vLLM need not hash it. It is no part of OpenAI's API.
    """

    def __init__(self, url: str, chat: Chat, model: str, uuid: str | None = None) -> None:
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False)
        self._model = model
        picture = f"data:image/jpeg;base64,{base64.b64encode(chat.jpeg).decode()}"
        self._picture = {"type": "image_url", "image_url": {"url": picture}} | ({"uuid": uuid} if uuid else {})
        self._messages: list[dict] = []

    def turn(self, question: str, tokens: int) -> Turn:
        """Ask with the whole conversation."""
        answer = Answer(time.perf_counter())
        text = {"type": "text", "text": question}
        self._messages.append({"role": "user", "content": [text] if self._messages else [self._picture, text]})
        body = {"model": self._model, "messages": self._messages, "max_tokens": tokens, "ignore_eos": True}
        body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        used = 0
        with self._http.stream("POST", "/v1/chat/completions", json=body) as reply:
            for part in _events(reply.raise_for_status()):
                for choice in part["choices"]:
                    answer.add(choice["delta"].get("content") or "")
                used = (part.get("usage") or {}).get("completion_tokens", used)
        turn = answer.turn(used)
        self._messages.append({"role": "assistant", "content": turn.answer})
        return turn

    def close(self) -> None:
        """Close the connection."""
        self._http.close()


def _events(reply: httpx.Response) -> Iterator[dict]:
    """Yield the objects of server-sent events."""
    for line in reply.iter_lines():
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            yield json.loads(data)


def run_chats(job: Job, client: Callable[[Chat], ChatClient]) -> Outcome:
    """Run the chats of a job at once, each in a thread."""
    clients = [client(chat) for chat in job.chats]

    def run(number: int) -> list[Turn]:
        return [clients[number].turn(question, job.tokens) for question in job.chats[number].questions]

    began = time.perf_counter()
    with ThreadPoolExecutor(len(clients)) as pool:
        chats = list(pool.map(run, range(len(clients))))
    seconds = time.perf_counter() - began
    for one in clients:
        one.close()
    return Outcome(seconds, chats)
