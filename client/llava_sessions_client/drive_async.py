"""The asynchronous shell: perform the effects of the core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Protocol, TypeVar

from .effects import Abort, Call, Compute, Core, Effect, Finish, Left, Limits, Piece, Read, Sleep, Start
from .wire import Reply, Request

T = TypeVar("T")


class AsyncReplyStream(Protocol):
    """The body of a streamed reply. As `drive.ReplyStream`."""

    async def read(self) -> bytes:
        """Return the next part, b"" at the end. Raise `ClientError`."""

    async def finish(self) -> None:
        """Read what follows the last line. Errors are ignored."""

    async def abort(self) -> None:
        """Close the connection. May be called more than once."""


class AsyncTransport(Protocol):
    """A way to send requests. As `drive.Transport`, from one event loop."""

    async def call(self, request: Request, limits: Limits) -> Reply:
        """Send a request and return its reply. Raise `ConnectionFailed` or `TimedOut`."""

    async def start(self, request: Request, limits: Limits) -> tuple[Reply, AsyncReplyStream | None]:
        """Send a request for a stream. Return its head and its body, or an error reply. Raise as `call`."""

    async def close(self) -> None:
        """Close the connections."""


class Result:
    """The result of a core, once it has ended."""

    value: Any = None


class AsyncShell:
    """Performs the effects of one run of the core."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._stream: AsyncReplyStream | None = None

    async def pieces(self, core: Core[Any], into: Result) -> AsyncGenerator[str, None]:
        """Run the core, yield the pieces of text, and put the result into `into`."""
        result: Any = None
        failure: BaseException | None = None
        while True:
            try:
                effect = core.send(result) if failure is None else core.throw(failure)
            except StopIteration as stop:
                into.value = stop.value
                return
            result, failure = None, None
            try:
                if isinstance(effect, Piece):
                    yield effect.text
                else:
                    result = await self.perform(effect)
            except GeneratorExit:
                await self._leave(core)
                raise
            except BaseException as error:  # the core decides: it also has to clean up after a cancellation
                failure = error

    async def run(self, core: Core[T]) -> T:
        """Run the core and return the result. Raise the error of the core."""
        into = Result()
        async for _ in self.pieces(core, into):
            pass
        result: T = into.value
        return result

    async def perform(self, effect: Effect) -> Any:
        """Perform an effect and return its result."""
        if isinstance(effect, Call):
            return await self._transport.call(effect.request, effect.limits)
        if isinstance(effect, Start):
            reply, self._stream = await self._transport.start(effect.request, effect.limits)
            return reply
        if isinstance(effect, Sleep):
            return await asyncio.sleep(effect.seconds)
        if isinstance(effect, Compute):
            return await asyncio.to_thread(effect.work)
        if isinstance(effect, Read) and self._stream is not None:
            return await self._stream.read()
        stream, self._stream = self._stream, None
        if stream is not None and isinstance(effect, Finish):
            await stream.finish()
        if stream is not None and isinstance(effect, Abort):
            await stream.abort()
        return None

    async def _leave(self, core: Core[Any]) -> None:
        """Let the core cancel the turn. Its pieces are dropped."""
        failure: BaseException | None = Left()
        result: Any = None
        try:
            while True:
                effect = core.send(result) if failure is None else core.throw(failure)
                result, failure = None, None
                try:
                    result = await self.perform(effect)
                except BaseException as error:  # as in `pieces`
                    failure = error
        except (StopIteration, Left):
            return
