"""The synchronous shell: perform the effects of the core."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any, Protocol, TypeVar

from .effects import Abort, Call, Compute, Core, Effect, Finish, Left, Limits, Piece, Read, Sleep, Start
from .wire import Reply, Request

T = TypeVar("T")


class ReplyStream(Protocol):
    """The body of a streamed reply."""

    def read(self) -> bytes:
        """Return the next part, b"" at the end. Raise `ClientError`."""

    def finish(self) -> None:
        """Read what follows the last line. Errors are ignored."""

    def abort(self) -> None:
        """Close the connection. May be called more than once."""


class Transport(Protocol):
    """A way to send requests. Its methods may be called by several threads."""

    def call(self, request: Request, limits: Limits) -> Reply:
        """Send a request and return its reply. Raise `ConnectionFailed` or `TimedOut`."""

    def start(self, request: Request, limits: Limits) -> tuple[Reply, ReplyStream | None]:
        """Send a request for a stream. Return its head and its body, or an error reply. Raise as `call`."""

    def close(self) -> None:
        """Close the connections."""


class Shell:
    """Performs the effects of one run of the core."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stream: ReplyStream | None = None

    def pieces(self, core: Core[T]) -> Generator[str, None, T]:
        """Run the core, yield the pieces of text, and return the result."""
        result: Any = None
        failure: BaseException | None = None
        while True:
            try:
                effect = core.send(result) if failure is None else core.throw(failure)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]  # a generator's return value has no type
            result, failure = None, None
            if isinstance(effect, Piece):
                try:
                    yield effect.text
                except GeneratorExit:
                    self._leave(core)
                    raise
            else:
                try:
                    result = self.perform(effect)
                except BaseException as error:  # the core decides: it also has to clean up after Ctrl-C
                    failure = error

    def run(self, core: Core[T]) -> T:
        """Run the core and return the result. Raise the error of the core."""
        pieces = self.pieces(core)
        while True:
            try:
                next(pieces)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]  # a generator's return value has no type

    def perform(self, effect: Effect) -> Any:
        """Perform an effect and return its result."""
        if isinstance(effect, Call):
            return self._transport.call(effect.request, effect.limits)
        if isinstance(effect, Start):
            reply, self._stream = self._transport.start(effect.request, effect.limits)
            return reply
        if isinstance(effect, Sleep):
            return time.sleep(effect.seconds)
        if isinstance(effect, Compute):
            return effect.work()
        if isinstance(effect, Read) and self._stream is not None:
            return self._stream.read()
        stream, self._stream = self._stream, None
        if stream is not None and isinstance(effect, Finish):
            stream.finish()
        if stream is not None and isinstance(effect, Abort):
            stream.abort()
        return None

    def _leave(self, core: Core[T]) -> None:
        """Let the core cancel the turn. Its pieces are dropped."""
        failure: BaseException | None = Left()
        result: Any = None
        try:
            while True:
                effect = core.send(result) if failure is None else core.throw(failure)
                result, failure = None, None
                try:
                    result = self.perform(effect)
                except BaseException as error:  # as in `pieces`
                    failure = error
        except (StopIteration, Left):
            return
