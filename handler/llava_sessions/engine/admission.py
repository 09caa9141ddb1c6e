"""Admission: new sessions and turns are checked, and wait in order of arrival until device memory is free."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from ..ipc.messages import (
    Admitted,
    AskSession,
    Event,
    OpenFailed,
    OpenSession,
    OutOfCapacity,
    PreparedPicture,
    TurnAdmitted,
    TurnFailed,
)
from ..text.answer_text import AnswerText
from .content import (
    FeatureStore,
    SessionContent,
    SessionPicture,
    check_feature_count,
    opening_key,
    released_bytes,
    unencoded_keys,
)
from .kv import SessionKV
from .memory import DeviceMemory, MemoryExceeded
from .model import Model
from .prefixes import fork
from .sampling import Sampler
from .session import EngineSession, EngineSessionState, EngineTurn

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


class _Wait(Exception):
    """A request has to wait for memory."""


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

    def open(self, command: OpenSession, arrived_at: float) -> list[Event]:
        """Admit a new session, or reject it. Raises ValueError if the session can't be opened."""
        if command.session_id in self._sessions:
            raise ValueError("the session is open already")
        problem = self._lacking(command.pictures)
        if problem is not None:
            return [OpenFailed(command.session_id, problem, lacks_pictures=True)]
        session = self._new_session(command, arrived_at)
        session.attach_features(self._features)
        check_feature_count(session.pictures, len(session.image_positions))
        try:
            self._memory.admit(session.opening_bytes, self._new_image_tokens(session))
        except MemoryExceeded as error:
            return [self._rejection(session, None, error)]
        self._sessions[session.id] = session
        return [Admitted(session.id)]

    def ask(self, command: AskSession, arrived_at: float) -> list[Event]:
        """Admit a turn, or reject it. Raises ValueError if it can't run. Any failure leaves the session unchanged."""
        session = self._sessions.get(command.session_id)
        if session is None:
            return [TurnFailed(command.turn_id, "the session is not open in the engine")]
        problem = _ask_problem(session, command, self._model)
        if problem is not None:
            return [TurnFailed(command.turn_id, problem)]
        problem = self._lacking(command.pictures)
        if problem is not None:
            return [TurnFailed(command.turn_id, problem, lacks_pictures=True)]
        turn = self._new_turn(session, command, arrived_at)
        check_feature_count(turn.pictures, len(turn.image_positions))
        kept_pictures = session.pictures_within(turn.start_tokens)
        waiting_turns = sum(other.waiting_turn is not None for other in self._sessions.values())
        if waiting_turns >= MAX_WAITING_TURNS:
            return [OutOfCapacity(session.id, turn.id, 0, 0, len(self._sessions), waiting_turns)]
        reserved_bytes = self._model.kv_shape.device_bytes(turn.most_tokens)
        try:
            self._memory.admit(
                reserved_bytes, turn.new_image_tokens, self._released_bytes(session, turn, kept_pictures)
            )
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
        turn = waiting.turn
        try:
            if turn is None:
                self._place_opening(waiting.session)
            elif waiting.session.turn is turn:  # else it ended with its session's opening
                self._place_turn(waiting.session, turn)
        except _Wait:
            return False
        return True

    def _place_opening(self, session: EngineSession) -> None:
        session.attach_features(self._features)
        self._reserve(session, session.opening_bytes)
        self._memory.restore(session, session.opening_tokens)
        session.advance(EngineSessionState.PREFILLING)
        donor = self._sessions.get(session.fork_from or "")
        if donor is not None and donor is not session:
            fork(session, donor)

    def _place_turn(self, session: EngineSession, turn: EngineTurn) -> None:
        session.attach_features(self._features)
        kept_pictures = session.pictures_within(turn.start_tokens)
        if kept_pictures is None:
            return  # known once more pictures of the opening are encoded; this holds up no other request
        self._reserve(
            session,
            self._model.kv_shape.device_bytes(turn.most_tokens),
            turn.new_image_tokens,
            self._released_bytes(session, turn, kept_pictures),
        )
        session.crop(turn.start_tokens, kept_pictures)
        self._memory.restore(session, turn.prompt_tokens, turn.most_tokens)
        session.admit_turn()

    def _reserve(
        self, session: EngineSession, kv_bytes: int, new_image_tokens: int = 0, released_bytes: int = 0
    ) -> None:
        """Reserve memory, see `DeviceMemory.place`. Raises `_Wait` if an active session may free the missing bytes."""
        try:
            self._memory.place(session, kv_bytes, new_image_tokens, released_bytes)
        except MemoryExceeded:
            if any(other.active for other in self._sessions.values() if other is not session):
                raise _Wait from None
            raise

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
            session.kv.drop()
            events.append(self._rejection(session, None, error))
        return events

    def _lacking(self, pictures: tuple[PreparedPicture, ...]) -> str | None:
        """Return an error if pictures have neither arrays nor features."""
        lacking = sum(not picture.inputs and picture.key not in self._features for picture in pictures)
        return f"{lacking} pictures have no arrays, and the engine does not hold their features" if lacking else None

    def _released_bytes(self, session: EngineSession, turn: EngineTurn, kept_pictures: int | None) -> int:
        """Return the bytes of features that the crop of a turn frees; 0 if they are not known yet."""
        removed = [] if kept_pictures is None else session.pictures[kept_pictures:]
        if not removed:
            return 0
        kept = [*session.pictures[:kept_pictures], *turn.pictures]
        for other in self._sessions.values():
            if other is not session:
                kept += other.pictures
                kept += other.turn.pictures if other.turn is not None else []
        return released_bytes(removed, kept)

    def _new_session(self, command: OpenSession, arrived_at: float) -> EngineSession:
        positions = self._model.media_positions(command.token_ids)
        content = SessionContent(
            token_ids=list(command.token_ids),
            image_positions=_outside(positions, command.answer_spans),
            pictures=[SessionPicture(picture.key, picture) for picture in command.pictures],
        )
        return EngineSession(
            token_ids=content.token_ids,
            image_positions=content.image_positions,
            pictures=content.pictures,
            id=command.session_id,
            kv=SessionKV(self._model.kv_shape, self._memory.pool),
            ticket=next(self._tickets),
            opened_at=arrived_at,
            opening_tokens=len(command.token_ids),
            opening_bytes=self._model.kv_shape.device_bytes(len(command.token_ids)),
            prefix=opening_key(content, command.salt),
            salt=command.salt,
            fork_from=command.fork_from,
        )

    def _new_image_tokens(self, session: EngineSession) -> int:
        """Return the image tokens of a new session's pictures; 0 if another session waits for the same features."""
        keys = unencoded_keys(session)
        is_shared = any(unencoded_keys(other) == keys for other in self._sessions.values())
        return 0 if is_shared else session.unencoded_tokens

    def _new_turn(self, session: EngineSession, command: AskSession, arrived_at: float) -> EngineTurn:
        start = len(session.token_ids) if command.kept_tokens is None else command.kept_tokens
        positions = _outside(self._model.media_positions(command.token_ids), command.answer_spans)
        prompt_tokens = start + len(command.token_ids)
        most_tokens = min(prompt_tokens + command.sampling.max_new_tokens, self._model.context_tokens)
        deadline_ms = command.sampling.deadline_ms
        turn = EngineTurn(
            id=command.turn_id,
            ticket=next(self._tickets),
            token_ids=command.token_ids,
            image_positions=[start + at for at in positions],
            pictures=[SessionPicture(picture.key, picture) for picture in command.pictures],
            start_tokens=start,
            most_tokens=most_tokens,
            sampler=Sampler(command.sampling),
            answer_text=self._answer_text(command.sampling.stop),
            asked_at=arrived_at,
            deadline_at=None if deadline_ms is None else arrived_at + deadline_ms / 1e3,
            ignore_eos=command.sampling.ignore_eos,
            min_tokens=command.sampling.min_tokens,
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
    if not command.token_ids:
        return "a turn must have at least one token"
    if not command.pictures and _outside(model.media_positions(command.token_ids), command.answer_spans):
        return "a prompt without a picture must not hold image tokens"
    held = len(session.token_ids)
    kept = held if command.kept_tokens is None else command.kept_tokens
    if not 0 <= kept <= held:
        return f"`kept_tokens` must be from 0 to {held}, got {kept}"
    if kept + len(command.token_ids) >= model.context_tokens:
        return f"the conversation is longer than the model's {model.context_tokens} tokens"
    return None


def _outside(positions: list[int], spans: tuple[tuple[int, int], ...]) -> list[int]:
    """Return the positions that are in none of the `(start, end)` spans."""
    return [at for at in positions if not any(start <= at < end for start, end in spans)]
