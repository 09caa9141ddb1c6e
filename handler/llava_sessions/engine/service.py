"""Owns the open sessions on the device and the engine's loop body: commands in, `step()`, events out.

What the handler talks to. Must not know threads, processes, TorchServe, payloads or HTTP.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ..conversation import AnswerText, ChatTokens, Conversation
from .kv import SessionKV
from .messages import (
    AskSession,
    Cancelled,
    CancelTurn,
    Closed,
    CloseSession,
    Command,
    Delta,
    Event,
    Finished,
    Memory,
    Opened,
    OpenFailed,
    OpenSession,
    Sampling,
    Timings,
    TurnFailed,
    Usage,
)
from .model import Model, Segment
from .sampling import Sampler, next_tokens
from .scheduler import next_to_encode, plan

log = logging.getLogger(__name__)


@dataclass
class _Turn:
    """A running turn. `start_tokens` is the length of the conversation before it, where a cancel goes back to."""

    id: str
    start_tokens: int
    cached_tokens: int
    prompt_tokens: int
    max_new_tokens: int
    sampler: Sampler
    reader: AnswerText
    asked_at: float
    started_at: float | None = None
    first_token_at: float | None = None
    answer_ids: list[int] = field(default_factory=list)
    text: str = ""


@dataclass
class _Session:
    """One open session: its conversation's ids, its KV cache, its picture (pixels until encoded, features from then
    on).
    """

    id: str
    token_ids: list[int]
    image_positions: list[int]
    kv: SessionKV
    pixel_values: np.ndarray | None
    ticket: int
    opened_at: float
    opening_tokens: int
    features: torch.Tensor | None = None
    encode_ms: float = 0.0
    announced: bool = False
    turn: _Turn | None = None

    @property
    def pending_tokens(self) -> int:
        return len(self.token_ids) - self.kv.length

    @property
    def encoded(self) -> bool:
        return self.features is not None

    def segment(self, tokens: int) -> Segment:
        """The next `tokens` pending ones, with the rows of the features that fall among them."""
        start, end = self.kv.length, self.kv.length + tokens
        first, last = bisect_left(self.image_positions, start), bisect_left(self.image_positions, end)
        features = self.features[first:last] if last > first else None
        sample = self.turn is not None and end == len(self.token_ids)
        return Segment(self.kv, self.token_ids[start:end], features, sample)


class Engine:
    """Holds many picture chats on one device and answers them in packed steps.

    Single-threaded: one caller applies commands and calls `step()` while `has_work`.
    """

    def __init__(
        self, model: Model, reader: Callable[[tuple[str, ...]], AnswerText], prefill_chunk_tokens: int = 256
    ) -> None:
        """`reader` makes the text reader of one answer from its stop strings."""
        self.model = model
        self._reader = reader
        self._chunk_tokens = prefill_chunk_tokens
        self._sessions: dict[str, _Session] = {}
        self._turns: dict[str, _Session] = {}
        self._tickets = 0
        self._events: list[Event] = []

    def warm_up(self, tokens: ChatTokens) -> None:
        """Run one short chat, so that the first user pays no start-up cost and a broken checkpoint is found at once.

        Raises RuntimeError when it does not answer.
        """
        opening = tokens.opening([Image.new("RGB", (64, 64))])
        prompt_ids = tokens.prompt(Conversation(opening), "What is this?")
        self.open(OpenSession("warm-up", opening.token_ids, opening.pixel_values))
        self.ask(AskSession("warm-up", "warm-up", prompt_ids, Sampling(max_new_tokens=4)))
        events = []
        while self.has_work:
            events += self.step()
        self.close("warm-up")
        self.step()
        if not any(isinstance(event, Finished) for event in events):
            raise RuntimeError(f"the checkpoint does not answer a first question: {events}")

    @property
    def has_work(self) -> bool:
        """Whether `step()` would do or tell anything."""
        return bool(self._events) or any(not s.encoded or s.pending_tokens for s in self._sessions.values())

    def memory(self) -> Memory:
        """What the open sessions hold on the device now."""
        sessions = self._sessions.values()
        features = sum(s.features.nbytes for s in sessions if s.features is not None)
        kv = sum(s.kv.nbytes for s in sessions)
        return Memory(len(self._sessions), features, kv, self.model.allocated_bytes())

    def apply(self, command: Command) -> None:
        """Take one command. What comes of it is told by the events of the following steps."""
        match command:
            case OpenSession():
                self.open(command)
            case AskSession():
                self.ask(command)
            case CancelTurn():
                self.cancel(command.turn_id)
            case CloseSession():
                self.close(command.session_id)

    def open(self, command: OpenSession) -> None:
        """Hold a new session; its picture is encoded and its ids are prefilled by the next steps."""
        if command.session_id in self._sessions:
            raise ValueError(f"session {command.session_id} is open already")
        image = self.model.image_token_id
        self._sessions[command.session_id] = _Session(
            id=command.session_id,
            token_ids=list(command.token_ids),
            image_positions=[at for at, token in enumerate(command.token_ids) if token == image],
            kv=self.model.new_kv(),
            pixel_values=command.pixel_values,
            ticket=self._ticket(),
            opened_at=time.perf_counter(),
            opening_tokens=len(command.token_ids),
        )

    def ask(self, command: AskSession) -> None:
        """Start a turn; `token_ids` are appended to the session's."""
        session = self._sessions.get(command.session_id)
        problem = self._unfit(session, command)
        if problem:
            self._events.append(TurnFailed(command.turn_id, problem))
            return
        sampling = command.sampling
        start, cached = len(session.token_ids), session.kv.length
        session.token_ids += command.token_ids
        session.ticket = self._ticket()
        session.turn = _Turn(
            id=command.turn_id,
            start_tokens=start,
            cached_tokens=cached,
            prompt_tokens=len(session.token_ids),
            max_new_tokens=min(sampling.max_new_tokens, self.model.context_tokens - len(session.token_ids)),
            sampler=Sampler(sampling),
            reader=self._reader(sampling.stop),
            asked_at=time.perf_counter(),
        )
        self._turns[command.turn_id] = session

    def _unfit(self, session: _Session | None, command: AskSession) -> str | None:
        if session is None:
            return "the session is not open in the engine"
        if session.turn is not None:
            return "the session is still answering"
        if self.model.image_token_id in command.token_ids:
            return "a prompt must not hold image tokens"
        if len(session.token_ids) + len(command.token_ids) >= self.model.context_tokens:
            return f"the conversation is longer than the model's {self.model.context_tokens} tokens"
        return None

    def cancel(self, turn_id: str) -> None:
        """End a running turn and put its session back to where it was before; nothing happens to an ended turn."""
        session = self._turns.get(turn_id)
        if session is not None:
            self._roll_back(session)
            self._events.append(Cancelled(turn_id))

    def close(self, session_id: str) -> None:
        """Free a session, whatever it is doing."""
        session = self._sessions.get(session_id)
        if session is not None:
            if session.turn is not None:
                self.cancel(session.turn.id)
            del self._sessions[session_id]
        self._events.append(Closed(session_id))

    def step(self) -> list[Event]:
        """Encode one waiting picture, run one packed forward, sample, and tell what happened since the last step."""
        self._encode_next()
        steps = plan(self._sessions.values(), self._chunk_tokens)
        if steps:
            self._forward(steps)
        events, self._events = self._events, []
        return events

    def _encode_next(self) -> None:
        session = next_to_encode(self._sessions.values())
        if session is None:
            return
        began = time.perf_counter()
        try:
            features = self.model.encode(session.pixel_values)
            if len(features) != len(session.image_positions):
                found = f"{len(features)} features for {len(session.image_positions)} image tokens"
                raise ValueError(f"the checkpoint's processor and vision tower disagree: {found}")
        except Exception as error:
            log.exception("encode_failed session=%s", session.id[:12])
            self._fail(session, error)
            return
        session.features, session.pixel_values = features, None
        session.encode_ms = _ms(began)

    def _forward(self, steps: list[tuple[_Session, int]]) -> None:
        now = time.perf_counter()
        for session, _ in steps:
            if session.turn is not None and session.turn.started_at is None:
                session.turn.started_at = now
        segments = [session.segment(tokens) for session, tokens in steps]
        sampled = [session for (session, _), segment in zip(steps, segments, strict=True) if segment.sample]
        try:
            logits = self.model.forward(segments)
            tokens = next_tokens(logits, [session.turn.sampler for session in sampled])
        except Exception as error:
            log.exception("step_failed sessions=%d", len(steps))
            for session, _ in steps:
                self._fail(session, error)
            return
        for session, token in zip(sampled, tokens, strict=True):
            self._advance(session, session.turn, token)
        for session, _ in steps:
            self._announce(session)

    def _announce(self, session: _Session) -> None:
        """Tell once that the prompt up to the picture is in the cache."""
        if not session.announced and session.kv.length >= session.opening_tokens:
            session.announced = True
            self._events.append(Opened(session.id, session.encode_ms, _ms(session.opened_at)))

    def _advance(self, session: _Session, turn: _Turn, token: int) -> None:
        """Take the next token of an answer: tell its text, and end the turn when it was the last one."""
        turn.first_token_at = turn.first_token_at or time.perf_counter()
        turn.answer_ids.append(token)
        ended = token in self.model.eos_token_ids
        text = ""
        if not ended:
            session.token_ids.append(token)
            text = turn.reader.push(token)
        reason = "stop" if ended or turn.reader.stopped else None
        if reason is None and len(turn.answer_ids) >= turn.max_new_tokens:
            reason = "length"
        if reason is not None and not turn.reader.stopped:
            text += turn.reader.finish()
        if text:
            turn.text += text
            self._events.append(Delta(turn.id, text))
        if reason is not None:
            self._finish(session, turn, reason)

    def _finish(self, session: _Session, turn: _Turn, reason: str) -> None:
        session.turn = None
        del self._turns[turn.id]
        # The template writes the end-of-sequence token itself where a conversation has one.
        kept = session.token_ids[turn.prompt_tokens :]
        usage = Usage(turn.prompt_tokens, turn.cached_tokens, len(turn.answer_ids))
        queue_ms = (turn.started_at - turn.asked_at) * 1e3
        ttft_ms = (turn.first_token_at - turn.asked_at) * 1e3
        timings = Timings(queue_ms, ttft_ms, _ms(turn.asked_at))
        self._events.append(Finished(turn.id, reason, turn.text, turn.answer_ids, kept, usage, timings))

    def _fail(self, session: _Session, error: Exception) -> None:
        """End what the session was doing: its turn, or its opening."""
        message = f"{type(error).__name__}: {error}"
        if session.turn is not None:
            self._events.append(TurnFailed(session.turn.id, message))
            self._roll_back(session)
        if not session.announced:
            self._events.append(OpenFailed(session.id, message))
            del self._sessions[session.id]

    def _roll_back(self, session: _Session) -> None:
        turn, session.turn = session.turn, None
        del self._turns[turn.id]
        del session.token_ids[turn.start_tokens :]
        session.kv.crop(turn.start_tokens)

    def _ticket(self) -> int:
        self._tickets += 1
        return self._tickets


def _ms(since: float) -> float:
    return (time.perf_counter() - since) * 1e3
