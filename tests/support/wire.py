"""The wire protocol as tests drive it: one request per call, without retries, and each reply as it arrives."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

from llava_sessions_client.lines import split_lines

from .encoding import to_base64

SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
CLOSED_HEADER = "X-Amzn-SageMaker-Closed-Session-Id"


class ApiError(Exception):
    """A rejected request: the HTTP status, and the stable `code` of the error body.

    `code` is "unexpected_reply" when the reply has no error body of LLaVA Sessions, as from a proxy.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code


def raise_for_error(reply: httpx.Response) -> httpx.Response:
    """Return a successful reply. Raise `ApiError` for any other."""
    if reply.is_success:
        return reply
    try:
        error = reply.json()["error"]
        refusal = ApiError(reply.status_code, error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        refusal = ApiError(reply.status_code, "unexpected_reply", reply.text[:200])
    raise refusal


def raise_for_late_error(body: dict[str, Any]) -> None:
    """Raise `ApiError` if a body, or a line of a stream, is an error that occurred after status 200 was sent."""
    if "error" in body:
        raise ApiError(200, body["error"]["code"], body["error"]["message"])


@dataclass
class Answer:
    """A streamed answer so far. `facts` is the last line of the stream; times are in seconds since the request."""

    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    ttft_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True)
class ChatSession:
    """An open session. `http` is a client whose `base_url` is the server; the caller closes it.

    `expires` is the UTC time at which the server closes the session if no request renews it.
    """

    http: httpx.Client
    session_id: str
    expires: str

    @classmethod
    def open(cls, http: httpx.Client, picture: Image.Image | bytes) -> ChatSession:
        """Open a session on a picture. Raise `ApiError` if the server refuses."""
        body = {"type": "start_session", "image": to_base64(picture)}
        reply = raise_for_error(http.post("/invocations", json=body))
        session_id, _, expires = reply.headers[SESSION_HEADER].partition("; Expires=")
        return cls(http, session_id, expires)

    @property
    def headers(self) -> dict[str, str]:
        """The header that names this session in a request."""
        return {SESSION_HEADER: self.session_id}

    def ask(self, text: str, **options: Any) -> dict[str, Any]:
        """Ask a question and return the body of the reply. `options` are further fields of the request.

        Raise `ApiError` if the server refuses, or if it fails after it has sent status 200.
        """
        body = {"type": "send_text_prompt", "prompt_text": text, **options}
        reply = raise_for_error(self.http.post("/invocations", json=body, headers=self.headers))
        answer: dict[str, Any] = reply.json()
        raise_for_late_error(answer)
        return answer

    def stream(self, text: str, **options: Any) -> Iterator[dict[str, Any]]:
        """Ask a question and yield the lines of the streamed answer. Raise `ApiError` if the server refuses.

        An error that occurs after the first line is the last line.
        """
        body = {"type": "send_text_prompt", "prompt_text": text, "stream": True, **options}
        with self.http.stream("POST", "/invocations", json=body, headers=self.headers) as reply:
            if reply.status_code != httpx.codes.OK:
                reply.read()
            raise_for_error(reply)
            for line in split_lines(reply.iter_bytes()):
                yield json.loads(line)

    def stream_answer(self, text: str, **options: Any) -> Iterator[tuple[str, Answer]]:
        """Ask a question and yield each piece of text with the answer so far. Raise `ApiError` for an error line.

        The same `Answer` is yielded each time; its facts are complete after the last piece.
        """
        answer = Answer()
        asked_at = time.perf_counter()
        for line in self.stream(text, **options):
            raise_for_late_error(line)
            answer.total_s = time.perf_counter() - asked_at
            answer.ttft_s = answer.ttft_s or answer.total_s
            answer.text += line["delta"]
            if "finish_reason" in line:
                answer.facts = line
            yield line["delta"], answer

    def close(self) -> httpx.Response:
        """Close the session. Raise `ApiError` if the server refuses."""
        return raise_for_error(self.http.post("/invocations", json={"type": "close_session"}, headers=self.headers))
