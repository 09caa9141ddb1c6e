"""Owns the few HTTP calls of a picture chat: open, ask, close, with or without streaming.

Speaks the wire protocol only, as any client would; it must not import the handler. The demo and the tests of the real
server use it.
"""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
from PIL import Image

SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
CLOSED_HEADER = "X-Amzn-SageMaker-Closed-Session-Id"


class WireError(Exception):
    """The server refused: `status`, and the error's stable `code`."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code


@dataclass
class Answer:
    """One answer: its text, the last line's facts, and when its parts came, in seconds since the ask."""

    text: str = ""
    facts: dict = field(default_factory=dict)
    ttft_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True)
class Chat:
    """One open session on a server."""

    http: httpx.Client
    session_id: str
    expires: str

    @classmethod
    def open(cls, http: httpx.Client, picture: Image.Image | bytes) -> Chat:
        """Open a session on a picture. Raises `WireError`."""
        image = base64.b64encode(picture if isinstance(picture, bytes) else png(picture)).decode()
        reply = checked(http.post("/invocations", json={"type": "start_session", "image": image}))
        session_id, _, expires = reply.headers[SESSION_HEADER].partition("; Expires=")
        return cls(http, session_id, expires)

    @property
    def headers(self) -> dict[str, str]:
        """What ties a request to this session."""
        return {SESSION_HEADER: self.session_id}

    def ask(self, text: str, **options) -> dict:
        """Ask and wait for the whole answer; the reply's body. Raises `WireError`."""
        body = {"type": "send_text_prompt", "prompt_text": text, **options}
        return checked(self.http.post("/invocations", json=body, headers=self.headers)).json()

    def stream(self, text: str, **options) -> Iterator[dict]:
        """Ask and give the answer's lines as they come. Raises `WireError`."""
        body = {"type": "send_text_prompt", "prompt_text": text, "stream": True, **options}
        with self.http.stream("POST", "/invocations", json=body, headers=self.headers) as reply:
            if reply.status_code != httpx.codes.OK:
                reply.read()
            checked(reply)
            for line in reply.iter_lines():
                yield json.loads(line)

    def listen(self, text: str, **options) -> Iterator[tuple[str, Answer]]:
        """Stream an answer: each new piece of text with the answer so far, whose facts are complete at the end."""
        answer, asked = Answer(), time.perf_counter()
        for line in self.stream(text, **options):
            if "error" in line:
                raise WireError(200, line["error"]["code"], line["error"]["message"])
            answer.total_s = time.perf_counter() - asked
            answer.ttft_s = answer.ttft_s or answer.total_s
            answer.text += line["delta"]
            if "finish_reason" in line:
                answer.facts = line
            yield line["delta"], answer

    def close(self) -> httpx.Response:
        """End the session. Raises `WireError`."""
        return checked(self.http.post("/invocations", json={"type": "close_session"}, headers=self.headers))


def checked(reply: httpx.Response) -> httpx.Response:
    """The reply, or its error raised as `WireError`."""
    if reply.is_success:
        return reply
    try:
        error = reply.json()["error"]
        raise WireError(reply.status_code, error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        raise WireError(reply.status_code, "not_ours", reply.text[:200]) from None


def png(picture: Image.Image) -> bytes:
    """A picture as PNG bytes."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def gauges(metrics_url: str) -> dict[str, float]:
    """The server's `llava_*` metrics by name, from its Prometheus page. Those that were never told are absent."""
    text = httpx.get(f"{metrics_url.removesuffix('/metrics')}/metrics").raise_for_status().text
    return {name: float(value) for name, value in re.findall(r"^(llava_\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)}


def settled_gauges(metrics_url: str, timeout_s: float = 20.0, **wanted: float) -> dict[str, float]:
    """The metrics once those in `wanted` have these values (the server tells them at most a second late), or at the
    timeout whatever they are then."""
    until = time.monotonic() + timeout_s
    while True:
        found = gauges(metrics_url)
        if all(found.get(name) == value for name, value in wanted.items()) or time.monotonic() > until:
            return found
        time.sleep(0.05)
