"""The engine's sessions and turns: their states, and the content that turns add and remove.

A session does not run the model. Its methods change its own data and return the events to report.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from ..ipc.messages import Cancelled, Delta, Event, Finished, Prefilled, Residence, Timings, Usage
from ..text.answer_text import AnswerText
from .attention import Segment
from .content import FeatureStore, SessionContent, SessionPicture, opening_key
from .device import Stopwatch
from .kv import SessionKV
from .sampling import Sampler


class EngineSessionState(Enum):
    """Life of an admitted session. Closing removes it from the engine in any state."""

    WAITING = "waiting"  # no room on the device is reserved for its KV cache yet
    PREFILLING = "prefilling"  # room is reserved; the prompt up to the last picture is not prefilled yet
    READY = "ready"  # the prompt up to the last picture has been prefilled once


class EngineTurnState(Enum):
    """Life of a turn."""

    WAITING = "waiting"  # no room on the device is reserved for it; its tokens are not part of the session yet
    QUEUED = "queued"  # room is reserved; no token of it has run
    RUNNING = "running"  # in prefill or decode
    FINISHED = "finished"  # its tokens are part of the session
    ROLLED_BACK = "rolled back"  # its tokens are not part of the session


State = EngineSessionState | EngineTurnState

# Every legal transition. `Stateful.advance` rejects all others.
TRANSITIONS: Mapping[State, frozenset[State]] = {
    EngineSessionState.WAITING: frozenset({EngineSessionState.PREFILLING}),
    EngineSessionState.PREFILLING: frozenset({EngineSessionState.READY}),
    EngineSessionState.READY: frozenset(),
    EngineTurnState.WAITING: frozenset({EngineTurnState.QUEUED, EngineTurnState.ROLLED_BACK}),
    EngineTurnState.QUEUED: frozenset({EngineTurnState.RUNNING, EngineTurnState.ROLLED_BACK}),
    EngineTurnState.RUNNING: frozenset({EngineTurnState.FINISHED, EngineTurnState.ROLLED_BACK}),
    EngineTurnState.FINISHED: frozenset(),
    EngineTurnState.ROLLED_BACK: frozenset(),
}


class IllegalTransition(Exception):
    """A session or turn was to enter a state that `TRANSITIONS` does not allow. The engine drops that session."""


class Stateful:
    """A state that `advance` alone writes."""

    state: State

    def advance(self, state: State) -> None:
        """Enter a state. Raises `IllegalTransition`, with the state unchanged."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"{type(self).__name__} can't go from {self.state.name} to {state.name}")
        self.state = state


@dataclass
class EngineTurn(Stateful):
    """A question and its answer.

    `ticket`: order of arrival. `token_ids`, `image_positions` and `pictures` join the session's when room is reserved
    for the turn. The session is first cropped to `start_tokens` tokens, which have `start_pictures` pictures; a
    rollback restores these counts. `most_tokens`: the longest conversation that the turn may make. Times are seconds of
    `time.perf_counter`. `deadline_at`: when the turn is stopped, or None. `ignore_eos`: an end-of-sequence token is a
    token like any other. `min_tokens`: as in `Sampling`. `undecoded_ids`: the last of `answer_ids`, whose text is not
    known yet.
    """

    id: str
    ticket: int
    token_ids: list[int]
    image_positions: list[int]
    pictures: list[SessionPicture]
    start_tokens: int
    most_tokens: int
    sampler: Sampler
    answer_text: AnswerText
    asked_at: float
    deadline_at: float | None
    ignore_eos: bool = False
    min_tokens: int = 0
    state: State = EngineTurnState.WAITING
    start_pictures: int = 0  # set with QUEUED
    cached_tokens: int = 0  # set with RUNNING
    started_at: float = 0.0  # set with RUNNING
    first_token_at: float = 0.0  # set with the first of `answer_ids`
    answer_ids: list[int] = field(default_factory=list)
    undecoded_ids: list[int] = field(default_factory=list)
    text: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether no room on the device is reserved yet."""
        return self.state is EngineTurnState.WAITING

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the conversation before the answer."""
        return self.start_tokens + len(self.token_ids)

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of the answer."""
        return self.most_tokens - self.prompt_tokens

    @property
    def new_image_tokens(self) -> int:
        """Image tokens of the turn's pictures; 0 if all of them have features."""
        known = all(picture.features is not None for picture in self.pictures)
        return 0 if known else len(self.image_positions)

    @property
    def usage(self) -> Usage:
        """Tokens of the turn so far."""
        return Usage(self.prompt_tokens, self.cached_tokens, len(self.answer_ids))

    @property
    def timings(self) -> Timings:
        """Times of a turn that ends now. A step or a token that never came counts as coming now."""
        now = time.perf_counter()
        return Timings(
            queue_ms=((self.started_at or now) - self.asked_at) * 1e3,
            ttft_ms=((self.first_token_at or now) - self.asked_at) * 1e3,
            total_ms=(now - self.asked_at) * 1e3,
        )

    def start(self, cached_tokens: int) -> None:
        """Enter RUNNING in the first step that runs tokens of the turn. Does nothing in later steps.

        `cached_tokens`: tokens of the session that have KV now.
        """
        if self.state is EngineTurnState.QUEUED:
            self.advance(EngineTurnState.RUNNING)
            self.started_at = time.perf_counter()
            self.cached_tokens = cached_tokens

    def is_overdue(self, now: float) -> bool:
        """Return whether the deadline has passed."""
        return self.deadline_at is not None and now >= self.deadline_at

    def detokenize(self) -> list[Event]:
        """Return the `Delta` of the tokens whose text is not known yet, if they have text."""
        return self.emit(self.decode()) if self.undecoded_ids else []

    def decode(self) -> str:
        """Return the certain text of the tokens whose text is not known yet. A stop string in it sets `stopped`."""
        token_ids = self.undecoded_ids
        self.undecoded_ids = []  # at once: an error must not be repeated
        may_stop = len(self.answer_ids) > self.min_tokens
        return "".join([self.answer_text.push(token, may_stop) for token in token_ids])

    def emit(self, text: str) -> list[Event]:
        """Append text to the answer; return its `Delta`, or nothing for empty text."""
        if not text:
            return []
        self.text += text
        return [Delta(self.id, text)]


@dataclass(eq=False)
class EngineSession(SessionContent, Stateful):
    """One open session: its content, KV cache and running turn.

    `ticket`: order of arrival of the latest request for which room was reserved, or of the opening; both the schedule
    and least-recently-used eviction sort by it. `opening_tokens`, `opening_bytes`: the tokens of the opening that are
    part of the session, and the KV of the whole opening on the device. `prefix`: equal for sessions with the same
    opening and `salt`, which share its prefill. `fork_from`: see `OpenSession`. `reserved_bytes`: upper bound of the KV
    on the device during the current work. `encodings`: times of the batches with its pictures. `short_of_memory`:
    memory ran out for the session since its latest request.
    """

    id: str
    kv: SessionKV
    ticket: int
    opened_at: float
    opening_tokens: int
    opening_bytes: int
    prefix: Hashable
    salt: str = ""
    fork_from: str | None = None
    state: State = EngineSessionState.WAITING
    reserved_bytes: int = 0
    encodings: list[Stopwatch] = field(default_factory=list)
    short_of_memory: bool = False
    turn: EngineTurn | None = None

    @property
    def has_work(self) -> bool:
        """Whether the session has an opening or a turn that is not done."""
        return self.turn is not None or self.state is not EngineSessionState.READY

    @property
    def waiting_turn(self) -> EngineTurn | None:
        """The turn for which no room is reserved yet."""
        return self.turn if self.turn is not None and self.turn.is_waiting else None

    @property
    def active(self) -> bool:
        """Whether room is reserved for the session's work. The KV cache of an active session never moves."""
        has_room = self.turn is not None and not self.turn.is_waiting
        return has_room or self.state is EngineSessionState.PREFILLING

    @property
    def pending_tokens(self) -> int:
        """Tokens that are not in the KV cache yet."""
        return len(self.token_ids) - self.kv.length

    @property
    def residence(self) -> Residence:
        """Where the KV cache is, and the memory of the session."""
        features = {id(picture.features): picture.features for picture in self.pictures}
        return Residence(
            tier=self.kv.tier,
            cached_tokens=self.kv.length,
            kv_bytes=self.kv.device_bytes,
            offloaded_bytes=self.kv.host_bytes,
            features_bytes=sum(each.rows.nbytes for each in features.values() if each is not None),
        )

    def attach_features(self, store: FeatureStore) -> None:
        """Take features that other sessions have, also for a waiting turn."""
        waiting = self.waiting_turn
        for picture in self.pictures if waiting is None else [*self.pictures, *waiting.pictures]:
            picture.attach(store)

    def segment(self, tokens: int) -> Segment:
        """Return the next `tokens` pending tokens with the features that belong to them."""
        start = self.kv.length
        end = start + tokens
        first = bisect_left(self.image_positions, start)
        last = bisect_left(self.image_positions, end)
        places = [position - start for position in self.image_positions[first:last]]
        sample = self.turn is not None and not self.turn.is_waiting and end == len(self.token_ids)
        return Segment(self.kv, self.token_ids[start:end], self.rows(first, last), places, sample)

    def mark_prefilled(self) -> list[Event]:
        """Enter READY once the KV cache has the opening; return `Prefilled` that one time."""
        if self.state is not EngineSessionState.PREFILLING or self.kv.length < self.opening_tokens:
            return []
        self.advance(EngineSessionState.READY)
        encode_ms = sum(watch.ms for watch in self.encodings)
        return [Prefilled(self.id, encode_ms, elapsed_ms(self.opened_at))]

    def crop(self, tokens: int, pictures: int) -> None:
        """Discard all but the first `tokens` tokens, with their `pictures` pictures and their KV.

        If they are a part of the opening, the session shares the prefill of this part only.
        """
        self.truncate(tokens, pictures)
        self.kv.crop(tokens)
        if tokens < self.opening_tokens:
            self.opening_tokens = tokens
            self.prefix = opening_key(self, self.salt)

    def admit_turn(self) -> None:
        """Append the waiting turn's tokens and pictures to the cropped session: room on the device is reserved."""
        turn = self._current_turn()
        turn.advance(EngineTurnState.QUEUED)
        turn.start_pictures = len(self.pictures)
        self.ticket = turn.ticket
        self.short_of_memory = False
        self.image_positions += turn.image_positions
        self.token_ids += turn.token_ids
        self.pictures += turn.pictures

    def accept_token(self, token: int, eos_token_ids: frozenset[int], defer_text: bool = False) -> list[Event]:
        """Append a sampled token to the running answer; return its text, and `Finished` after the last token.

        With `defer_text` the text may be left to `EngineTurn.detokenize`: unless the token is the first or the last one
        of the answer, or the answer has stop strings.
        """
        turn = self._current_turn()
        is_first = not turn.answer_ids
        if is_first:
            turn.first_token_at = time.perf_counter()
        turn.answer_ids.append(token)
        is_eos = token in eos_token_ids and not turn.ignore_eos
        if not is_eos:
            self.token_ids.append(token)
            turn.undecoded_ids.append(token)
        is_last = is_eos or len(turn.answer_ids) >= turn.max_new_tokens
        if defer_text and not (is_first or is_last or turn.answer_text.may_stop):
            return []
        text = turn.decode()
        has_stopped = turn.answer_text.stopped
        if is_last and not has_stopped:
            text += turn.answer_text.finish()
        events = turn.emit(text)
        if is_last or has_stopped:
            events.append(self._finish_turn("stop" if is_eos or has_stopped else "length"))
        return events

    def stop_turn(self, reason: str, keep_answer: bool) -> list[Event]:
        """End the turn early.

        With `keep_answer` the turn finishes with its tokens. Without it, or without tokens, it is rolled back.
        """
        turn = self._current_turn()
        if keep_answer and turn.answer_ids:
            text = turn.decode() + turn.answer_text.finish()
            return [*turn.emit(text), self._finish_turn(reason)]
        events = turn.detokenize()
        self.roll_back_turn()
        return [*events, Cancelled(turn.id, reason, turn.usage, turn.timings)]

    def _finish_turn(self, reason: str) -> Finished:
        turn = self._current_turn()
        turn.advance(EngineTurnState.FINISHED)
        self.turn = None
        # Without the end-of-sequence token, which the chat template writes where a conversation has one.
        kept_ids = self.token_ids[turn.prompt_tokens :]
        return Finished(turn.id, reason, turn.text, turn.answer_ids, kept_ids, turn.usage, turn.timings)

    def roll_back_turn(self) -> None:
        """Remove the turn's tokens, pictures and KV. A turn that still waits has not changed the session."""
        turn = self._current_turn()
        was_waiting = turn.is_waiting
        turn.advance(EngineTurnState.ROLLED_BACK)
        self.turn = None
        if was_waiting:
            return
        self.crop(turn.start_tokens, turn.start_pictures)
        if not turn.start_tokens:
            self.kv.drop()  # the session is empty

    def _current_turn(self) -> EngineTurn:
        if self.turn is None:
            raise RuntimeError("the session has no turn")
        return self.turn


def has_opening(session: EngineSession) -> bool:
    """Return whether the KV cache has the opening, and `Prefilled` is reported."""
    stored = session.kv.length
    return stored > 0 and stored >= session.opening_tokens and session.state is EngineSessionState.READY


def awaits_first_token(session: EngineSession) -> bool:
    """Return whether the session has an opening that is not prefilled, or a turn without a token of its answer."""
    turn = session.turn
    return session.state is not EngineSessionState.READY or (turn is not None and not turn.answer_ids)


def elapsed_ms(since: float) -> float:
    """Return the milliseconds since a time of `time.perf_counter`."""
    return (time.perf_counter() - since) * 1e3
