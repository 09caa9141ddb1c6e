"""Drive the core of the Python client without a network: each effect has a scripted result."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any

from llava_sessions_client.conversation import Conversation
from llava_sessions_client.effects import Abort, Call, Compute, Core, Finish, Left, Piece, Read, Sleep, Start
from llava_sessions_client.options import Retries, Timeouts
from llava_sessions_client.settings import Settings
from llava_sessions_client.shrink import PictureLimits
from llava_sessions_client.wire import Reply

FACTS = {
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 5, "cached_tokens": 3, "completion_tokens": 2},
    "timings": {"queue_ms": 0.5, "ttft_ms": 20.0, "total_ms": 40.0},
}
OPENED = Reply(200, b"{}", "abc-1; Expires=2030-01-01T00:00:00Z")
CLOSED = Reply(200, b'{"success": true}')
CANCELLED = Reply(200, b'{"success": true}')


def settings(**timeouts: float) -> Settings:
    """Return settings with few retries."""
    return Settings(Timeouts(**timeouts), Retries(most=4, most_in_vain=2), PictureLimits(), 1_000_000)


def answer(text: str, **facts: Any) -> Reply:
    """Return a whole answer in the native form."""
    return Reply(200, json.dumps({"response_text": text, **FACTS, **facts}).encode())


def completion(text: str, finish_reason: str = "stop") -> Reply:
    """Return a whole answer in OpenAI's form."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
    return Reply(200, json.dumps({"choices": [choice], "usage": usage, "timings": FACTS["timings"]}).encode())


def refusal(status: int, code: str, retry_after_s: float | None = None) -> Reply:
    """Return an error reply."""
    return Reply(status, json.dumps({"error": {"code": code, "message": "Why."}}).encode(), "", retry_after_s)


def lines(*pieces: str, end: bool = True) -> bytes:
    """Return a streamed answer. Without `end` it lacks its last line."""
    events = [{"delta": piece} for piece in pieces] + ([{"delta": "", **FACTS}] if end else [])
    return "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events).encode()


class Script:
    """Results of the requests of a conversation, in their order: a `Reply`, an error, or the parts of a stream."""

    def __init__(self, conversation: Conversation, *results: Any) -> None:
        self.conversation = conversation
        self.results = deque(results)
        self.bodies: list[dict[str, Any]] = []
        self.sessions: list[str] = []
        self.sleeps: list[float] = []
        self.pieces: list[str] = []
        self.aborts = 0
        self.during: Callable[[Any], object] = lambda effect: None  # called before each effect
        self._parts: deque[Any] = deque()

    def run(self, core: Core[Any], leave_after: int | None = None) -> Any:
        """Run the core and return its result. `leave_after`: pieces after which the caller leaves the stream."""
        result: Any = None
        failure: BaseException | None = None
        while True:
            try:
                effect = core.send(result) if failure is None else core.throw(failure)
            except StopIteration as stop:
                return stop.value
            result, failure = None, None
            try:
                result = self._perform(effect)
            except Exception as error:
                failure = error
            if isinstance(effect, Piece) and len(self.pieces) == leave_after:
                failure = Left()

    def _perform(self, effect: Any) -> Any:
        self.during(effect)
        match effect:
            case Call() | Start():
                self.bodies.append(effect.request.body)
                self.sessions.append(effect.request.session_id)
                result = self.results.popleft()
                if isinstance(result, Exception):
                    raise result
                if isinstance(result, list):
                    self._parts = deque(result)
                    return Reply(200)
                return result
            case Read():
                part = self._parts.popleft() if self._parts else b""
                if isinstance(part, Exception):
                    raise part
                return part
            case Sleep():
                self.sleeps.append(effect.seconds)
            case Compute():
                return effect.work()
            case Piece():
                self.pieces.append(effect.text)
            case Abort():
                self.aborts += 1
            case Finish():
                pass
        return None
