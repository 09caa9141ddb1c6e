"""The routing table: the instance of each session, and the instance for a new session. The clock is injected."""

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
    """One container host. `gone` becomes true for good when it stops answering."""

    number: int
    url: str
    logs: str
    gone: bool = False
    opening: int = 0
    last_used: int = 0
    _waits: set[asyncio.Timeout] = field(default_factory=set)

    def lose(self) -> None:
        """Mark the instance as lost. Every block in `waiting` raises `GoneError`."""
        self.gone = True
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())

    @contextlib.asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Raise `GoneError` in the block when the instance is lost, whatever the block awaits.

        The block has a timeout that only the loss triggers. That is cheaper than a task for each wait.
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
    """The instance of a session. `expires_at_s` is in seconds since the epoch."""

    instance: Instance
    expires_at_s: float


class SessionPins:
    """The sessions of one endpoint."""

    def __init__(self, instances: list[Instance], clock: Callable[[], float] = time.time) -> None:
        self.instances = instances
        self._clock = clock
        self._pins: dict[str, Pin] = {}
        self._uses = itertools.count(1)

    @property
    def session_ids(self) -> list[str]:
        """The IDs of all pinned sessions."""
        return list(self._pins)

    def place(self) -> Instance | None:
        """Return the instance with the fewest open sessions, of equal ones the least recently used.

        Return None if all instances are gone.
        """
        living = [instance for instance in self.instances if not instance.gone]
        if not living:
            return None
        sessions = self.open_sessions()
        chosen = min(living, key=lambda instance: (sessions[instance.number] + instance.opening, instance.last_used))
        chosen.last_used = next(self._uses)
        return chosen

    def open_sessions(self) -> dict[int, int]:
        """Return the number of sessions of each instance, by its number."""
        now = self._clock()
        self._pins = {session: pin for session, pin in self._pins.items() if pin.expires_at_s > now}
        counts = dict.fromkeys((instance.number for instance in self.instances), 0)
        for pin in self._pins.values():
            counts[pin.instance.number] += 1
        return counts

    @contextlib.contextmanager
    def opening(self, instance: Instance) -> Iterator[None]:
        """Count a session while it is being opened, so that simultaneous opens are spread over the instances."""
        instance.opening += 1
        try:
            yield
        finally:
            instance.opening -= 1

    def pin(self, session_id: str, instance: Instance, expires_at_s: float) -> None:
        """Pin a session to an instance."""
        self._pins[session_id] = Pin(instance, expires_at_s)

    def move(self, session_id: str, instance: Instance) -> None:
        """Pin a session to another instance until it expires."""
        self.pin(session_id, instance, self._pins[session_id].expires_at_s)

    def find(self, session_id: str) -> Instance | None:
        """Return the instance of a session, or None if the session is unknown or expired."""
        pin = self._pins.get(session_id)
        if pin is not None and pin.expires_at_s <= self._clock():
            del self._pins[session_id]
            pin = None
        return pin.instance if pin else None

    def drop(self, session_id: str) -> None:
        """Unpin a session."""
        self._pins.pop(session_id, None)
