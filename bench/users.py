"""Users of `bench.sessions`: each runs in a thread, and logs its turns, its errors and what became of its session."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import httpx

from llava_sessions_client import Chat, ClientError, Endpoint, SessionLost, Timeouts

from . import talk

STAYS, LEAVES, RETURNS, EXPIRES, STATELESS = "stays", "leaves early", "comes back", "expires", "stateless /v1"
AFTER_PAUSE = "comes back: after the pause"
RECOVERED = "expires: recovered"
PIECES_BEFORE_LEAVING = 2
_TIMEOUT_S = 600.0


class Stopped(Exception):
    """The run ends before this user has asked all questions."""


class FailedAnswer(Exception):
    """The server has ended an answer of /v1 with an error. The message is its code."""


@dataclass(frozen=True)
class Plan:
    """What each user does. `return_s` and `expire_s`: long pauses, shorter and longer than a session may be idle."""

    turns: int
    think_s: float
    return_s: float
    expire_s: float
    tokens: int
    picture_px: int


@dataclass(frozen=True)
class Turn:
    """A measured answer. `label`: the kind of user, or of the turn. Times in s; `itl_s` is a mean between tokens."""

    label: str
    number: int
    ttft_s: float
    total_s: float
    itl_s: float
    prompt_tokens: int
    cached_tokens: int


@dataclass
class Log:
    """What all users have seen so far. `on_change` is called after each entry, under the lock."""

    on_change: Callable[[Log], None] = lambda _: None
    turns: list[Turn] = field(default_factory=list)
    opens: list[tuple[str, float]] = field(default_factory=list)  # kind, and seconds of the open
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and code
    events: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and event
    open_sessions: int = 0
    stop: threading.Event = field(default_factory=threading.Event)  # set: users close their sessions and end
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_turn(self, turn: Turn) -> None:
        """Log an answer."""
        with self._lock:
            self.turns.append(turn)
            self.on_change(self)

    def add_open(self, kind: str, taken_s: float) -> None:
        """Log an open of a session."""
        with self._lock:
            self.opens.append((kind, taken_s))
            self.open_sessions += 1
            self.on_change(self)

    def add_error(self, kind: str, code: str) -> None:
        """Log an error of the server or of the connection."""
        with self._lock:
            self.errors[kind, code] += 1
            self.on_change(self)

    def add_event(self, kind: str, event: str, ended: int = 0) -> None:
        """Log an event. `ended`: sessions that end with it."""
        with self._lock:
            self.events[kind, event] += 1
            self.open_sessions -= ended
            self.on_change(self)

    def wait(self, seconds: float) -> None:
        """Pause. Raise `Stopped` if the run ends meanwhile."""
        if self.stop.wait(seconds):
            raise Stopped

    def count(self, event: str, kind: str | None = None) -> int:
        """Return how often an event happened, to one kind of user or to all."""
        return sum(found for (of, name), found in self.events.items() if name == event and kind in (None, of))


class User:
    """A user with a session of its own, on a connection of its own."""

    def __init__(self, kind: str, seed: int, url: str, plan: Plan, log: Log) -> None:
        self.kind = kind
        self.plan = plan
        self.log = log
        self.talk = talk.conversation(seed, plan.turns, plan.picture_px, plan.think_s)
        self.http = httpx.Client(timeout=_TIMEOUT_S, trust_env=False)
        timeouts = Timeouts(first_byte_s=_TIMEOUT_S, between_s=_TIMEOUT_S, total_s=_TIMEOUT_S)
        # With the client's own retries: an error that is logged is one that a program would see.
        self._endpoint = Endpoint(url, timeout_s=timeouts, http_client=self.http)
        self._chat: Chat | None = None

    def run(self) -> None:
        """Do what this kind of user does. Errors are logged. Close the session after an error and at a stop."""
        try:
            SCRIPTS[self.kind](self)
        except SessionLost as error:
            self._ended("lost")
            self.log.add_error(self.kind, error.code)
        except ClientError as error:
            self.log.add_error(self.kind, getattr(error, "code", type(error).__name__))
        except Stopped:
            pass
        finally:
            if self._chat is not None:
                with suppress(ClientError):
                    self.close(self._chat)
            self.http.close()

    def open(self, on_lost: str = "raise") -> Chat:
        """Open a session on this user's picture."""
        began = time.perf_counter()
        self._chat = self._endpoint.open(self.talk.picture, on_lost=on_lost)
        self.log.add_open(self.kind, time.perf_counter() - began)
        return self._chat

    def ask(self, chat: Chat, number: int, label: str | None = None) -> bool:
        """Ask question `number` and read its whole answer. Return whether the session had to be opened again."""
        stream = chat.stream(self.talk.questions[number], max_new_tokens=self.plan.tokens, ignore_eos=True)
        for _ in stream:
            self.log.wait(0)
        answer = stream.answer
        decoded = max(answer.usage.completion_tokens - 1, 1)
        self.log.add_turn(
            Turn(
                label or self.kind,
                number + 1,
                answer.ttft_s,
                answer.total_s,
                (answer.total_s - answer.ttft_s) / decoded,
                answer.usage.prompt_tokens,
                answer.usage.cached_tokens,
            )
        )
        return answer.replayed

    def leave(self, chat: Chat, number: int) -> None:
        """Ask a question and disconnect in the middle of its answer."""
        stream = chat.stream(self.talk.questions[number], max_new_tokens=self.plan.tokens, ignore_eos=True)
        for count, _ in enumerate(stream, 1):
            if count == PIECES_BEFORE_LEAVING:
                break
        stream.cancel()
        self.log.add_event(self.kind, "left")

    def think(self, number: int) -> None:
        """Wait before question `number`."""
        self.log.wait(self.talk.pauses_s[number])

    def close(self, chat: Chat) -> None:
        """Close the session."""
        chat.close()
        self._ended("closed")

    def go_away(self) -> None:
        """Leave the session open, so that it expires."""
        self._ended("went away")

    def _ended(self, event: str) -> None:
        self._chat = None
        self.log.add_event(self.kind, event, ended=1)


def stay(user: User) -> None:
    """Ask all questions and close."""
    chat = user.open()
    for number in range(user.plan.turns):
        user.think(number)
        user.ask(chat, number)
    user.close(chat)


def leave(user: User) -> None:
    """Leave each second answer, ask the question again later, and go away without a close."""
    chat = user.open()
    for number in range(user.plan.turns):
        user.think(number)
        if number % 2:
            user.leave(chat, number)
        user.ask(chat, number)
    user.go_away()


def come_back(user: User) -> None:
    """Pause for long before the last question, so that the KV cache may be offloaded. Then close."""
    chat = user.open()
    last = user.plan.turns - 1
    for number in range(last):
        user.think(number)
        user.ask(chat, number)
    user.log.wait(user.plan.return_s)
    user.ask(chat, last, AFTER_PAUSE)
    user.close(chat)


def expire(user: User) -> None:
    """Let the session expire before the last question. The client opens it again with its history."""
    chat = user.open("replay")
    last = user.plan.turns - 1
    for number in range(last):
        user.think(number)
        user.ask(chat, number)
    user.log.wait(user.plan.expire_s)
    is_replayed = user.ask(chat, last, RECOVERED)
    user.log.add_event(user.kind, "recovered" if is_replayed else "not expired")
    user.close(chat)


SCRIPTS: dict[str, Callable[[User], None]] = {STAYS: stay, LEAVES: leave, RETURNS: come_back, EXPIRES: expire}


class StatelessUser:
    """The baseline: the questions of a user who stays, each with the whole conversation, at OpenAI's /v1."""

    def __init__(self, seed: int, openai_url: str, plan: Plan, log: Log) -> None:
        self.plan = plan
        self.log = log
        self.talk = talk.conversation(seed, plan.turns, plan.picture_px, plan.think_s)
        self.http = httpx.Client(timeout=_TIMEOUT_S, trust_env=False)
        self._url = f"{openai_url}/chat/completions"

    def run(self) -> None:
        """Ask all questions. Errors are logged."""
        image = {"type": "image_url", "image_url": {"url": self.talk.data_url}}
        messages: list[dict] = []
        try:
            for number, question in enumerate(self.talk.questions):
                self.log.wait(self.talk.pauses_s[number])
                text = {"type": "text", "text": question}
                messages.append({"role": "user", "content": [text] if messages else [image, text]})
                messages.append({"role": "assistant", "content": self._ask(number, messages)})
        except httpx.HTTPStatusError as error:
            self.log.add_error(STATELESS, _code(error.response))
        except httpx.HTTPError as error:
            self.log.add_error(STATELESS, type(error).__name__)
        except FailedAnswer as error:
            self.log.add_error(STATELESS, str(error))
        except Stopped:
            pass
        finally:
            self.http.close()

    def _ask(self, number: int, messages: list[dict]) -> str:
        body = {"model": "llava", "messages": messages, "max_tokens": self.plan.tokens, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        began, first, text, usage = time.perf_counter(), 0.0, "", {}
        with self.http.stream("POST", self._url, json=body) as reply:
            if reply.is_error:
                reply.read()
            for line in reply.raise_for_status().iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise FailedAnswer(str(chunk["error"].get("code")))
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                first = first or (time.perf_counter() if text else 0.0)
                usage = chunk.get("usage") or usage
        ended = time.perf_counter()
        first = first or ended
        decoded = max(usage.get("completion_tokens", 0) - 1, 1)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        times = (first - began, ended - began, (ended - first) / decoded)
        self.log.add_turn(Turn(STATELESS, number + 1, *times, usage.get("prompt_tokens", 0), cached))
        return text


def _code(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return str(reply.status_code)
