"""Plain HTTP with httpx: TorchServe, HAProxy."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from .addresses import is_loopback
from .drive import ReplyStream
from .effects import Limits
from .errors import ClientError, ConnectionFailed, NotConfigured, TimedOut
from .wire import CONTENT_TYPE, SESSION_HEADER, Reply, Request
from .within import within

PATH = "/invocations"
FINISH_S = 1.0


class HttpTransport:
    """Requests to the server at `url`. `client`: an httpx client of the caller, which the caller closes."""

    def __init__(self, url: str, client: httpx.Client | None = None) -> None:
        self._url = url.rstrip("/") + PATH
        self._own = client is None
        self._client = client or httpx.Client(**client_options(url))

    def call(self, request: Request, limits: Limits) -> Reply:
        """Send a request and return its reply. Raise `ConnectionFailed` or `TimedOut`."""
        head, stream = self._send(request, limits)
        try:
            body = b"".join(iter(stream.read, b""))
        except BaseException:
            stream.abort()
            raise
        stream.finish()
        return Reply(head.status, body, head.announced, head.retry_after_s)

    def start(self, request: Request, limits: Limits) -> tuple[Reply, ReplyStream | None]:
        """Send a request for a stream. Return its head and its body, or an error reply. Raise as `call`."""
        head, stream = self._send(request, limits)
        if head.is_success:
            return head, stream
        try:
            body = b"".join(iter(stream.read, b""))
        finally:
            stream.finish()
        return Reply(head.status, body, head.announced, head.retry_after_s), None

    def close(self) -> None:
        """Close the connections."""
        if self._own:
            self._client.close()

    def _send(self, request: Request, limits: Limits) -> tuple[Reply, HttpStream]:
        try:
            sent = self._client.build_request(
                "POST", self._url, content=request.content, headers=headers_of(request), timeout=timeout_of(limits)
            )
            # httpx limits single reads and writes only, and a slow connection has many.
            head_s = min(limits.first_byte_s, limits.deadline_s - time.monotonic())
            reply = within(head_s, lambda: self._client.send(sent, stream=True), httpx.Response.close)
        except httpx.InvalidURL as error:
            raise NotConfigured(f"the URL must be valid: {error}") from error
        except httpx.HTTPError as error:
            raise error_of(error) from error
        return head_of(reply.status_code, reply.headers), HttpStream(reply, limits)


class HttpStream:
    """The body of a reply. A timer breaks its connection at the deadline, since httpx limits single reads only."""

    def __init__(self, reply: httpx.Response, limits: Limits) -> None:
        self._reply = reply
        # httpx reads the time-out of this request when it starts to read the body.
        reply.request.extensions["timeout"]["read"] = limits.between_s
        self._parts: Iterator[bytes] = reply.iter_bytes()
        self._over = False
        self._timer = self._start_timer(limits.deadline_s - time.monotonic())

    def read(self) -> bytes:
        """Return the next part, b"" at the end. Raise `ClientError`."""
        try:
            return next((part for part in self._parts if part), b"")
        except httpx.HTTPError as error:
            if self._over:
                raise TimedOut("the reply must be complete within the time-out of the call") from error
            raise error_of(error) from error

    def finish(self) -> None:
        """Read what follows the last line. Errors are ignored."""
        self._timer.cancel()
        timer = self._start_timer(FINISH_S)
        try:
            for _ in self._parts:
                pass
        except httpx.HTTPError:
            pass
        finally:
            timer.cancel()
            self._reply.close()

    def abort(self) -> None:
        """Close the connection. May be called more than once."""
        self._timer.cancel()
        self._reply.close()

    def _start_timer(self, seconds: float) -> threading.Timer:
        timer = threading.Timer(max(0.0, seconds), self._break)
        timer.daemon = True
        timer.start()
        return timer

    def _break(self) -> None:
        self._over = True
        stream = self._reply.extensions.get("network_stream")
        raw: socket.socket | None = stream.get_extra_info("socket") if stream is not None else None
        if raw is not None:
            shut_down(raw)


def shut_down(raw: socket.socket | ssl.SSLSocket) -> None:
    """End the connection below TLS, so that a blocked read of another thread returns."""
    with contextlib.suppress(OSError):  # it has ended already
        socket.socket.shutdown(raw, socket.SHUT_RDWR)


def headers_of(request: Request) -> dict[str, str]:
    """Return the headers of a request."""
    session = {SESSION_HEADER: request.session_id} if request.session_id else {}
    return {"Content-Type": CONTENT_TYPE, **session}


def head_of(status: int, headers: Mapping[str, str]) -> Reply:
    """Return status and headers of a reply."""
    return Reply(status, announced=headers.get(SESSION_HEADER, ""), retry_after_s=_seconds(headers.get("Retry-After")))


def timeout_of(limits: Limits) -> httpx.Timeout:
    """Return the time-outs until the reply begins."""
    return httpx.Timeout(limits.first_byte_s, connect=limits.connect_s)


def client_options(url: str) -> dict[str, Any]:
    """Return the options of an httpx client for this server.

    Many chats of one endpoint may ask at once. No proxy reaches loopback. Without TLS no certificates are loaded, which
    takes longer than a short turn; redirects are not followed.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    return {"trust_env": not is_loopback(url), "verify": url.lower().startswith("https:"), "limits": limits}


def error_of(error: httpx.HTTPError) -> ClientError:
    """Return the client's error for one of httpx."""
    kind = type(error).__name__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return ConnectionFailed(f"the server cannot be reached: {error or kind}", connected=False)
    if isinstance(error, httpx.TimeoutException):
        return TimedOut(f"the server must reply within the time-outs, got {kind}")
    return ConnectionFailed(f"the connection broke: {error or kind}")


def _seconds(value: Any) -> float | None:
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        return None
