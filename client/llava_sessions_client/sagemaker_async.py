"""A SageMaker endpoint with boto3, asynchronous: boto3 runs in threads."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor

from .drive import ReplyStream, Transport
from .drive_async import AsyncReplyStream
from .effects import Limits
from .wire import Reply, Request

_THREADS = 64  # as many as a boto3 client has connections


class ThreadedTransport:
    """A synchronous transport in threads of its own: those of asyncio are few, and a call may take a minute."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="llava-sessions")

    async def call(self, request: Request, limits: Limits) -> Reply:
        """Send a request and return its reply. Raise `ConnectionFailed` or `TimedOut`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._transport.call, request, limits)

    async def start(self, request: Request, limits: Limits) -> tuple[Reply, AsyncReplyStream | None]:
        """Send a request for a stream. Return its head and its body, or an error reply. Raise as `call`."""
        starting = self._threads.submit(self._transport.start, request, limits)
        try:
            reply, stream = await asyncio.wrap_future(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(_abandon)
            raise
        return reply, None if stream is None else ThreadedStream(stream, self._threads)

    async def close(self) -> None:
        """Close the connections."""
        self._transport.close()
        self._threads.shutdown(wait=False)


class ThreadedStream:
    """A synchronous stream that is read in threads. Its queue of parts is bounded."""

    def __init__(self, stream: ReplyStream, threads: ThreadPoolExecutor) -> None:
        self._stream = stream
        self._threads = threads

    async def read(self) -> bytes:
        """Return the next part, b"" at the end. Raise `ClientError`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._stream.read)

    async def finish(self) -> None:
        """Read what follows the last line. Errors are ignored."""
        self._stream.finish()

    async def abort(self) -> None:
        """Close the connection. May be called more than once."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._stream.abort)


def _abandon(starting: Future[tuple[Reply, ReplyStream | None]]) -> None:
    """Close the stream of a start whose task was cancelled."""
    if not starting.cancelled() and starting.exception() is None:
        _, stream = starting.result()
        if stream is not None:
            stream.abort()
