"""What one process knows of the sessions in its journal: their owners, and its own running claims. Thread-safe."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from .encoding import Owner
from .owners import FIRST_EPOCH, NO_OWNER
from .writer import KEPT_PAST_EXPIRY_S, SaveOutcome


class KnownOwners:
    """The owner of each session, as last seen by this process: itself, or after `recover` another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Owner, float]] = {}  # by key: the owner, and when the session expires

    def __len__(self) -> int:
        return len(self._known)

    def set(self, key: str, owner: Owner, expires_at_s: float) -> None:
        """Note an owner, unless a later epoch is known."""
        with self._lock:
            known = self._known.get(key)
            if known is None or known[0].epoch < owner.epoch:
                self._known[key] = (owner, expires_at_s)

    def own(self, key: str, instance: str, expires_at_s: float) -> Owner:
        """Return as what `instance` owns the session: since its open or its claim."""
        with self._lock:
            known = self._known.get(key)
            if known is None or known[0].instance != instance:
                known = self._known[key] = (Owner(FIRST_EPOCH, instance), expires_at_s)
            return known[0]

    def known(self, key: str, instance: str) -> Owner | None:
        """Return as what `instance` owns the session; None if it does not."""
        with self._lock:
            owner, _ = self._known.get(key, (NO_OWNER, 0.0))
            return owner if owner.instance == instance else None

    def pop(self, key: str, owner: Owner | None = None) -> Owner | None:
        """Remove and return the owner; only if it is `owner`, if one is given."""
        with self._lock:
            known = self._known.get(key)
            if known is None or owner not in (None, known[0]):
                return None
            del self._known[key]
            return known[0]

    def merged(self, key: str, owner: Owner, outcomes: list[SaveOutcome]) -> SaveOutcome:
        """Merge the outcomes of all stores. If `owner` owns the session no more, forget it."""
        if SaveOutcome.NOT_OWNER in outcomes:
            self.pop(key, owner)
            return SaveOutcome.NOT_OWNER
        return SaveOutcome.FAILED if SaveOutcome.FAILED in outcomes else SaveOutcome.STORED

    def drop_expired(self, now_s: float) -> None:
        """Forget the sessions that expired."""
        with self._lock:
            for key, (_, expires_at_s) in list(self._known.items()):
                if now_s >= expires_at_s + KEPT_PAST_EXPIRY_S:
                    del self._known[key]


class RunningClaims:
    """Counts the running claims of each session, so that a removal can wait for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, int] = {}
        self._waiting: dict[str, list[Callable[[], None]]] = {}

    @contextlib.contextmanager
    def running(self, key: str) -> Iterator[None]:
        """Count a claim inside the block."""
        with self._lock:
            self._running[key] = self._running.get(key, 0) + 1
        try:
            yield
        finally:
            waiting = []
            with self._lock:
                self._running[key] -= 1
                if not self._running[key]:
                    del self._running[key]
                    waiting = self._waiting.pop(key, [])
            for work in waiting:
                work()

    def when_idle(self, key: str, work: Callable[[], None]) -> None:
        """Run `work` at once, or after the last running claim of the session."""
        with self._lock:
            if key in self._running:
                self._waiting.setdefault(key, []).append(work)
                return
        work()
