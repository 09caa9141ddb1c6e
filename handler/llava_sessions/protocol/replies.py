"""Bodies and headers of replies, and the forms that a turn's reply can have. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from ..errors import Refused
from ..ipc.messages import Residence, Timings, Usage
from .constants import NEW_SESSION_HEADER, SESSION_HEADER, STREAM_TYPE

Body = dict[str, Any]


def utc_text(time_s: float) -> str:
    """Return a time in the form of SageMaker's header, UTC. `time_s`: seconds since the epoch."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def session_headers(session_id: str, expires: str) -> dict[str, str]:
    """Return the headers of an open's reply. `expires` is UTC, `YYYY-MM-DDTHH:MM:SSZ`."""
    value = f"{session_id}; Expires={expires}"
    return {SESSION_HEADER: value, NEW_SESSION_HEADER: value}


def opened(
    session_id: str, expires: str, image_tokens: int, prompt_tokens: int, turns: int = 0, durable: bool | None = None
) -> Body:
    """Return the body of an open's reply.

    `turns`: finished turns of a resumed session. `durable`: whether the session is in the store; None if there is no
    store, then the body has no such field.
    """
    counts = {"image_tokens": image_tokens, "prompt_tokens": prompt_tokens}
    body: Body = {"session_id": session_id, "expires": expires, "usage": counts}
    if turns:
        body["turns"] = turns
    return body if durable is None else {**body, "durable": durable}


def closed(session_id: str) -> Body:
    """Return the body of a close's reply."""
    return {"success": True, "session_id": session_id}


def cancelled(session_id: str, had_turn: bool) -> Body:
    """Return the body of a cancel's reply; `success` is false if no turn was running."""
    return {"success": had_turn, "session_id": session_id}


def described(session_id: str, expires: str, is_answering: bool, residence: Residence) -> Body:
    """Return the body of a description of a session. `expires`: the time at which the session ends without a turn."""
    memory = {
        "kv_bytes": residence.kv_bytes,
        "offloaded_bytes": residence.offloaded_bytes,
        "features_bytes": residence.features_bytes,
    }
    return {
        "session_id": session_id,
        "expires": expires,
        "is_answering": is_answering,
        "residency": residence.tier,
        "cached_tokens": residence.cached_tokens,
        "memory": memory,
    }


def answer_facts(
    session_id: str, finish_reason: str, usage: Usage, timings: Timings, token_ids: list[int] | None
) -> Body:
    """Return the fields of a turn that has ended: the last line of a stream, and a part of a whole answer's body.

    `token_ids` None adds no such field.
    """
    rounded = {name: round(value_ms, 1) for name, value_ms in vars(timings).items()}
    facts: Body = {
        "session_id": session_id,
        "finish_reason": finish_reason,
        "usage": dict(vars(usage)),
        "timings": rounded,
    }
    return facts if token_ids is None else {**facts, "token_ids": token_ids}


def line(body: Body) -> str:
    """Return one line of a streamed answer."""
    return json.dumps(body, ensure_ascii=False) + "\n"


class ReplyForm(Protocol):
    """How the answer of a turn, or an error, becomes the body of a reply.

    `pieces`: texts that became certain since the last chunk. `is_first`: no chunk with text has been made yet.
    """

    @property
    def stream_type(self) -> str:
        """The content type of a streamed answer."""

    def chunk(self, pieces: Sequence[str], is_first: bool) -> str:
        """Return the next chunk of a stream; "" for no pieces."""

    def last_chunk(self, pieces: Sequence[str], is_first: bool, facts: Body) -> str:
        """Return the last chunk of a stream. `facts`: of `answer_facts`."""

    def whole(self, text: str, facts: Body) -> Body:
        """Return the body of an answer that is not streamed."""

    def status(self, refused: Refused) -> int:
        """Return the HTTP status of an error."""

    def error(self, refused: Refused) -> Body:
        """Return the body of an error."""

    def error_chunk(self, refused: Refused, is_stream: bool) -> str:
        """Return an error as the end of a reply whose status has been sent."""


@dataclass(frozen=True)
class NativeForm:
    """The form of the native protocol: JSON lines with one `delta` for each piece."""

    stream_type: str = STREAM_TYPE

    def chunk(self, pieces: Sequence[str], is_first: bool) -> str:
        """Return one line for each piece."""
        return "".join(line({"delta": text}) for text in pieces)

    def last_chunk(self, pieces: Sequence[str], is_first: bool, facts: Body) -> str:
        """Return the remaining lines, the last one with the facts."""
        return self.chunk(pieces, is_first) + line({"delta": "", **facts})

    def whole(self, text: str, facts: Body) -> Body:
        """Return the text and the facts."""
        return {"response_text": text, **facts}

    def status(self, refused: Refused) -> int:
        """Return the status of the error's code."""
        return refused.status

    def error(self, refused: Refused) -> Body:
        """Return the code and the message."""
        return refused.body()

    def error_chunk(self, refused: Refused, is_stream: bool) -> str:
        """Return one line."""
        return line(refused.body())
