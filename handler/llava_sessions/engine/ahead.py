"""Work on KV memory before a request needs it: growing nearly full caches, and touching the memory of the next one."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from .faults import first_line, raise_if_device_lost
from .kv import KVShape, SessionKV
from .memory import TURN_TOKENS, DeviceMemory
from .session import EngineSession

log = logging.getLogger(__name__)


class WorkAhead:
    """Grows and touches KV memory on a CPU, so that no first token waits for it. Runs in the engine's thread.

    On a GPU this takes almost no time, so nothing is done ahead.
    """

    def __init__(
        self,
        device_memory: DeviceMemory,
        *,
        sessions: Mapping[str, EngineSession],
        kv_shape: KVShape,
        context_tokens: int,
    ) -> None:
        """`sessions` and `device_memory` are the engine's own. `context_tokens`: most tokens of a conversation."""
        self._memory = device_memory
        self._sessions = sessions
        self._kv_shape = kv_shape
        self._context_tokens = context_tokens

    @property
    def is_due(self) -> bool:
        """Whether `run` with `is_idle` has work."""
        pool = self._memory.pool
        return pool is not None and (self._next_to_grow() is not None or pool.may_touch_ahead)

    def run(self, is_idle: bool) -> None:
        """Do one piece of work. Must not be called while a first token waits.

        One cache grows by one step, at the price of a copy. Only if no session has work (`is_idle`) and no cache has to
        grow, a part of a free block is touched. If memory runs out for a session it is not tried again before its next
        turn.
        """
        pool = self._memory.pool
        if pool is None:
            return
        session = self._next_to_grow()
        try:
            if session is not None:
                self._memory.bound_pool()
                session.kv.reserve(session.kv.capacity + 1)
            elif is_idle and pool.may_touch_ahead:
                pool.touch_ahead()
        except Exception as error:
            raise_if_device_lost(error, self._kv_shape.device)
            log.warning("growing_failed error=%s", first_line(error))
            if session is None:
                pool.usual_sizes = ()
            else:
                session.short_of_memory = True

    def _next_to_grow(self) -> EngineSession | None:
        """Return the least recently used session whose cache is too full for its next turn, or None.

        A copy holds up running answers, but no more than it would in the step of the next turn's first token.

        No cache is offloaded for it, so None is returned if the budget is full. Both the old and the grown cache exist
        during the copy.
        """
        nearly_full = (s for s in self._sessions.values() if not s.short_of_memory and self._is_nearly_full(s.kv))
        session = min(nearly_full, key=lambda s: s.ticket, default=None)
        if session is None:
            return None
        grown_bytes = self._kv_shape.device_bytes(session.kv.capacity + 1)
        fits = self._memory.fits_with_copy(session, grown_bytes)
        return session if fits else None

    def _is_nearly_full(self, kv: SessionKV) -> bool:
        """Return whether a resident cache has too little room for the next turn."""
        return kv.tier == "resident" and kv.capacity < min(kv.length + TURN_TOKENS, self._context_tokens)
