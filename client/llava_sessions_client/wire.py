"""Requests and replies of the wire protocol (docs/protocol.md). No input or output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from .answers import Turn
from .clips import Clip
from .errors import UNEXPECTED, ConnectionFailed, api_error
from .pictures import Picture

SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
CLOSED_HEADER = "X-Amzn-SageMaker-Closed-Session-Id"
CONTENT_TYPE = "application/json"
ENVELOPE_BYTES = 16 * 1024  # of a request: everything but pictures and texts
Body = dict[str, Any]
# The names of options in a request with `messages`; None: the server has no such option there.
_CHAT_NAMES = {"max_new_tokens": "max_completion_tokens", "return_token_ids": None}


@dataclass(frozen=True)
class Request:
    """A request. `session_id` is empty for an open."""

    body: Body = field(repr=False)
    session_id: str = ""

    @cached_property
    def content(self) -> bytes:
        """The encoded body."""
        return json.dumps(self.body).encode()

    @property
    def streamed(self) -> Request:
        """The same request for a streamed answer. It has the same retry key."""
        options = {"stream_options": {"include_usage": True}} if "messages" in self.body else {}
        return Request({**self.body, "stream": True, **options}, self.session_id)


@dataclass(frozen=True)
class Reply:
    """A reply, or the head of a streamed one, whose `body` is empty. `announced`: the value of the session header."""

    status: int
    body: bytes = b""
    announced: str = ""
    retry_after_s: float | None = None

    @property
    def is_success(self) -> bool:
        """Whether the status is that of a success."""
        return 200 <= self.status < 300


def open_request(
    pictures: Sequence[Picture],
    history: Sequence[Turn],
    request_id: str,
    session_token: str | None,
    confirm_s: int | None = None,
    clip: Clip | None = None,
) -> Request:
    """Return the open of a session. `pictures` and `clip` precede those of the first turn.

    `confirm_s`: the session expires so soon unless another request names it.
    """
    body: Body = {"type": "start_session", **_media(pictures, clip)}
    if history:
        body["history"] = [
            {"prompt_text": turn.text, **_media(turn.pictures, turn.clip), "response_text": turn.answer.text}
            for turn in history
        ]
    if not pictures and clip is None and not history:
        body = {"requestType": "NEW_SESSION"}
    if confirm_s is not None:
        body["confirm_s"] = confirm_s
    return Request({**body, **_token(session_token), "request_id": request_id})


def ask_request(session_id: str, turn: Turn, options: Body, session_token: str | None) -> Request:
    """Return the question of a turn. `options` include its `request_id`."""
    media = _media(turn.pictures, turn.clip)
    body = {"type": "send_text_prompt", "prompt_text": turn.text, **media, **options, **_token(session_token)}
    return Request(body, session_id)


def rewrite_request(
    session_id: str, turns: Sequence[Turn], options: Body, session_token: str | None, clip: Clip | None = None
) -> Request:
    """Return a request that makes `turns` the session's conversation and answers the last one.

    `clip`: that of the open, which precedes the clip of the first turn.
    """
    messages: list[Body] = []
    for number, turn in enumerate(turns):
        clips = [one for one in (None if number else clip, turn.clip) if one is not None]
        messages.append({"role": "user", "content": _content(turn, clips)})
        messages.append({"role": "assistant", "content": turn.answer.text})
    named = {_CHAT_NAMES.get(name, name): value for name, value in options.items()}
    body = {name: value for name, value in named.items() if name is not None}
    return Request({"messages": messages[:-1], **body, **_token(session_token)}, session_id)


def cancel_request(session_id: str, session_token: str | None) -> Request:
    """Return a request that ends the running turn and rolls the session back."""
    return Request({"type": "cancel", **_token(session_token)}, session_id)


def describe_request(session_id: str, session_token: str | None) -> Request:
    """Return a request for the place, the memory and the expiry of a session."""
    return Request({"type": "describe_session", **_token(session_token)}, session_id)


def close_request(session_id: str, session_token: str | None) -> Request:
    """Return the close of a session."""
    return Request({"type": "close_session", **_token(session_token)}, session_id)


def announced_session(reply: Reply) -> tuple[str, datetime | None]:
    """Return ID and expiry from the reply to an open. Raise `ApiError` if it names no session."""
    session_id, _, expires = reply.announced.partition("; Expires=")
    if not session_id.strip():
        raise api_error(reply.status, UNEXPECTED, f"the reply to an open must have `{SESSION_HEADER}`, got none")
    return session_id.strip(), time_of(expires)


def time_of(text: str) -> datetime | None:
    """Return a time in the form of SageMaker's header, or None for another text."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


def facts_of(body: bytes) -> Body:
    """Return the object of a body or a line with status 200. Raise `ApiError` for a late error.

    Raise `ConnectionFailed` for text that is not an object of the protocol: the reply was cut.
    """
    try:
        facts = json.loads(body)
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or not _is_well_formed(facts):
        raise ConnectionFailed("the reply must be whole, got a part of it")
    if "error" in facts:
        error = facts["error"]
        if not isinstance(error, dict):
            raise api_error(200, UNEXPECTED, str(error))
        raise api_error(200, str(error.get("code")), str(error.get("message")))
    return facts


def piece_of(facts: Body) -> str:
    """Return the text of a line of a stream, in the native form or in OpenAI's."""
    if "choices" not in facts:
        return str(facts.get("delta", ""))
    return "".join(choice.get("delta", {}).get("content") or "" for choice in facts["choices"])


def text_of(facts: Body) -> str:
    """Return the text of a whole answer, in the native form or in OpenAI's."""
    if "choices" not in facts:
        return str(facts.get("response_text", ""))
    return "".join(choice.get("message", {}).get("content") or "" for choice in facts["choices"])


def finish_of(facts: Body) -> str:
    """Return the finish reason of a reply or of the last line of a stream, "" for another line."""
    if "choices" not in facts:
        return str(facts.get("finish_reason") or "")
    return "".join(choice.get("finish_reason") or "" for choice in facts["choices"])


def _is_well_formed(facts: Body) -> bool:
    choices = facts.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        return False
    inner = [choice.get(name, {}) for choice in choices for name in ("delta", "message")]
    inner += [facts.get(name) or {} for name in ("usage", "timings")]
    return all(isinstance(each, dict) for each in inner)


def _images(pictures: Sequence[Picture]) -> Body:
    if len(pictures) == 1:
        return {"image": pictures[0].base64}
    return {"images": [picture.base64 for picture in pictures]} if pictures else {}


def _media(pictures: Sequence[Picture], clip: Clip | None) -> Body:
    if clip is None:
        return _images(pictures)
    return {**_images(pictures), "video": clip.video, **_sampled(clip)}


def _sampled(clip: Clip) -> Body:
    return {} if clip.sampled_frames is None else {"video_frames": clip.sampled_frames}


def _content(turn: Turn, clips: Sequence[Clip]) -> str | list[Body]:
    if not turn.pictures and not clips:
        return turn.text
    parts: list[Body] = [{"type": "image_url", "image_url": {"url": picture.data_url}} for picture in turn.pictures]
    parts += [{"type": "video_url", "video_url": {"url": clip.data_url, **_sampled(clip)}} for clip in clips]
    return [*parts, {"type": "text", "text": turn.text}]


def _token(session_token: str | None) -> Body:
    return {} if session_token is None else {"session_token": session_token}
