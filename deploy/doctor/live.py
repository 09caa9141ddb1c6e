"""Check a running server: readiness, and whether a session ID makes the round trip in its header."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from deploy.serve.processes import LOOPBACK

from .findings import Finding, Subject, error, ok
from .headers import SESSION_HEADER

# Requests take milliseconds, on a busy machine seconds. A question waits for the turns of other clients: three times.
_TIMEOUT_S = 20.0
_CLOSED = "X-Amzn-SageMaker-Closed-Session-Id"
_SILENT = "run doctor again; if it happens again, read the server's log and console, and restart the server"
_PROXY = "check which headers a proxy between passes on; doctor without --live checks the server's own settings"


class NoAnswer(Exception):
    """A request has no answer in time. The message names the request."""


def check_live(subject: Subject, timeout_s: float = _TIMEOUT_S) -> Iterator[Finding]:
    """Open a session on the server at the port, ask, close it, and close one that does not exist."""
    if not subject.port:
        yield error("server", "--live must have the port of a server that runs, got 0", "give its --port (PORT=)")
        return
    try:
        status, _, _ = call(subject.port, "GET", "/ping", timeout_s=timeout_s)
    except (OSError, http.client.HTTPException) as failure:
        yield error("server", f"port {subject.port} does not answer: {type(failure).__name__}", "start it: make serve")
        return
    if status != http.client.OK:
        remedy = "wait until the model has loaded; the server's console and log name the reason of a failure"
        yield error("server", f"/ping answers {status}: not ready, or draining", remedy)
        return
    yield ok("server", f"/ping on port {subject.port} answers 200")
    try:
        yield from _round_trip(subject.port, timeout_s)
    except NoAnswer as failure:
        yield error("live session", str(failure), _SILENT)
    except (OSError, http.client.HTTPException) as failure:
        yield error("live session", f"the connection failed: {type(failure).__name__}: {failure}", _PROXY)


def _round_trip(port: int, timeout_s: float) -> Iterator[Finding]:
    close = {"type": "close_session"}
    status, headers, body = post(port, "an open", {"requestType": "NEW_SESSION"}, timeout_s=timeout_s)
    if status != http.client.OK:
        yield error("live session", f"an open answers {status}: {_reason(body)}", _remedy(status))
        return
    session = headers.get(SESSION_HEADER, "").partition(";")[0]
    if not session:
        yield error("live session", f"the reply to an open has no header {SESSION_HEADER}", _PROXY)
        return
    header = {SESSION_HEADER: session}
    question = {"type": "send_text_prompt", "prompt_text": "?", "max_new_tokens": 1}
    close_by_body = {**close, "session_id": session}  # leaves no session behind if the header does not arrive
    try:
        asked, _, answer = post(port, "a question in the session", question, header, timeout_s=3 * timeout_s)
        status, headers, body = post(port, "a close of the session", close, header, timeout_s=timeout_s)
    except NoAnswer:
        with contextlib.suppress(NoAnswer):
            post(port, "a close by the ID in the body", close_by_body, timeout_s=timeout_s)
        raise
    if status != http.client.OK:
        post(port, "a close by the ID in the body", close_by_body, timeout_s=timeout_s)
    if asked != http.client.OK:
        yield error("live session", f"a question in the session answers {asked}: {_reason(answer)}", _remedy(asked))
    elif status != http.client.OK or headers.get(_CLOSED) != session:
        yield error("live session", f"a close of the session answers {status}: {_reason(body)}", _PROXY)
    else:
        yield ok("live session", f"a session was opened, found by {SESSION_HEADER}, asked, and closed")
    unknown = {SESSION_HEADER: f"doctor-{secrets.token_hex(8)}"}
    status, _, body = post(port, "a close of an unknown session", close, unknown, timeout_s=timeout_s)
    if status != http.client.NOT_FOUND:
        yield error("live session", f"an unknown session must get 404, got {status}: {_reason(body)}", _PROXY)


def call(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    timeout_s: float,
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send one request to loopback, with the headers' case as given. Return status, headers and body."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=timeout_s)
    try:
        connection.request(method, path, body=body, headers=dict(headers or {}))
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


def post(
    port: int,
    name: str,
    body: dict[str, Any],
    headers: Mapping[str, str] | None = None,
    *,
    timeout_s: float,
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a request of the wire protocol. Raise `NoAnswer` with its name if it times out."""
    given = {"Content-Type": "application/json", **(headers or {})}
    try:
        return call(port, "POST", "/invocations", json.dumps(body).encode(), given, timeout_s=timeout_s)
    except TimeoutError:
        raise NoAnswer(f"{name} has no answer after {timeout_s:g} s") from None


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
