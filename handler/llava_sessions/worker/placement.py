"""The engine on which a session is placed. Picture features and prefixes are shared within one engine only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .engine_set import EngineSet
from .sessions import SessionTable

# Free memory counts as equal within this part of the largest budget. Then the number of sessions decides.
_PART = 16
# A picture that an engine holds already counts as so many sessions fewer.
_PICTURE_SESSIONS = 2


@dataclass
class _Load:
    """Sessions of an engine. `loading_bytes`: KV that its report may lack. `has_picture`: it holds a picture."""

    sessions: int = 0
    loading_bytes: int = 0
    has_picture: bool = False


class Placement:
    """Chooses engines. Not thread-safe: all methods run on the pump's thread, under its lock."""

    def __init__(self, engines: EngineSet, table: SessionTable) -> None:
        """`table`: its sessions know their engines."""
        self._engines = engines
        self._table = table

    @property
    def are_several(self) -> bool:
        """Whether a session may be placed on another engine."""
        return len(self._engines.all) > 1

    def place(self, picture_keys: Iterable[str] = (), avoid: int | None = None) -> int:
        """Return the engine with the most free memory. Raise `Refused` (engine_restarting) if no engine works.

        Among engines whose free memory differs from the most by at most a 16th of the budget, the one with the fewest
        sessions is chosen; an engine that holds one of the pictures counts as if it had two sessions fewer. `avoid`: an
        engine that has rejected the session; it is chosen only if no other works.
        """
        self._engines.check_working()
        engines = self._engines.all
        working = [number for number, engine in enumerate(engines) if engine.client is not None]
        candidates = [number for number in working if number != avoid] or working
        loads = self._loads(frozenset(picture_keys))
        free = {number: engines[number].free_bytes - loads[number].loading_bytes for number in candidates}
        margin_bytes = max(engines[number].budget_bytes for number in candidates) // _PART
        most_bytes = max(free.values())
        equal = [number for number in candidates if free[number] >= most_bytes - margin_bytes]

        def sessions(number: int) -> int:
            return loads[number].sessions - _PICTURE_SESSIONS * loads[number].has_picture

        return min(equal, key=sessions)  # the first of equals

    def has_other(self, avoid: int | None) -> bool:
        """Return whether an engine other than `avoid` works."""
        return any(engine.client is not None for number, engine in enumerate(self._engines.all) if number != avoid)

    def has_room(self, needed_bytes: int, avoid: int) -> bool:
        """Return whether an engine other than `avoid` has so much free memory."""
        loads = self._loads(frozenset())
        return any(
            engine.client is not None and engine.free_bytes - loads[number].loading_bytes >= needed_bytes
            for number, engine in enumerate(self._engines.all)
            if number != avoid
        )

    def _loads(self, picture_keys: frozenset[str]) -> list[_Load]:
        loads = [_Load() for _ in self._engines.all]
        for session in self._table:
            if session.engine is None:
                continue
            load = loads[session.engine]
            load.sessions += 1
            if not session.is_loaded:
                load.loading_bytes += self._engines.all[session.engine].kv_bytes(session.loading_tokens)
            elif not picture_keys.isdisjoint(session.picture_keys):
                load.has_picture = True
        return loads
