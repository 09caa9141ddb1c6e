"""Check a running server: readiness, and whether a session ID makes the round trip in its header."""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from deploy.serve.processes import LOOPBACK

from .findings import Finding, Subject, error, ok
from .headers import SESSION_HEADER

_TIMEOUT_S = 60
_CLOSED = "X-Amzn-SageMaker-Closed-Session-Id"
_PROXY = "check which headers a proxy between passes on; doctor without --live checks the server's own settings"


def check_live(subject: Subject) -> Iterator[Finding]:
    """Open a session on the server at the port, ask, close it, and close one that does not exist."""
    try:
        status, _, _ = call(subject.port, "GET", "/ping")
    except (OSError, http.client.HTTPException) as failure:
        yield error("server", f"port {subject.port} does not answer: {type(failure).__name__}", "start it: make serve")
        return
    if status != http.client.OK:
        remedy = "wait until the model has loaded; the server's console and log name the reason of a failure"
        yield error("server", f"/ping answers {status}: not ready, or draining", remedy)
        return
    yield ok("server", f"/ping on port {subject.port} answers 200")
    try:
        yield from _round_trip(subject.port)
    except (OSError, http.client.HTTPException) as failure:
        yield error("live session", f"the connection failed: {type(failure).__name__}: {failure}", _PROXY)


def _round_trip(port: int) -> Iterator[Finding]:
    status, headers, body = post(port, {"requestType": "NEW_SESSION"})
    if status != http.client.OK:
        yield error("live session", f"an open answers {status}: {_reason(body)}", _remedy(status))
        return
    session = headers.get(SESSION_HEADER, "").partition(";")[0]
    if not session:
        yield error("live session", f"the reply to an open has no header {SESSION_HEADER}", _PROXY)
        return
    header = {SESSION_HEADER: session}
    question = {"type": "send_text_prompt", "prompt_text": "?", "max_new_tokens": 1}
    asked, _, answer = post(port, question, header)
    status, headers, body = post(port, {"type": "close_session"}, header)
    if status != http.client.OK:  # leave no session behind: the body names it too
        post(port, {"type": "close_session", "session_id": session})
    if asked != http.client.OK:
        yield error("live session", f"a question in the session answers {asked}: {_reason(answer)}", _remedy(asked))
    elif status != http.client.OK or headers.get(_CLOSED) != session:
        yield error("live session", f"a close of the session answers {status}: {_reason(body)}", _PROXY)
    else:
        yield ok("live session", f"a session was opened, found by {SESSION_HEADER}, asked, and closed")
    status, _, body = post(port, {"type": "close_session"}, {SESSION_HEADER: f"doctor-{secrets.token_hex(8)}"})
    if status != http.client.NOT_FOUND:
        yield error("live session", f"an unknown session must get 404, got {status}: {_reason(body)}", _PROXY)


def call(
    port: int, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send one request to loopback, with the headers' case as given. Return status, headers and body."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, body=body, headers=dict(headers or {}))
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


def post(
    port: int, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a request of the wire protocol."""
    given = {"Content-Type": "application/json", **(headers or {})}
    return call(port, "POST", "/invocations", json.dumps(body).encode(), given)


def _reason(body: bytes) -> str:
    """Return the code and message of an error's body, or what is there."""
    try:
        content = json.loads(body)["error"]
        return f"{content['code']}: {content['message']}"
    except (ValueError, KeyError, TypeError):
        return f"no error body of LLaVA Sessions, {len(body)} bytes"


def _remedy(status: int) -> str:
    if status == http.client.NOT_FOUND:
        return _PROXY
    if status == http.client.TOO_MANY_REQUESTS:
        return "the server is full: close sessions, or configure more"
    return "read the server's log; its console shows the folder"
