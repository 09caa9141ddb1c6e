"""What the core asks its shell to do. The core is a generator that yields effects and receives their results.

A shell performs each effect, sends its result into the generator, or throws the error into it. So the synchronous and
the asynchronous client share every decision, and tests can drive the core without a network.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from .wire import Request

T = TypeVar("T")


class Left(BaseException):
    """Thrown into the core: the caller no longer reads the stream."""


@dataclass(frozen=True)
class Limits:
    """Of one attempt, in seconds. `deadline_s` is on the clock of `time.monotonic`: the end of all attempts."""

    connect_s: float
    first_byte_s: float
    between_s: float
    deadline_s: float


@dataclass(frozen=True)
class Call:
    """Send a request and return its whole `Reply`. Raise `ConnectionFailed` or `TimedOut`."""

    request: Request
    limits: Limits


@dataclass(frozen=True)
class Start:
    """Send a request for a stream. Return its `Reply`: without a body for a success. Raise as `Call`."""

    request: Request
    limits: Limits


@dataclass(frozen=True)
class Read:
    """Return the next part of the stream, b"" at its end. Raise as `Call`, or an `ApiError` of the platform."""


@dataclass(frozen=True)
class Abort:
    """Close the connection of the stream, if there is one."""


@dataclass(frozen=True)
class Finish:
    """Read the rest of a stream that has sent its last line, so that its connection can be used again."""


@dataclass(frozen=True)
class Sleep:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class Compute:
    """Return the result of a function that takes long."""

    work: Callable[[], Any]


@dataclass(frozen=True)
class Piece:
    """Hand a piece of the answer to the caller."""

    text: str


Effect = Call | Start | Read | Abort | Finish | Sleep | Compute | Piece
Core = Generator[Effect, Any, T]
