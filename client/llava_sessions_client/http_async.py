"""Plain HTTP with httpx, asynchronous."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import httpx

from .drive_async import AsyncReplyStream
from .effects import Limits
from .errors import TimedOut
from .http import FINISH_S, PATH, client_options, error_of, head_of, headers_of, timeout_of
from .wire import Reply, Request

T = TypeVar("T")


class AsyncHttpTransport:
    """Requests to the server at `url`. `client`: an httpx client of the caller, which the caller closes."""

    def __init__(self, url: str, client: httpx.AsyncClient | None = None) -> None:
        self._url = url.rstrip("/") + PATH
        self._own = client is None
        self._client = client or httpx.AsyncClient(**client_options(url))

    async def call(self, request: Request, limits: Limits) -> Reply:
        """Send a request and return its reply. Raise `ConnectionFailed` or `TimedOut`."""
        head, stream = await self._send(request, limits)
        return await _whole(head, stream)

    async def start(self, request: Request, limits: Limits) -> tuple[Reply, AsyncReplyStream | None]:
        """Send a request for a stream. Return its head and its body, or an error reply. Raise as `call`."""
        head, stream = await self._send(request, limits)
        if head.is_success:
            return head, stream
        return await _whole(head, stream), None

    async def close(self) -> None:
        """Close the connections."""
        if self._own:
            await self._client.aclose()

    async def _send(self, request: Request, limits: Limits) -> tuple[Reply, AsyncHttpStream]:
        sent = self._client.build_request(
            "POST", self._url, content=request.content, headers=headers_of(request), timeout=timeout_of(limits)
        )
        reply = await _in_time(_response(self._client.send(sent, stream=True)), limits.first_byte_s, limits)
        return head_of(reply.status_code, reply.headers), AsyncHttpStream(reply, limits)


class AsyncHttpStream:
    """The body of a reply."""

    def __init__(self, reply: httpx.Response, limits: Limits) -> None:
        self._reply = reply
        self._limits = limits
        self._parts: AsyncIterator[bytes] = reply.aiter_bytes()

    async def read(self) -> bytes:
        """Return the next part, b"" at the end. Raise `ClientError`."""
        part = b""
        with contextlib.suppress(StopAsyncIteration):
            while not part:
                part = await _in_time(anext(self._parts), self._limits.between_s, self._limits)
        return part

    async def finish(self) -> None:
        """Read what follows the last line. Errors are ignored."""
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(FINISH_S):
                async for _ in self._parts:
                    pass
        await self._reply.aclose()

    async def abort(self) -> None:
        """Close the connection. May be called more than once."""
        await self._reply.aclose()


async def _whole(head: Reply, stream: AsyncHttpStream) -> Reply:
    parts: list[bytes] = []
    try:
        while part := await stream.read():
            parts.append(part)
    except BaseException:
        await stream.abort()
        raise
    await stream.finish()
    return Reply(head.status, b"".join(parts), head.announced, head.retry_after_s)


async def _in_time(work: Awaitable[T], most_s: float, limits: Limits) -> T:
    """Return the result of `work`, at most `most_s` from now and before the end of all attempts."""
    try:
        async with asyncio.timeout(max(0.0, min(most_s, limits.deadline_s - time.monotonic()))):
            return await work
    except TimeoutError:
        raise TimedOut("the server must reply within the time-outs") from None
    except httpx.HTTPError as error:
        raise error_of(error) from error


async def _response(work: Awaitable[httpx.Response]) -> httpx.Response:
    """Return the result of a request. Raise `httpx.HTTPError`.

    In a program that runs uvloop, a connection that is reset while it is opened has no socket any more, which anyio
    4.16 does not expect.
    """
    try:
        return await work
    except AttributeError as error:
        raise httpx.ConnectError("the connection was reset while it was opened") from error
