"""The engine: applies commands to its sessions and answers them in packed steps.

A step encodes one picture, on a GPU several, and runs one forward over new tokens of all sessions with work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from ..ipc.messages import (
    AskSession,
    Cancelled,
    Closed,
    CloseSession,
    Command,
    Described,
    DescribeSession,
    Event,
    Memory,
    OpenFailed,
    OpenSession,
    Residence,
    StopTurn,
    TurnFailed,
)
from ..text.answer_text import AnswerText
from .admission import Admission
from .ahead import WorkAhead
from .budget import DeviceBudget
from .content import FeatureStore
from .decode_graphs import Predictions
from .device import synchronize
from .encoding import PictureEncoder
from .failures import Failures
from .faults import is_out_of_memory, raise_if_device_lost
from .memory import DeviceMemory, MemoryExceeded
from .model import Model
from .prefixes import copy_opening
from .sampling import Ban, next_tokens
from .scheduler import DEFAULT_CHUNK_TOKENS, PieceSize, plan
from .session import (
    EngineSession,
    EngineSessionState,
    EngineTurn,
    awaits_first_token,
    has_opening,
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
        prefill_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> None:
        """`answer_text` makes the detokenizer of one answer from its stop strings.

        `prefill_chunk_tokens`: most prompt tokens of one step with running answers, over all sessions.
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
        self._ahead = WorkAhead(
            self.device_memory,
            sessions=self.sessions,
            kv_shape=model.kv_shape,
            context_tokens=model.context_tokens,
        )
        self._admission = Admission(
            model,
            answer_text,
            sessions=self.sessions,
            features=self._features,
            device_memory=self.device_memory,
        )
        # Public, so that the process can set it to what it measured at the start.
        self.piece_size = PieceSize(prefill_chunk_tokens, on_gpu=model.device.type == "cuda")
        self._events: list[Event] = []
        self._failures = Failures(sessions=self.sessions, device_memory=self.device_memory, events=self._events)
        # Public, so that tests can run batches of pictures on a CPU.
        self.encoder = PictureEncoder(
            model,
            sessions=self.sessions,
            features=self._features,
            device_memory=self.device_memory,
            failures=self._failures,
        )
        # The text of a step's tokens is computed during the next forward. On a CPU, which computes the forward itself,
        # this would only delay the text. Tests set it to True to run the GPU's way on a CPU.
        self.defers_text = model.device.type == "cuda"

    @property
    def has_work(self) -> bool:
        """Whether `step` would do any work or return an event."""
        has_work = any(session.has_work for session in self.sessions.values())
        return bool(self._events) or has_work or self._ahead.is_due

    def memory(self) -> Memory:
        """Return what the open sessions hold now."""
        return self.device_memory.usage(self.model.allocated_bytes())

    def apply(self, command: Command, arrived_at: float | None = None) -> None:
        """Apply one command. Its results, including errors, are events of the following steps.

        `arrived_at`: its arrival in seconds of `time.perf_counter`; None for now.
        """
        arrived_at = time.perf_counter() if arrived_at is None else arrived_at
        try:
            match command:
                case OpenSession():
                    self._events += self._admission.open(command, arrived_at)
                case AskSession():
                    self._events += self._admission.ask(command, arrived_at)
                case StopTurn():
                    self._stop(command.turn_id, command.reason, command.keep_answer)
                case CloseSession():
                    self._close(command.session_id)
                case DescribeSession():
                    session = self.sessions.get(command.session_id)
                    residence = Residence() if session is None else session.residence
                    self._events.append(Described(command.session_id, command.request_id, residence))
        except Exception as error:
            raise_if_device_lost(error, self.model.device)
            log.exception("command_failed command=%s", type(command).__name__)
            message = f"{type(error).__name__}: {error}"
            if isinstance(command, OpenSession):
                self._events.append(OpenFailed(command.session_id, message))
            elif isinstance(command, AskSession):
                self._events.append(TurnFailed(command.turn_id, message))

    def _stop(self, turn_id: str, reason: str, keep_answer: bool) -> None:
        """End a running turn early, see `StopTurn`. Does nothing if the turn has ended."""
        for session in list(self.sessions.values()):
            if session.turn is not None and session.turn.id == turn_id:
                with self._failures.isolated(session):
                    self._events += session.turn.detokenize()
                    self._events += session.stop_turn(reason, keep_answer)

    def _close(self, session_id: str) -> None:
        """Free a session in any state. `Closed` follows in any case, also for an unknown session."""
        session = self.sessions.pop(session_id, None)
        if session is not None:
            session.kv.drop()
        if session is not None and session.turn is not None:
            turn = session.turn
            self._events += turn.detokenize()
            self._events.append(Cancelled(turn.id, usage=turn.usage, timings=turn.timings))
        self._events.append(Closed(session_id))

    def step(self) -> list[Event]:
        """Run one step; return all events since the last one."""
        return [event for events in self.phases() for event in events]

    def phases(self) -> Iterator[list[Event]]:
        """Run one step: admit what waits, encode pictures, run one packed forward and sample.

        Yields the new events before each long part and at the end, so that they can be reported at once. On CUDA the
        text of the previous step's tokens is computed and reported while the device runs the forward. Finally, if no
        session waits for a first token, KV memory is prepared for later turns.
        """
        now = time.perf_counter()
        for session in list(self.sessions.values()):
            if session.turn is not None and session.turn.is_overdue(now):
                self._stop(session.turn.id, "deadline", keep_answer=True)
        self._admit_waiting()
        yield _taken(self._events)
        if self.encoder.encode_next():
            self._detokenize()
        steps = plan(self._ready(), self.piece_size.chunk_tokens, self.piece_size.tokens)
        yield _taken(self._events)
        began = time.perf_counter()
        launched = self._launch(steps) if steps else None
        self._detokenize()
        if launched is not None:
            if self._events and self.defers_text:
                yield _taken(self._events)
            self._sample(launched)
            self.piece_size.note(sum(tokens for _, tokens in steps), time.perf_counter() - began)
        yield _taken(self._events)
        if not any(map(awaits_first_token, self.sessions.values())):
            self._ahead.run(is_idle=not any(session.has_work for session in self.sessions.values()))

    def _admit_waiting(self) -> None:
        """Reserve memory for waiting openings and turns in order of arrival, until one of them has to wait."""
        for waiting in self._admission.waiting():
            try:
                if not self._admission.place(waiting):
                    return
            except MemoryExceeded as error:
                self._events += self._admission.reject(waiting, error)
            except Exception as error:
                raise_if_device_lost(error, self.model.device)
                if is_out_of_memory(error):
                    self._failures.retry_or_reject(waiting.session, error)
                    return
                log.exception("admission_failed session=%s", waiting.session.id[:12])
                self._failures.fail(waiting.session, error, ends_opening=waiting.turn is None)

    def _ready(self) -> list[EngineSession]:
        """Return the sessions whose tokens can run in this step, in order of arrival.

        Sessions with the same opening prefill it once: the first one runs, the others wait and copy its KV.
        """
        ready: list[EngineSession] = []
        prefilling: set[Hashable] = set()
        for session in sorted((s for s in self.sessions.values() if s.active), key=lambda s: s.ticket):
            if not session.encoded:
                continue
            if has_opening(session):
                ready.append(session)
                continue
            with self._failures.isolated(session):
                if session.kv.length == 0:
                    copy_opening(session, self.sessions.values())
                if session.kv.length < session.opening_tokens:
                    if session.kv.length == 0 and session.prefix in prefilling:
                        continue
                    prefilling.add(session.prefix)
                self._events += session.mark_prefilled()
                ready.append(session)
        return ready

    def _launch(self, steps: list[tuple[EngineSession, int]]) -> _Launched | None:
        """Run one packed forward of `(session, tokens)`. On CUDA the work is only launched. None after an error."""
        stored = [session.kv.length for session, _ in steps]
        try:
            for session, _ in steps:
                if session.turn is not None:
                    session.turn.start(session.kv.length)
            segments = [session.segment(tokens) for session, tokens in steps]
            predictions = self.model.forward(segments)
        except Exception as error:
            self._fail_step(steps, error)
            return None
        sampled = [
            (session, session.turn)
            for (session, _), segment in zip(steps, segments, strict=True)
            if segment.sample and session.turn is not None
        ]
        return _Launched(steps, stored, sampled, predictions)

    def _sample(self, launched: _Launched) -> None:
        """Wait for the forward and accept the sampled tokens of turns that have not failed since."""
        turns = [turn for _, turn in launched.sampled]
        try:
            if turns:
                ban = _ban(turns, self.model.eos_token_ids)
                logits, likeliest = launched.predictions
                tokens = next_tokens(logits, [turn.sampler for turn in turns], ban, likeliest)
            else:
                synchronize(self.model.device)  # the end of a prefill is reported when it has ended
                tokens = []
        except Exception as error:
            for (session, _), length in zip(launched.steps, launched.stored, strict=True):
                session.kv.crop(length)
            self._fail_step(launched.steps, error)
            return
        for session, _ in launched.steps:
            if session.state is EngineSessionState.PREFILLING:
                with self._failures.isolated(session):
                    self._events += session.mark_prefilled()
        for (session, turn), token in zip(launched.sampled, tokens, strict=True):
            if session.turn is not turn:
                continue
            try:
                if isinstance(token, Exception):
                    raise token
                self._events += session.accept_token(token, self.model.eos_token_ids, self.defers_text)
            except Exception as error:
                log.exception("turn_failed session=%s", session.id[:12])
                self._failures.fail(session, error)

    def _detokenize(self) -> None:
        """Report the text of the previous step's tokens."""
        for session in list(self.sessions.values()):
            if session.turn is None or not session.turn.undecoded_ids:
                continue
            try:
                self._events += session.turn.detokenize()
            except Exception as error:
                log.exception("turn_failed session=%s", session.id[:12])
                self._failures.fail(session, error)

    def _fail_step(self, steps: list[tuple[EngineSession, int]], error: Exception) -> None:
        """Handle an error of a forward, or of its sampling, that changed no session."""
        raise_if_device_lost(error, self.model.device)
        sessions = [session for session, _ in steps if session.has_work]
        if is_out_of_memory(error):
            self.piece_size.shrink()
            if sessions:
                self._failures.retry_or_reject(max(sessions, key=lambda s: s.ticket), error)
            return
        log.exception("step_failed sessions=%d", len(steps))
        for session in sessions:
            self._failures.fail(session, error)


@dataclass(frozen=True)
class _Launched:
    """A forward of `(session, tokens)` whose result may not be computed yet.

    `stored`: tokens in each cache before it. `sampled`: the turns that get a token, one for each row of `predictions`.
    """

    steps: list[tuple[EngineSession, int]]
    stored: list[int]
    sampled: list[tuple[EngineSession, EngineTurn]]
    predictions: Predictions


def _ban(turns: list[EngineTurn], eos_token_ids: frozenset[int]) -> Ban | None:
    """Return the ban of end-of-sequence tokens in the rows of turns that need more tokens, if there are such."""
    rows = [row for row, turn in enumerate(turns) if len(turn.answer_ids) < turn.min_tokens]
    return Ban(rows, eos_token_ids) if rows else None


def _taken(events: list[Event]) -> list[Event]:
    """Return the events and empty the list."""
    taken = list(events)
    events.clear()
    return taken
