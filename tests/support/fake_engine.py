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
    Described,
    DescribeSession,
    Event,
    Finished,
    Memory,
    OpenFailed,
    OpenSession,
    OutOfCapacity,
    Prefilled,
    PreparedPicture,
    Residence,
    StopTurn,
    Timings,
    TurnAdmitted,
    TurnFailed,
    Usage,
)

END_TOKEN = 2
IMAGE_TOKEN = 3  # of models/shapes, whose template puts other tokens between two pictures
_FIRST_TOKEN = 40
_TOKENS = 40
_MOST_TOKENS = 5


def answer_of(token_ids: list[int], keys: list[str], max_new_tokens: int, min_tokens: int = 0) -> list[int]:
    """Return the answer to a conversation, its prompt included. `keys` are those of its pictures, in order."""
    digest = hashlib.sha256(repr((token_ids, keys)).encode()).digest()
    count = max(1 + digest[0] % _MOST_TOKENS, min_tokens)
    answer = [_FIRST_TOKEN + byte % _TOKENS for byte in itertools.islice(itertools.cycle(digest[1:]), count)]
    return [*answer, END_TOKEN][:max_new_tokens]


def text_of(answer_ids: list[int]) -> str:
    """Return the text of an answer."""
    return "".join(f"{token} " for token in answer_ids if token != END_TOKEN)


def keys_within(token_ids: list[int], tokens: int) -> int | None:
    """Return the number of pictures in the first tokens, or None if they end inside a picture."""
    is_image = [token == IMAGE_TOKEN for token in token_ids]
    if 0 < tokens < len(token_ids) and is_image[tokens - 1] and is_image[tokens]:
        return None
    return sum(1 for kind, _ in itertools.groupby(is_image[:tokens]) if kind)


@dataclass
class _Turn:
    """`made` of the `answer` exist. A started turn is rolled back to `start_tokens` and `start_keys`.

    `number`: order of arrival. A turn that has not started has not changed the session.
    """

    command: AskSession
    number: int
    start_tokens: int
    start_keys: int
    cached_tokens: int
    started: bool = False
    answer: list[int] = field(default_factory=list)
    made: int = 0

    @property
    def id(self) -> str:
        """The turn's ID."""
        return self.command.turn_id


@dataclass
class _Session:
    """`steps_left`: steps until the prompt is prefilled. A turn waits for the last of them.

    `copied_tokens`: those that a fork copied.
    """

    token_ids: list[int]
    keys: list[str]
    steps_left: int
    copied_tokens: int
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
        turns = [session.turn.started for session in self.sessions.values() if session.turn is not None]
        return Memory(
            resident=len(self.sessions),
            kv_bytes=len(self.sessions),
            waiting_turns=turns.count(False),
            running_turns=turns.count(True),
        )

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
            case DescribeSession():
                session = self.sessions.get(command.session_id)
                tokens = 0 if session is None else len(session.token_ids)
                held = Residence() if session is None else Residence("resident", tokens, kv_bytes=1)
                self._events.append(Described(command.session_id, command.request_id, held))

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
                self._start(session, session.turn)
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
        elif self._lacks(command.pictures):
            self._events.append(OpenFailed(command.session_id, "no arrays", lacks_pictures=True))
        else:
            keys = [picture.key for picture in command.pictures]
            token_ids = list(command.token_ids)
            donor = self.sessions.get(command.fork_from or "")
            copied = 0 if donor is None else _shared_tokens(token_ids, keys, donor)
            self.sessions[command.session_id] = _Session(token_ids, keys, self.prefill_steps, copied)
            self._events.append(Admitted(command.session_id))

    def _lacks(self, pictures: tuple[PreparedPicture, ...]) -> bool:
        """Return whether a picture has no arrays, and no prefilled session shows it."""
        known = {key for session in self.sessions.values() if not session.steps_left for key in session.keys}
        return any(not picture.inputs and picture.key not in known for picture in pictures)

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
        held = len(session.token_ids)
        kept = held if command.kept_tokens is None else command.kept_tokens
        kept_keys = len(session.keys) if kept == held else keys_within(session.token_ids, kept)
        if not 0 <= kept <= held or kept_keys is None or not command.token_ids:
            self._events.append(TurnFailed(command.turn_id, "the kept tokens or the new ones are wrong"))
            return
        if self._lacks(command.pictures):
            self._events.append(TurnFailed(command.turn_id, "no arrays", lacks_pictures=True))
            return
        cached = min(kept, session.copied_tokens if session.steps_left else held)
        session.turn = _Turn(command, next(self._numbers), kept, kept_keys, cached)
        self._events.append(TurnAdmitted(command.turn_id))

    def _start(self, session: _Session, turn: _Turn) -> None:
        """Crop the session and append the turn's prompt, in the turn's first step."""
        if turn.started:
            return
        turn.started = True
        command = turn.command
        session.token_ids[turn.start_tokens :] = command.token_ids
        session.keys[turn.start_keys :] = [picture.key for picture in command.pictures]
        sampling = command.sampling
        turn.answer = answer_of(session.token_ids, session.keys, sampling.max_new_tokens, sampling.min_tokens)

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
        usage = Usage(len(session.token_ids), turn.cached_tokens, len(made))
        session.token_ids += kept
        self._events.append(Finished(turn.id, reason, text_of(made), made, kept, usage, Timings(0.0, 1.0, 2.0)))

    def _roll_back(self, session: _Session, event: Event) -> None:
        turn = session.turn
        assert turn is not None
        session.turn = None
        if turn.started:
            del session.token_ids[turn.start_tokens :]
            del session.keys[turn.start_keys :]
        self._events.append(event)


def _shared_tokens(token_ids: list[int], keys: list[str], donor: _Session) -> int:
    """Return the length of the common prefix with a donor that is prefilled. It does not end inside a picture."""
    if donor.steps_left:
        return 0
    pairs = zip(token_ids, donor.token_ids, strict=False)
    tokens = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    while tokens:
        pictures = keys_within(token_ids, tokens)
        if pictures is not None and keys[:pictures] == donor.keys[:pictures]:
            break
        tokens -= 1
    return tokens
