"""Admission: new sessions and turns are checked, and wait in order of arrival until device memory is free."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from ..ipc.messages import Admitted, AskSession, Event, OpenSession, OutOfCapacity, TurnAdmitted, TurnFailed
from ..text.answer_text import AnswerText
from .kv import SessionKV, rounded_up
from .memory import DeviceMemory, MemoryExceeded
from .model import Model
from .sampling import Sampler
from .session import EngineSession, EngineSessionState, EngineTurn, FeatureStore, SessionPicture, unencoded_keys

# More turns do not wait for memory: the next one is rejected. `max_sessions` bounds the openings.
MAX_WAITING_TURNS = 256


@dataclass(frozen=True)
class Waiting:
    """A request for which no room on the device is reserved: an opening, or a `turn` of an admitted session.

    `ticket`: its order of arrival.
    """

    ticket: int
    session: EngineSession
    turn: EngineTurn | None = None


class Admission:
    """Admits openings and turns. A request that could never fit is rejected at once, before any work.

    All others wait in one order of arrival. The first one that does not fit now holds up those behind it, so that no
    request waits for ever. Runs in the engine's thread.
    """

    def __init__(
        self,
        model: Model,
        answer_text: Callable[[tuple[str, ...]], AnswerText],
        *,
        sessions: dict[str, EngineSession],
        features: FeatureStore,
        device_memory: DeviceMemory,
    ) -> None:
        """`sessions`, `features` and `device_memory` are the engine's own. `answer_text` as in `Engine`."""
        self._model = model
        self._answer_text = answer_text
        self._sessions = sessions
        self._features = features
        self._memory = device_memory
        self._tickets = itertools.count(1)

    def open(self, command: OpenSession, arrived_at: float) -> Event:
        """Admit a new session, or reject it. Raises ValueError if the session is open already."""
        if command.session_id in self._sessions:
            raise ValueError("the session is open already")
        positions = self._model.media_positions(command.token_ids)
        session = EngineSession(
            id=command.session_id,
            token_ids=list(command.token_ids),
            image_positions=_outside(positions, command.answer_spans),
            kv=SessionKV(self._model.kv_shape),
            pictures=[SessionPicture(picture.key, picture) for picture in command.pictures],
            ticket=next(self._tickets),
            opened_at=arrived_at,
            opening_tokens=len(command.token_ids),
            opening_bytes=self._model.kv_shape.device_bytes(len(command.token_ids)),
            prefix=(tuple(command.token_ids), tuple(picture.key for picture in command.pictures)),
        )
        session.attach_features(self._features)
        try:
            self._memory.admit(session.opening_bytes, self._new_image_tokens(session))
        except MemoryExceeded as error:
            return self._rejection(session, None, error)
        self._sessions[session.id] = session
        return Admitted(session.id)

    def ask(self, command: AskSession, arrived_at: float) -> list[Event]:
        """Admit a turn, or reject it. Any failure leaves the session unchanged."""
        session = self._sessions.get(command.session_id)
        if session is None:
            return [TurnFailed(command.turn_id, "the session is not open in the engine")]
        problem = _ask_problem(session, command, self._model)
        if problem is not None:
            return [TurnFailed(command.turn_id, problem)]
        turn = self._new_turn(session, command, arrived_at)
        waiting_turns = sum(other.waiting_turn is not None for other in self._sessions.values())
        if waiting_turns >= MAX_WAITING_TURNS:
            return [OutOfCapacity(session.id, turn.id, 0, 0, len(self._sessions), waiting_turns)]
        try:
            self._memory.admit(turn.reserved_tokens * self._model.kv_shape.token_bytes, turn.new_image_tokens)
        except MemoryExceeded as error:
            return [self._rejection(session, turn, error)]
        session.turn = turn
        return [TurnAdmitted(turn.id)]

    def waiting(self) -> list[Waiting]:
        """Return the requests that wait for memory, in order of arrival."""
        found: list[Waiting] = []
        for session in self._sessions.values():
            if session.state is EngineSessionState.WAITING:
                found.append(Waiting(session.ticket, session))
            turn = session.waiting_turn
            if turn is not None:
                found.append(Waiting(turn.ticket, session, turn))
        return sorted(found, key=lambda waiting: waiting.ticket)

    def place(self, waiting: Waiting) -> bool:
        """Reserve memory for a request, so that it runs. Return False if it has to wait.

        Raises `MemoryExceeded` if waiting would not help: no session is active, or the device itself has no memory.
        """
        session = waiting.session
        turn = waiting.turn
        if turn is not None and session.turn is not turn:
            return True  # it ended with its session's opening
        session.attach_features(self._features)
        try:
            if turn is None:
                self._memory.place(session, session.opening_bytes)
                self._memory.restore(session, session.opening_tokens)
                session.advance(EngineSessionState.PREFILLING)
                return True
            reserved_bytes = turn.reserved_tokens * self._model.kv_shape.token_bytes
            self._memory.place(session, reserved_bytes, turn.new_image_tokens)
        except MemoryExceeded:
            if any(other.active for other in self._sessions.values() if other is not session):
                return False
            raise
        session.kv.most_tokens = turn.reserved_tokens
        self._memory.restore(session, turn.most_tokens)
        session.admit_turn()
        return True

    def reject(self, waiting: Waiting, error: MemoryExceeded) -> list[Event]:
        """Remove a waiting request that memory cannot hold, and an opening's turn with it; return the events."""
        session = waiting.session
        turn = session.turn
        events: list[Event] = []
        if turn is not None:
            session.roll_back_turn()
            events.append(self._rejection(session, turn, error))
        if waiting.turn is None:
            del self._sessions[session.id]
            events.append(self._rejection(session, None, error))
        return events

    def _new_image_tokens(self, session: EngineSession) -> int:
        """Return the image tokens of a new session's pictures; 0 if another session waits for the same features."""
        keys = unencoded_keys(session)
        is_shared = any(unencoded_keys(other) == keys for other in self._sessions.values())
        return 0 if is_shared else session.unencoded_tokens

    def _new_turn(self, session: EngineSession, command: AskSession, arrived_at: float) -> EngineTurn:
        start = len(session.token_ids)
        prompt_tokens = start + len(command.token_ids)
        most_tokens = min(prompt_tokens + command.sampling.max_new_tokens, self._model.context_tokens)
        deadline_ms = command.sampling.deadline_ms
        turn = EngineTurn(
            id=command.turn_id,
            ticket=next(self._tickets),
            token_ids=command.token_ids,
            image_positions=self._model.media_positions(command.token_ids, start),
            pictures=[SessionPicture(picture.key, picture) for picture in command.pictures],
            start_tokens=start,
            start_pictures=len(session.pictures),
            cached_tokens=session.kv.length,
            most_tokens=most_tokens,
            # On a GPU a cache has whole growth steps, because offloading copies whole steps.
            reserved_tokens=most_tokens if self._memory.grows_in_steps else rounded_up(most_tokens),
            sampler=Sampler(command.sampling),
            answer_text=self._answer_text(command.sampling.stop),
            asked_at=arrived_at,
            deadline_at=None if deadline_ms is None else arrived_at + deadline_ms / 1e3,
            ignore_eos=command.sampling.ignore_eos,
        )
        for picture in turn.pictures:
            picture.attach(self._features)
        return turn

    def _rejection(self, session: EngineSession, turn: EngineTurn | None, error: MemoryExceeded) -> OutOfCapacity:
        turn_id = None if turn is None else turn.id
        return OutOfCapacity(session.id, turn_id, error.needed_bytes, error.free_bytes, len(self._sessions))


def _ask_problem(session: EngineSession, command: AskSession, model: Model) -> str | None:
    """Return why a turn can't start, or None if it can."""
    if session.turn is not None:
        return "the session is still answering"
    if model.media_positions(command.token_ids) and not command.pictures:
        return "a prompt without a picture must not hold image tokens"
    if len(session.token_ids) + len(command.token_ids) >= model.context_tokens:
        return f"the conversation is longer than the model's {model.context_tokens} tokens"
    return None


def _outside(positions: list[int], spans: tuple[tuple[int, int], ...]) -> list[int]:
    """Return the positions that are in none of the `(start, end)` spans."""
    return [at for at in positions if not any(start <= at < end for start, end in spans)]
