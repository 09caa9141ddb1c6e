"""The routing table: the instance of each session, and the instance for a new session. The clock is injected."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field


class GoneError(Exception):
    """The instance has stopped answering."""


@dataclass(eq=False)
class Instance:
    """One container host. `gone` becomes true for good when it stops answering.

    `draining`: it finishes its requests and gets no more. `running` counts its requests. `openai_url` is the base URL
    of OpenAI's paths and `metrics_url` the page that SageMaker reads. Without them the instance has the container's
    paths, /v1 and /metrics.
    """

    number: int
    url: str
    logs: str
    openai_url: str = ""
    metrics_url: str = ""
    gone: bool = False
    draining: bool = False
    opening: int = 0
    running: int = 0
    last_used: int = 0
    last_routed: int = 0
    _waits: set[asyncio.Timeout] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.openai_url = self.openai_url or f"{self.url}/v1"
        self.metrics_url = self.metrics_url or f"{self.url}/metrics"

    @property
    def is_available(self) -> bool:
        """Whether requests are sent to the instance."""
        return not self.gone and not self.draining

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Count a running request."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def successor(self) -> Instance:
        """Return a new instance at the same addresses, as the platform replaces a lost one."""
        return Instance(self.number, self.url, self.logs, self.openai_url, self.metrics_url)

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

        Return None if no instance is available.
        """
        available = self.available()
        if not available:
            return None
        sessions = self._count(pin for pin in self._unexpired() if not pin.instance.gone)
        chosen = min(available, key=lambda instance: (sessions[instance.number] + instance.opening, instance.last_used))
        chosen.last_used = next(self._uses)
        return chosen

    def available(self) -> list[Instance]:
        """Return the instances to which requests are sent."""
        return [instance for instance in self.instances if instance.is_available]

    def replace(self, lost: Instance) -> None:
        """Replace a lost instance that answers again. Its sessions stay lost."""
        self.instances[self.instances.index(lost)] = lost.successor()

    def open_sessions(self) -> dict[int, int]:
        """Return the number of sessions of each instance, by its number, those of a lost instance included."""
        return self._count(self._unexpired())

    def _unexpired(self) -> list[Pin]:
        now = self._clock()
        self._pins = {session: pin for session, pin in self._pins.items() if pin.expires_at_s > now}
        return list(self._pins.values())

    def _count(self, pins: Iterable[Pin]) -> dict[int, int]:
        counts = dict.fromkeys((instance.number for instance in self.instances), 0)
        for pin in pins:
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
