"""An engine without a model: the commands and events of `ipc`, answers that depend on the whole conversation.

tests/worker/test_fake_engine.py compares its events with those of the real engine.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from llava_sessions.ipc.messages import (
    Admitted,
    AskSession,
    Cancelled,
    Closed,
    CloseSession,
    Command,
    Delta,
    Event,
    Finished,
    Memory,
    OpenFailed,
    OpenSession,
    OutOfCapacity,
    Prefilled,
    Sampling,
    StopTurn,
    Timings,
    TurnAdmitted,
    TurnFailed,
    Usage,
)

END_TOKEN = 2
_FIRST_TOKEN = 40
_TOKENS = 40
_MOST_TOKENS = 5


def answer_of(token_ids: list[int], keys: list[str], max_new_tokens: int) -> list[int]:
    """Return the answer to a conversation, its prompt included. `keys` are those of its pictures, in order."""
    digest = hashlib.sha256(repr((token_ids, keys)).encode()).digest()
    count = 1 + digest[0] % _MOST_TOKENS
    answer = [_FIRST_TOKEN + byte % _TOKENS for byte in digest[1 : 1 + count]]
    return [*answer, END_TOKEN][:max_new_tokens]


def text_of(answer_ids: list[int]) -> str:
    """Return the text of an answer."""
    return "".join(f"{token} " for token in answer_ids if token != END_TOKEN)


@dataclass
class _Turn:
    """`made` of the `answer` exist. The session is rolled back to `start_tokens` and `start_keys`.

    `number`: order of arrival.
    """

    id: str
    number: int
    answer: list[int]
    sampling: Sampling
    start_tokens: int
    start_keys: int
    made: int = 0


@dataclass
class _Session:
    """`steps_left`: steps until the prompt is prefilled. A turn waits for the last of them."""

    token_ids: list[int]
    keys: list[str]
    steps_left: int
    turn: _Turn | None = None


@dataclass
class FakeEngine:
    """Apply commands, and return their events from `step`, as `engine.Engine` does.

    `open_fault` and `turn_fault` apply to the next such command: an `OpenFailed`, `TurnFailed` or `OutOfCapacity`.
    """

    sessions: dict[str, _Session] = field(default_factory=dict)
    prefill_steps: int = 1
    open_fault: type[Event] | None = None
    turn_fault: type[Event] | None = None
    turns_at_once: int | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _events: list[Event] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        """Whether `step` returns events."""
        return bool(self._events) or any(one.turn or one.steps_left for one in self.sessions.values())

    def memory(self) -> Memory:
        """Return one resident session of one byte for each open session."""
        return Memory(resident=len(self.sessions), kv_bytes=len(self.sessions))

    def apply(self, command: Command) -> None:
        """Apply a command."""
        match command:
            case OpenSession():
                self._open(command)
            case AskSession():
                self._ask(command)
            case StopTurn():
                self._stop(command)
            case CloseSession():
                session = self.sessions.get(command.session_id)
                if session is not None and session.turn is not None:
                    self._roll_back(session, Cancelled(session.turn.id))
                self.sessions.pop(command.session_id, None)
                self._events.append(Closed(command.session_id))

    def step(self) -> list[Event]:
        """Run one step; return the events since the last one."""
        return [event for events in self.phases() for event in events]

    def phases(self) -> Iterator[list[Event]]:
        """Prefill a part of each new session, and make a token of each turn. Yield what is known before, then the rest.

        As if memory was full, only the first `turns_at_once` turns in order of arrival advance.
        """
        yield self._taken()
        waiting = sorted((one.turn.number, one) for one in self.sessions.values() if one.turn is not None)
        running = [one for _, one in waiting[: self.turns_at_once]]
        for session_id, session in self.sessions.items():
            if session.turn is not None and session in running and session.steps_left <= 1:
                self._advance(session, session.turn)
            if session.steps_left:
                session.steps_left -= 1
                if not session.steps_left:
                    self._events.append(Prefilled(session_id, 1.0, 1.0))
        yield self._taken()

    def _taken(self) -> list[Event]:
        events = self._events
        self._events = []
        return events

    def fail(self, session_id: str) -> None:
        """Fail the work of a session in the middle, as a step of the real engine may."""
        session = self.sessions[session_id]
        if session.turn is not None:
            self._roll_back(session, TurnFailed(session.turn.id, "a test"))
        if session.steps_left:
            del self.sessions[session_id]
            self._events.append(OpenFailed(session_id, "a test"))

    def _open(self, command: OpenSession) -> None:
        fault = self.open_fault
        self.open_fault = None
        if fault is OutOfCapacity:
            self._events.append(OutOfCapacity(command.session_id, None, 2, 1, len(self.sessions)))
        elif fault is OpenFailed or command.session_id in self.sessions:
            self._events.append(OpenFailed(command.session_id, "a test, or open already"))
        else:
            keys = [picture.key for picture in command.pictures]
            self.sessions[command.session_id] = _Session(list(command.token_ids), keys, self.prefill_steps)
            self._events.append(Admitted(command.session_id))

    def _ask(self, command: AskSession) -> None:
        fault = self.turn_fault
        self.turn_fault = None
        session = self.sessions.get(command.session_id)
        if fault is OutOfCapacity and session is not None:
            self._events.append(OutOfCapacity(command.session_id, command.turn_id, 2, 1, len(self.sessions)))
            return
        if fault is TurnFailed or session is None or session.turn is not None:
            self._events.append(TurnFailed(command.turn_id, "a test, not open, or still answering"))
            return
        start_tokens = len(session.token_ids)
        start_keys = len(session.keys)
        session.token_ids += command.token_ids
        session.keys += [picture.key for picture in command.pictures]
        answer = answer_of(session.token_ids, session.keys, command.sampling.max_new_tokens)
        session.turn = _Turn(command.turn_id, next(self._numbers), answer, command.sampling, start_tokens, start_keys)
        self._events.append(TurnAdmitted(command.turn_id))

    def _stop(self, command: StopTurn) -> None:
        for session in self.sessions.values():
            turn = session.turn
            if turn is not None and turn.id == command.turn_id:
                if command.keep_answer and turn.made:
                    self._finish(session, turn, command.reason)
                else:
                    self._roll_back(session, Cancelled(turn.id, command.reason))

    def _advance(self, session: _Session, turn: _Turn) -> None:
        token = turn.answer[turn.made]
        turn.made += 1
        if token != END_TOKEN:
            self._events.append(Delta(turn.id, text_of([token])))
        if turn.made == len(turn.answer):
            self._finish(session, turn, "stop" if token == END_TOKEN else "length")

    def _finish(self, session: _Session, turn: _Turn, reason: str) -> None:
        session.turn = None
        made = turn.answer[: turn.made]
        kept = [token for token in made if token != END_TOKEN]
        usage = Usage(len(session.token_ids), turn.start_tokens, len(made))
        session.token_ids += kept
        self._events.append(Finished(turn.id, reason, text_of(made), made, kept, usage, Timings(0.0, 1.0, 2.0)))

    def _roll_back(self, session: _Session, event: Event) -> None:
        turn = session.turn
        assert turn is not None
        session.turn = None
        del session.token_ids[turn.start_tokens :]
        del session.keys[turn.start_keys :]
        self._events.append(event)
