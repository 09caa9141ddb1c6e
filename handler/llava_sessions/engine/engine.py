"""The engine: applies commands to its sessions and answers them in packed steps.

A step encodes at most one picture and runs one forward over new tokens of all sessions with work.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Iterator

from ..ipc.messages import (
    Admitted,
    AskSession,
    Cancelled,
    Closed,
    CloseSession,
    Command,
    Event,
    Memory,
    OpenFailed,
    OpenSession,
    OutOfCapacity,
    StopTurn,
    TurnFailed,
)
from ..text.answer_text import AnswerText
from .budget import DeviceBudget
from .faults import first_line, is_out_of_memory, raise_if_device_lost
from .kv import SessionKV
from .memory import DeviceMemory, MemoryExceeded
from .model import Model
from .sampling import next_tokens
from .scheduler import plan
from .session import (
    EngineSession,
    EngineSessionState,
    Features,
    FeatureStore,
    IllegalTransition,
    SessionPicture,
    elapsed_ms,
    next_to_encode,
)

log = logging.getLogger(__name__)


class Engine:
    """Open sessions on one device.

    Not thread-safe: one thread calls `apply`, and `step` while `has_work` is True. An error ends only the session or
    the turn that it concerns. An error after which the device no longer computes is raised.
    """

    def __init__(
        self,
        model: Model,
        answer_text: Callable[[tuple[str, ...]], AnswerText],
        budget: DeviceBudget,
        prefill_chunk_tokens: int = 256,
    ) -> None:
        """`answer_text` makes the detokenizer of one answer from its stop strings.

        `prefill_chunk_tokens`: most prompt tokens of one step, over all sessions.
        """
        self.model = model
        self.sessions: dict[str, EngineSession] = {}  # by session ID; only the engine changes it
        self._features = FeatureStore()
        self.device_memory = DeviceMemory(
            budget,
            sessions=self.sessions,
            features=self._features,
            kv_shape=model.kv_shape,
            feature_bytes=model.feature_bytes,
            context_tokens=model.context_tokens,
        )
        self._answer_text = answer_text
        self._chunk_tokens = prefill_chunk_tokens
        self._tickets = itertools.count(1)
        self._events: list[Event] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` would do any work or return an event."""
        active = any(session.active for session in self.sessions.values())
        return bool(self._events) or active or self.device_memory.next_to_grow() is not None

    def memory(self) -> Memory:
        """Return what the open sessions hold now."""
        return self.device_memory.usage(self.model.allocated_bytes())

    def apply(self, command: Command) -> None:
        """Apply one command. Its results, including errors, are events of the following steps."""
        try:
            match command:
                case OpenSession():
                    self._open(command)
                case AskSession():
                    self._ask(command)
                case StopTurn():
                    self._stop(command.turn_id, command.reason, command.keep_answer)
                case CloseSession():
                    self._close(command.session_id)
        except Exception as error:
            raise_if_device_lost(error, self.model.device)
            log.exception("command_failed command=%s", type(command).__name__)
            message = f"{type(error).__name__}: {error}"
            if isinstance(command, OpenSession):
                self._events.append(OpenFailed(command.session_id, message))
            elif isinstance(command, AskSession):
                self._events.append(TurnFailed(command.turn_id, message))

    def _open(self, command: OpenSession) -> None:
        """Admit a new session, or reject it if memory is insufficient. The following steps encode and prefill."""
        if command.session_id in self.sessions:
            raise ValueError("the session is open already")
        positions = self.model.media_positions(command.token_ids)
        session = EngineSession(
            id=command.session_id,
            token_ids=list(command.token_ids),
            image_positions=_outside(positions, command.answer_spans),
            kv=SessionKV(self.model.kv_shape),
            pictures=[SessionPicture(picture.key, picture) for picture in command.pictures],
            ticket=next(self._tickets),
            opened_at=time.perf_counter(),
            opening_tokens=len(command.token_ids),
            opening_bytes=self.model.kv_shape.device_bytes(len(command.token_ids)),
            prefix=(tuple(command.token_ids), tuple(picture.key for picture in command.pictures)),
        )
        try:
            self.device_memory.admit(session, session.opening_bytes, len(positions), command.pictures)
        except MemoryExceeded as error:
            self._events.append(_rejection(session.id, None, error, len(self.sessions)))
            return
        self.sessions[session.id] = session
        self._events.append(Admitted(session.id))

    def _ask(self, command: AskSession) -> None:
        """Start a turn, or reject it if memory is insufficient. Any failure leaves the session unchanged."""
        session = self.sessions.get(command.session_id)
        if session is None:
            self._events.append(TurnFailed(command.turn_id, "the session is not open in the engine"))
            return
        problem = _ask_problem(session, command, self.model)
        if problem is not None:
            self._events.append(TurnFailed(command.turn_id, problem))
            return
        start = len(session.token_ids)
        prompt_tokens = start + len(command.token_ids)
        max_new_tokens = min(command.sampling.max_new_tokens, self.model.context_tokens - prompt_tokens)
        most_tokens = prompt_tokens + max_new_tokens
        needed_bytes = self.model.kv_shape.device_bytes(most_tokens)
        reserved_bytes = max(needed_bytes, session.kv.device_bytes)  # more if the cache was grown ahead
        positions = self.model.media_positions(command.token_ids, start)
        try:
            self.device_memory.admit(session, reserved_bytes, len(positions), command.pictures)
            self.device_memory.restore(session, most_tokens)
        except MemoryExceeded as error:
            self._events.append(_rejection(session.id, command.turn_id, error, len(self.sessions)))
            return
        session.begin_turn(
            command,
            image_positions=positions,
            max_new_tokens=max_new_tokens,
            answer_text=self._answer_text(command.sampling.stop),
            ticket=next(self._tickets),
            reserved_bytes=reserved_bytes,
        )

    def _stop(self, turn_id: str, reason: str, keep_answer: bool) -> None:
        """End a running turn early, see `StopTurn`. Does nothing if the turn has ended."""
        for session in list(self.sessions.values()):
            if session.turn is not None and session.turn.id == turn_id:
                with self._isolated(session):
                    self._events += session.stop_turn(reason, keep_answer)

    def _close(self, session_id: str) -> None:
        """Free a session in any state. `Closed` follows in any case, also for an unknown session."""
        session = self.sessions.pop(session_id, None)
        if session is not None and session.turn is not None:
            self._events.append(Cancelled(session.turn.id))
        self._events.append(Closed(session_id))

    def step(self) -> list[Event]:
        """Encode one picture, run one packed forward and sample; return all events since the last step.

        If no session has work, one KV cache is grown ahead instead.
        """
        now = time.perf_counter()
        for session in list(self.sessions.values()):
            if session.turn is not None and session.turn.is_overdue(now):
                self._stop(session.turn.id, "deadline", keep_answer=True)
        self._encode_next()
        steps = plan(self._ready(), self._chunk_tokens)
        if steps:
            self._forward(steps)
        elif not any(session.active for session in self.sessions.values()):
            self.device_memory.grow_ahead()
        events = self._events
        self._events = []
        return events

    def _encode_next(self) -> None:
        """Encode the picture that has waited longest. A failure ends the turn that shows it, or the opening."""
        session = next_to_encode(self.sessions.values(), self._features)
        if session is None:
            return
        index = next(at for at, picture in enumerate(session.pictures) if picture.features is None)
        picture = session.pictures[index]
        began = time.perf_counter()
        try:
            if picture.prepared is None:
                raise ValueError("the picture has no arrays to encode")
            picture.features = Features(self.model.encode(picture.prepared))
            _check_feature_count(session)
        except Exception as error:
            raise_if_device_lost(error, self.model.device)
            if is_out_of_memory(error):
                self._retry_or_reject(session, error)
                return
            log.exception("encode_failed session=%s", session.id[:12])
            is_of_turn = session.turn is not None and index >= session.turn.start_pictures
            self._fail(session, error, ends_opening=not is_of_turn)
            return
        picture.prepared = None
        self._features.add(picture.key, picture.features)
        session.encode_ms += elapsed_ms(began)

    def _ready(self) -> list[EngineSession]:
        """Return the sessions whose tokens can run in this step, in order of arrival.

        Sessions with the same opening prefill it once: the first one runs, the others wait and copy its KV. A waiting
        opening gets room on the device only after all that arrived before it.
        """
        ready: list[EngineSession] = []
        prefilling: set[Hashable] = set()
        is_full = False
        for session in sorted((s for s in self.sessions.values() if s.active), key=lambda s: s.ticket):
            if not session.encoded:
                continue
            with self._isolated(session):
                if session.state is EngineSessionState.WAITING:
                    is_full = is_full or not self.device_memory.place(session)
                    if is_full:
                        continue
                    session.advance(EngineSessionState.PREFILLING)
                if session.kv.length == 0:
                    self.device_memory.copy_prefix(session)
                if session.kv.length < session.opening_tokens:
                    if session.prefix in prefilling:
                        continue
                    prefilling.add(session.prefix)
                self._events += session.mark_prefilled()
                ready.append(session)
        return ready

    def _forward(self, steps: list[tuple[EngineSession, int]]) -> None:
        """Run one packed forward of `(session, tokens)` and accept the sampled tokens."""
        try:
            for session, _ in steps:
                if session.turn is not None:
                    session.turn.start()
            segments = [session.segment(tokens) for session, tokens in steps]
            sampled = [
                (session, session.turn)
                for (session, _), segment in zip(steps, segments, strict=True)
                if segment.sample and session.turn is not None
            ]
            logits = self.model.forward(segments)
            try:
                tokens = next_tokens(logits, [turn.sampler for _, turn in sampled])
            except Exception:
                for session, count in steps:
                    session.kv.crop(session.kv.length - count)
                raise
        except Exception as error:
            raise_if_device_lost(error, self.model.device)
            if is_out_of_memory(error):
                latest = max((session for session, _ in steps), key=lambda s: s.ticket)
                self._retry_or_reject(latest, error)
                return
            log.exception("step_failed sessions=%d", len(steps))
            for session, _ in steps:
                self._fail(session, error)
            return
        for session, _ in steps:
            with self._isolated(session):
                self._events += session.mark_prefilled()
        for (session, _), token in zip(sampled, tokens, strict=True):
            try:
                if isinstance(token, Exception):
                    raise token
                self._events += session.accept_token(token, self.model.eos_token_ids)
            except Exception as error:
                log.exception("turn_failed session=%s", session.id[:12])
                self._fail(session, error)

    def _retry_or_reject(self, session: EngineSession, error: Exception) -> None:
        """Handle an out-of-memory error that changed no session.

        The first time, offload all idle KV caches: the next step runs the same work again. The second time, reject the
        request of `session`, the most recent arrival.
        """
        if not session.short_of_memory:
            session.short_of_memory = True
            log.warning("out_of_memory offloading=all_idle error=%s", first_line(error))
            self.device_memory.relieve()
            return
        log.warning("out_of_memory rejected=%s error=%s", session.id[:12], first_line(error))
        turn_id = None if session.turn is None else session.turn.id
        with self._isolated(session):
            if session.turn is None:
                del self.sessions[session.id]
            else:
                session.roll_back_turn()
            self._events.append(
                OutOfCapacity(session.id, turn_id, session.reserved_bytes, 0, open_sessions=len(self.sessions))
            )

    def _fail(self, session: EngineSession, error: Exception, ends_opening: bool = True) -> None:
        """End the session's turn, and its opening if that is unfinished and `ends_opening` is True.

        After an `IllegalTransition` the session's state is unreliable: the session is removed.
        """
        message = f"{type(error).__name__}: {error}"
        broken = isinstance(error, IllegalTransition)
        if session.turn is not None:
            self._events.append(TurnFailed(session.turn.id, message))
            try:
                if not broken:
                    session.roll_back_turn()
            except IllegalTransition:
                log.exception("rollback_failed session=%s", session.id[:12])
                broken = True
        if broken or (ends_opening and session.state is not EngineSessionState.READY):
            self._events.append(OpenFailed(session.id, message))
            self.sessions.pop(session.id, None)

    @contextlib.contextmanager
    def _isolated(self, session: EngineSession) -> Iterator[None]:
        """Remove the session after an `IllegalTransition` in this block. Retry or reject it if memory runs out."""
        try:
            yield
        except IllegalTransition as error:
            log.exception("session_broken session=%s", session.id[:12])
            self._fail(session, error)
        except Exception as error:
            raise_if_device_lost(error, self.model.device)
            if not is_out_of_memory(error):
                raise
            self._retry_or_reject(session, error)


def _ask_problem(session: EngineSession, command: AskSession, model: Model) -> str | None:
    """Return why a turn can't start, or None if it can."""
    if session.turn is not None:
        return "the session is still answering"
    if model.media_positions(command.token_ids) and not command.pictures:
        return "a prompt without a picture must not hold image tokens"
    if len(session.token_ids) + len(command.token_ids) >= model.context_tokens:
        return f"the conversation is longer than the model's {model.context_tokens} tokens"
    return None


def _rejection(session_id: str, turn_id: str | None, error: MemoryExceeded, open_sessions: int) -> OutOfCapacity:
    return OutOfCapacity(session_id, turn_id, error.needed_bytes, error.free_bytes, open_sessions)


def _check_feature_count(session: EngineSession) -> None:
    """Raise ValueError if all pictures are encoded and do not have one feature per image token."""
    if session.encoded and session.feature_rows != len(session.image_positions):
        found = f"{session.feature_rows} features for {len(session.image_positions)} image tokens"
        raise ValueError(f"the checkpoint's processor and vision tower disagree: {found}")


def _outside(positions: list[int], spans: tuple[tuple[int, int], ...]) -> list[int]:
    """Return the positions that are in none of the `(start, end)` spans."""
    return [at for at in positions if not any(start <= at < end for start, end in spans)]
