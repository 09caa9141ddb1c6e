"""Owns the routing table: which instance a session is pinned to, until when, and which instance a new one goes to.

Must not know HTTP, nor how an instance is reached. Pure: time comes in by the clock that it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field


class GoneError(Exception):
    """The instance has stopped answering."""


@dataclass(eq=False)
class Instance:
    """One container host. `gone` is true, for good, once it has stopped answering."""

    number: int
    url: str
    logs: str
    gone: bool = False
    opening: int = 0
    last_used: int = 0
    _waits: set[asyncio.Timeout] = field(default_factory=set)

    def lose(self) -> None:
        """It has stopped answering: whoever waits for it hears `GoneError`."""
        self.gone = True
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())

    @contextlib.asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Raises `GoneError` in the block once the instance is lost, whatever is awaited there.

        A time-out without an end, which its loss brings about: cheaper than a task of its own for each wait.
        """
        wait = asyncio.timeout(0 if self.gone else None)
        try:
            async with wait:
                self._waits.add(wait)
                yield
        except TimeoutError:
            if wait.expired():
                raise GoneError from None
            raise
        finally:
            self._waits.discard(wait)


@dataclass(frozen=True)
class Pin:
    """A session's instance; `expires_at_s` is in seconds since the epoch."""

    instance: Instance
    expires_at_s: float


class Pins:
    """The sessions of one endpoint."""

    def __init__(self, instances: list[Instance], clock: Callable[[], float] = time.time) -> None:
        self.instances = instances
        self._clock = clock
        self._pins: dict[str, Pin] = {}
        self._uses = itertools.count(1)

    def place(self) -> Instance | None:
        """The living instance with the fewest open sessions, of equal ones the least recently used; None: all gone."""
        living = [instance for instance in self.instances if not instance.gone]
        if not living:
            return None
        sessions = self.open_sessions()
        chosen = min(living, key=lambda instance: (sessions[instance.number] + instance.opening, instance.last_used))
        chosen.last_used = next(self._uses)
        return chosen

    def open_sessions(self) -> dict[int, int]:
        """How many sessions are pinned to each instance, by its number."""
        now = self._clock()
        self._pins = {session: pin for session, pin in self._pins.items() if pin.expires_at_s > now}
        counts = dict.fromkeys((instance.number for instance in self.instances), 0)
        for pin in self._pins.values():
            counts[pin.instance.number] += 1
        return counts

    @contextlib.contextmanager
    def opening(self, instance: Instance) -> Iterator[None]:
        """While a session is being opened it counts already, so that opens at the same time spread."""
        instance.opening += 1
        try:
            yield
        finally:
            instance.opening -= 1

    def pin(self, session_id: str, instance: Instance, expires_at_s: float) -> None:
        """Tie a session to an instance."""
        self._pins[session_id] = Pin(instance, expires_at_s)

    def move(self, session_id: str, instance: Instance) -> None:
        """Tie a session to another instance, for the rest of its time."""
        self.pin(session_id, instance, self._pins[session_id].expires_at_s)

    def find(self, session_id: str) -> Instance | None:
        """The session's instance; None when it is not known, or its time is up."""
        pin = self._pins.get(session_id)
        if pin is not None and pin.expires_at_s <= self._clock():
            del self._pins[session_id]
            pin = None
        return pin.instance if pin else None

    def drop(self, session_id: str) -> None:
        """Forget a session."""
        self._pins.pop(session_id, None)
