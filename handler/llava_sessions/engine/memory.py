"""The byte budget of all sessions: admission, offloading, restoring and growing of KV caches.

A session's features stay on the device while it is open. Its KV cache may be offloaded to the host or dropped between
two turns; the least recently used cache goes first. The cache of an active session never moves.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..ipc.messages import Memory
from .budget import DeviceBudget
from .content import FeatureStore, unencoded_keys
from .device import reserved_bytes
from .faults import first_line, is_out_of_memory, raise_if_device_lost, release_unused
from .kv import KVShape
from .kv_pool import KVPool
from .session import EngineSession, EngineSessionState

log = logging.getLogger(__name__)

# Room that a cache on a CPU has for its next turn, in tokens: a question and the beginning of its answer.
TURN_TOKENS = 128


class MemoryExceeded(Exception):
    """The budget can't hold a request: it needs `needed_bytes` on the device, of which `free_bytes` are available."""

    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{needed_bytes} bytes are needed, {free_bytes} are free")
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


@dataclass
class Moves:
    """Counts of KV caches that were moved to the host, moved back, and dropped."""

    offloads: int = 0
    restores: int = 0
    drops: int = 0


class DeviceMemory:
    """Places the KV caches of the engine's sessions within the budget. Runs in the engine's thread."""

    def __init__(
        self,
        budget: DeviceBudget,
        *,
        sessions: Mapping[str, EngineSession],
        features: FeatureStore,
        kv_shape: KVShape,
        feature_bytes: int,
        context_tokens: int,
    ) -> None:
        """`sessions` is the engine's own mapping, read at each call.

        `feature_bytes`: bytes of one image token. `context_tokens`: most tokens of a conversation.
        """
        self.budget = budget
        self._sessions = sessions
        self._features = features
        self._kv_shape = kv_shape
        self._feature_bytes = feature_bytes
        self._context_tokens = context_tokens
        self._moves = Moves()
        # On a CPU caches grow in steps while their answers run, in memory of this pool. On a GPU torch has a pool,
        # and an admitted turn gets its whole reservation before its first token.
        # Tests set it to None to run the GPU's way on a CPU.
        self.pool = KVPool() if kv_shape.device.type == "cpu" else None

    def usage(self, allocated_bytes: int) -> Memory:
        """Return what the open sessions hold. `allocated_bytes`: of torch's tensors on the device."""
        caches = [session.kv for session in self._sessions.values()]
        tiers = Counter(kv.tier for kv in caches)
        turns = [session.turn.is_waiting for session in self._sessions.values() if session.turn is not None]
        return Memory(
            resident=tiers["resident"],
            offloaded=tiers["offloaded"],
            cold=tiers["cold"],
            features_bytes=self._features.device_bytes,
            kv_bytes=sum(kv.device_bytes for kv in caches),
            offloaded_bytes=sum(kv.host_bytes for kv in caches),
            pool_bytes=0 if self.pool is None else self.pool.free_bytes,
            allocated_bytes=allocated_bytes,
            reserved_bytes=reserved_bytes(self._kv_shape.device),
            waiting_turns=sum(turns),
            running_turns=len(turns) - sum(turns),
            device_budget_bytes=self.budget.device_bytes,
            offloads=self._moves.offloads,
            restores=self._moves.restores,
            drops=self._moves.drops,
            pictures_encoded=self._features.encoded,
            picture_hits=self._features.hits,
        )

    def admit(self, kv_bytes: int, new_image_tokens: int, released_bytes: int = 0) -> None:
        """Raise `MemoryExceeded` if a request could not run even if no other session was active.

        `kv_bytes`: upper bound of the session's KV on the device. `new_image_tokens`: tokens of the request's pictures
        that are not encoded. `released_bytes`: features that a crop frees before the request runs. A request that is
        admitted waits until `place` has reserved its memory.

        Features are never offloaded, so the features of all sessions and of all waiting turns must leave room for the
        KV of the largest waiting request.
        """
        new_bytes = new_image_tokens * self._feature_bytes
        waiting_turns = [s.waiting_turn for s in self._sessions.values() if s.waiting_turn is not None]
        features_bytes = self._features_bytes() - released_bytes
        features_bytes += sum(turn.new_image_tokens * self._feature_bytes for turn in waiting_turns)
        most_bytes = kv_bytes
        if new_bytes:
            openings = (s for s in self._sessions.values() if s.state is EngineSessionState.WAITING)
            turns = (self._kv_shape.device_bytes(turn.most_tokens) for turn in waiting_turns)
            most_bytes = max([kv_bytes, *(s.opening_bytes for s in openings), *turns])
        if features_bytes + new_bytes + most_bytes > self.budget.device_bytes:
            raise MemoryExceeded(new_bytes + most_bytes, max(self.budget.device_bytes - features_bytes, 0))

    def place(self, session: EngineSession, kv_bytes: int, new_image_tokens: int = 0, released_bytes: int = 0) -> None:
        """Reserve room for the work of a session: its KV, and the features of `new_image_tokens`.

        `released_bytes`: as in `admit`. Raises `MemoryExceeded`, with no other cache offloaded, if the active sessions
        leave too little now.
        """
        features_bytes = new_image_tokens * self._feature_bytes - released_bytes
        placed_bytes = max(kv_bytes, session.kv.device_bytes)  # more if it was grown ahead, or before a crop
        try:
            self._make_room(session, placed_bytes + features_bytes)
        except MemoryExceeded:
            if placed_bytes == kv_bytes or any(other.active for other in self._sessions.values()):
                raise
            self._offload(session)  # nothing else would free memory: it comes back without the unused capacity
            placed_bytes = kv_bytes
            self._make_room(session, placed_bytes + features_bytes)
        session.reserved_bytes = placed_bytes

    def restore(self, session: EngineSession, prompt_tokens: int, most_tokens: int | None = None) -> None:
        """Make an admitted session's cache resident, with room for the `prompt_tokens` of the request.

        `most_tokens`: the longest conversation that it may make; None for an opening. If the device is out of memory,
        offload idle caches and retry. Raises `MemoryExceeded` if memory runs out again; the stored tokens are then
        unchanged, or dropped.
        """
        tokens = self._tokens_to_allocate(session, prompt_tokens, most_tokens)
        try:
            self._allocate(session, tokens)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.relieve()
            try:
                self._allocate(session, tokens)
            except Exception as again:
                if not is_out_of_memory(again):
                    raise
                log.warning("restore_failed session=%s error=%s", session.id[:12], first_line(again))
                raise MemoryExceeded(self._kv_shape.device_bytes(tokens), 0) from again

    def _tokens_to_allocate(self, session: EngineSession, prompt_tokens: int, most_tokens: int | None) -> int:
        """Return the tokens of `restore` for which memory is allocated at once.

        On a CPU the prompt has room for a turn behind it, so that the copy of a growing cache delays no first token.
        The room that an opening has not reserved is taken only where the budget has it.
        """
        if self.pool is None:
            return prompt_tokens if most_tokens is None else most_tokens
        if prompt_tokens <= session.kv.capacity:
            return prompt_tokens  # the cache grows once its first token is sampled, see `WorkAhead`
        tokens = min(prompt_tokens + TURN_TOKENS, most_tokens or self._context_tokens)
        if most_tokens is not None:
            return tokens
        roomy_bytes = self._kv_shape.device_bytes(tokens)
        if self.fits_with_copy(session, roomy_bytes):
            session.reserved_bytes = max(session.reserved_bytes, roomy_bytes)
            self.pool.usual_sizes = (roomy_bytes, roomy_bytes + self._kv_shape.device_bytes(1))
            return tokens
        return prompt_tokens

    def _allocate(self, session: EngineSession, tokens: int) -> None:
        """Make the cache resident with room for `tokens` tokens.

        Admission counts the grown cache only. If a GPU's budget has no room for the old one and the grown one together,
        the tokens move over the host. On a CPU that would save no memory.
        """
        kv = session.kv
        was_offloaded = kv.tier == "offloaded"
        self.bound_pool()
        grown_bytes = self._kv_shape.device_bytes(tokens)
        grows = kv.tier == "resident" and kv.device_bytes < grown_bytes
        if self.pool is None and grows and not self.fits_with_copy(session, grown_bytes):
            self._offload(session)
        kv.restore(tokens)
        self._moves.restores += was_offloaded
        kv.reserve(tokens)

    def bound_pool(self) -> None:
        """Give free blocks of the pool back to the system if they exceed the budget."""
        if self.pool is not None:
            self.pool.limit_bytes = self.budget.device_bytes - self._features_bytes()
            self.pool.trim()

    def fits_with_copy(self, session: EngineSession, kv_bytes: int) -> bool:
        """Return whether the cache of a session may be copied to one of `kv_bytes`, with no other cache moved."""
        others = (s for s in self._sessions.values() if s is not session)
        reserved_bytes = sum(
            max(s.reserved_bytes, s.kv.device_bytes) if s.active else s.kv.device_bytes for s in others
        )
        free_bytes = self.budget.device_bytes - self._features_bytes()
        return reserved_bytes + session.kv.device_bytes + kv_bytes <= free_bytes

    def relieve(self) -> None:
        """Free device memory after an out-of-memory error: offload all idle caches, or drop those that don't fit."""
        for session in _idle(self._sessions.values()):
            self._offload(session)
        if self.pool is not None:
            self.pool.clear()
            self.pool.usual_sizes = ()  # nothing is touched ahead until the next opening
        release_unused(self._kv_shape.device)

    def _features_bytes(self) -> int:
        """Bytes of all features on the device, and of those still to be encoded. Equal pictures are encoded once."""
        tokens = {unencoded_keys(s): s.unencoded_tokens for s in self._sessions.values() if not s.encoded}
        unencoded = sum(count for keys, count in tokens.items() if any(key not in self._features for key in keys))
        return self._features.device_bytes + unencoded * self._feature_bytes

    def _make_room(self, session: EngineSession, needed_bytes: int) -> None:
        """Offload idle caches, least recently used first, until `needed_bytes` are free on the device.

        The cache of `session`, for which the room is needed, is neither moved nor counted. Raises `MemoryExceeded`,
        with nothing offloaded, if the active sessions leave too little.
        """
        others = [other for other in self._sessions.values() if other is not session]
        active_bytes = sum(max(s.reserved_bytes, s.kv.device_bytes) for s in others if s.active)
        free_bytes = self.budget.device_bytes - self._features_bytes() - active_bytes
        if needed_bytes > free_bytes:
            raise MemoryExceeded(needed_bytes, max(free_bytes, 0))
        idle = _idle(others)
        idle_bytes = sum(s.kv.device_bytes for s in idle)
        for other in idle:
            if idle_bytes + needed_bytes <= free_bytes:
                return
            idle_bytes -= other.kv.device_bytes
            self._offload(other, kept=session)

    def _offload(self, session: EngineSession, kept: EngineSession | None = None) -> None:
        """Move a cache to the host. If the host's part is full, drop less recently used caches there, or this one.

        The cache of `kept` is neither dropped nor counted. A cache that can't be copied because memory ran out is
        dropped. Raises an error only if the device is lost.
        """
        if not self._fits_host(session, kept):
            self._drop(session)
            return
        try:
            session.kv.offload()
            self._moves.offloads += 1
        except Exception as error:
            raise_if_device_lost(error, self._kv_shape.device)
            log.warning("offload_failed session=%s error=%s", session.id[:12], first_line(error))
            self._drop(session)

    def _drop(self, session: EngineSession) -> None:
        """Free a cache. It counts as dropped if it had tokens."""
        self._moves.drops += session.kv.length > 0
        session.kv.drop()

    def _fits_host(self, session: EngineSession, kept: EngineSession | None) -> bool:
        """Drop less recently used caches on the host until the one of `session` fits. Return whether it does."""
        if not session.kv.length:
            return False
        needed_bytes = self._kv_shape.host_bytes(session.kv.length)
        on_host = sorted(
            (s for s in self._sessions.values() if s.kv.host_bytes and s is not kept), key=lambda s: s.ticket
        )
        free_bytes = self.budget.host_bytes - sum(s.kv.host_bytes for s in on_host)
        for other in on_host:
            if needed_bytes <= free_bytes or other.ticket > session.ticket:
                break
            free_bytes += other.kv.host_bytes
            self._drop(other)
        return needed_bytes <= free_bytes


def _idle(sessions: Iterable[EngineSession]) -> list[EngineSession]:
    """Return the idle sessions with KV on the device, least recently used first.

    Those with a waiting turn come last, and of those the next one to run comes last.
    """
    return sorted((s for s in sessions if not s.active and s.kv.device_bytes), key=_use)


def _use(session: EngineSession) -> tuple[bool, int]:
    """Return the sort key of idle sessions: a smaller key is offloaded earlier."""
    turn = session.waiting_turn
    return (False, session.ticket) if turn is None else (True, -turn.ticket)
