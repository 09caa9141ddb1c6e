"""OpenAI's chat completions: the requests `Chat` and `Models`, and the form of their replies. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from ..errors import Refused
from .constants import EVENT_STREAM_TYPE, STREAM_TYPE
from .fields import SessionId
from .replies import Body
from .requests import BaseRequest, ClipSource, PictureSource, TurnRequest

CHAT_PATH = "v1/chat/completions"
MODELS_PATH = "v1/models"
_OWNER = "llava-sessions"
# OpenAI has one word for an answer that was cut: at the deadline, by a cancel or at a shutdown.
_FINISH_REASONS = {"stop": "stop"}
_CUT = "length"
_CONTEXT_LENGTH_STATUS = 400
_DONE = "data: [DONE]\n\n"


class RefusedChat(Refused):
    """A refused request in OpenAI's words: its error has OpenAI's form."""


@dataclass(frozen=True)
class ChatMessage:
    """The messages of one role that followed each other.

    `text` may be empty. Pictures precede clips, and clips precede the text.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    pictures: tuple[PictureSource, ...] = ()
    clips: tuple[ClipSource, ...] = ()


class Chat(TurnRequest):
    """Answer the last question of a conversation.

    `session_id`: of the session header; None for a conversation that names no session. `messages`: at most one of role
    "system", which is the first. The others alternate, and the last one is a user's. `label`: digest of `user` and
    `prompt_cache_key`. `is_sse`: a stream is sent as server-sent events, else as JSON lines.
    """

    session_id: SessionId | None = None
    messages: tuple[ChatMessage, ...]
    include_usage: bool = False
    model: str = ""
    label: str | None = None
    is_sse: bool = False

    first: ClassVar[tuple[str, ...]] = ("model", "messages", "session_id")
    expected: ClassVar[Mapping[str, str]] = {
        **TurnRequest.expected,
        "max_new_tokens": "`{name}` must be an integer above 0, or -1, got {actual}",
        "min_tokens": "`min_tokens` must be an integer from 0 to `max_completion_tokens`, got {actual}",
        "seed": "`seed` must be an integer from 0 to 9223372036854775807, or -1, got {actual}",
    }

    @property
    def pictures(self) -> tuple[PictureSource, ...]:
        """Return the pictures of all messages in their order."""
        return tuple(picture for message in self.messages for picture in message.pictures)

    @property
    def clips(self) -> tuple[ClipSource, ...]:
        """Return the clips of all messages in their order."""
        return tuple(clip for message in self.messages for clip in message.clips)

    def without_pictures(self) -> Chat:
        """Return a copy without pictures and clips, which may take 32 MiB. It has the same retry key."""
        messages = tuple(replace(message, pictures=(), clips=()) for message in self.messages)
        return self.model_copy(update={"messages": messages})


class Models(BaseRequest):
    """Describe the model. `name`: of `GET /v1/models/NAME`; None for the list of models."""

    name: str | None = None

    def body(self, served_name: str, created_s: float) -> Body:
        """Return the reply's body. `created_s`: Unix time. Raise `RefusedChat` for another name than the served one."""
        model = {"id": served_name, "object": "model", "created": int(created_s), "owned_by": _OWNER}
        if self.name is None:
            return {"object": "list", "data": [model]}
        if self.name != served_name:
            message = f"The model must be {served_name!r}, got another name."
            raise RefusedChat("model_not_found", message, param="model")
        return model


@dataclass(frozen=True)
class OpenAIForm:
    """The form of OpenAI's chat completions.

    `completion_id`, `created_s` (Unix time), `model` and `fingerprint` are sent with each object. A stream is sent as
    server-sent events, one for each piece, or as JSON lines: one object for all text of a step, because a client of
    SageMaker reads each part of a stream as one JSON object. Chunks are ASCII: some clients decode each part by itself,
    or split lines at U+2028.
    """

    completion_id: str = ""
    created_s: int = 0
    model: str = ""
    fingerprint: str | None = None
    is_sse: bool = True
    include_usage: bool = False

    @classmethod
    def of(cls, chat: Chat, completion_id: str, created_s: float, served_name: str, fingerprint: str) -> OpenAIForm:
        """Return the form of the reply to a chat. `served_name`: the model's name if the client sent none."""
        return cls(
            completion_id=completion_id,
            created_s=int(created_s),
            model=chat.model or served_name,
            fingerprint=fingerprint,
            is_sse=chat.is_sse,
            include_usage=chat.include_usage,
        )

    @property
    def stream_type(self) -> str:
        """The content type of a streamed answer."""
        return EVENT_STREAM_TYPE if self.is_sse else STREAM_TYPE

    def chunk(self, pieces: Sequence[str], is_first: bool) -> str:
        """Return one event for each piece, the role first; or one JSON line with all of them."""
        texts = [text for text in pieces if text]
        if not texts:
            return ""
        if not self.is_sse:
            return self._line(self._delta("".join(texts), is_first))
        role = self._event(self._delta("", is_first)) if is_first else ""
        return role + "".join(self._event(self._delta(text)) for text in texts)

    def last_chunk(self, pieces: Sequence[str], is_first: bool, facts: Body) -> str:
        """Return the remaining text, the finish reason and the usage, if the client asked for it."""
        finish = _FINISH_REASONS.get(facts["finish_reason"], _CUT)
        usage = _usage(facts["usage"])
        if not self.is_sse:
            body = self._delta("".join(pieces), is_first, finish)
            return self._line({**body, "usage": usage, **self._timings(facts)} if self.include_usage else body)
        text = self.chunk(pieces, is_first)
        events = text + self._event(self._delta("" if is_first and not text else None, is_first and not text, finish))
        if self.include_usage:
            events += self._event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage})
        return events + _DONE

    def whole(self, text: str, facts: Body) -> Body:
        """Return the `chat.completion`."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": _FINISH_REASONS.get(facts["finish_reason"], _CUT),
        }
        usage = _usage(facts["usage"])
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage, **self._timings(facts)}

    def status(self, refused: Refused) -> int:
        """Return the status of the error's code. OpenAI answers 400 where the conversation exceeds the context."""
        return _CONTEXT_LENGTH_STATUS if refused.code == "context_length_exceeded" else refused.status

    def error(self, refused: Refused) -> Body:
        """Return OpenAI's error object."""
        kind = _error_type(refused.status)
        return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}}

    def error_chunk(self, refused: Refused, is_stream: bool) -> str:
        """Return the error as the last event or the last line."""
        body = self.error(refused)
        return self._event(body) + _DONE if is_stream and self.is_sse else self._line(body)

    def _timings(self, facts: Body) -> Body:
        """Return the native field of the times. OpenAI has none, so it is not sent on OpenAI's own path."""
        return {} if self.is_sse else {"timings": facts["timings"]}

    def _head(self, kind: str) -> Body:
        head: Body = {"id": self.completion_id, "object": kind, "created": self.created_s, "model": self.model}
        return head if self.fingerprint is None else {**head, "system_fingerprint": self.fingerprint}

    def _delta(self, text: str | None, is_first: bool = False, finish: str | None = None) -> Body:
        """Return a chunk. `text` None: the delta has no content. The first one has the role."""
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        if text is not None:
            delta["content"] = text
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        body = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return {**body, "usage": None} if self.include_usage else body

    @staticmethod
    def _event(body: Body) -> str:
        return f"data: {json.dumps(body)}\n\n"

    @staticmethod
    def _line(body: Body) -> str:
        return json.dumps(body) + "\n"


def _usage(usage: Mapping[str, int]) -> Body:
    """Return OpenAI's token counts for those of `answer_facts`."""
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
        "prompt_tokens_details": {"cached_tokens": usage["cached_tokens"]},
    }


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
