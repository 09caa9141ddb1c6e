"""Owns the open sessions on the device and the engine's loop body: commands in, `step()`, events out.

What the handler talks to. Must not know threads, processes, TorchServe, payloads or HTTP.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from PIL import Image

from ..ipc.messages import (
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
    PreparedPicture,
    Sampling,
    StopTurn,
    Timings,
    TurnFailed,
    Usage,
)
from ..text.answer_text import AnswerText
from ..text.chat_template import ChatTemplate
from .attention import Segment
from .faults import is_out_of_memory, is_usable, release_unused
from .kv import BudgetExceeded, DeviceBudget, SessionKV, clear_device, make_room
from .model import Model
from .sampling import Sampler, next_tokens
from .scheduler import plan

log = logging.getLogger(__name__)

# A cache with less room than this will not hold its next turn: a question of some words, and an answer's beginning.
_TURN_TOKENS = 64


@dataclass
class EngineTurn:
    """A running turn. `start_tokens` and `start_pictures` are what was there before it, where a cancel goes back to."""

    id: str
    start_tokens: int
    start_pictures: int
    cached_tokens: int
    prompt_tokens: int
    max_new_tokens: int
    sampler: Sampler
    reader: AnswerText
    asked_at: float
    ends_at: float | None
    started_at: float | None = None
    first_token_at: float | None = None
    answer_ids: list[int] = field(default_factory=list)
    text: str = ""


@dataclass(eq=False)
class _Features:
    """One picture's features, `[image tokens, hidden]`; shared by all sessions that show it."""

    rows: torch.Tensor


@dataclass
class _Shown:
    """A picture in a session: its arrays until it is encoded, its features from then on."""

    picture: PreparedPicture | None
    key: str
    features: _Features | None = None


@dataclass(eq=False)
class EngineSession:
    """One open session: the ids of its conversation, its KV cache, its pictures.

    `ticket` is the arrival of what it works on, `last_used` that of its latest request. `reserved_bytes` is what its KV
    may take meanwhile: nothing while its opening waits for a place on the device. `short_of_memory`: whether that work
    was tried again already because memory ran out, or there was none to grow its cache ahead.
    """

    id: str
    token_ids: list[int]
    image_positions: list[int]
    kv: SessionKV
    shown: list[_Shown]
    ticket: int
    opened_at: float
    opening_tokens: int
    opening_bytes: int
    prefix: Hashable
    reserved_bytes: int = 0
    encode_ms: float = 0.0
    announced: bool = False
    short_of_memory: bool = False
    turn: EngineTurn | None = None

    @property
    def last_used(self) -> int:
        return self.ticket

    @property
    def active(self) -> bool:
        return self.turn is not None or not self.announced

    @property
    def waits_for_room(self) -> bool:
        return self.active and not self.reserved_bytes

    @property
    def pending_tokens(self) -> int:
        return len(self.token_ids) - self.kv.length

    @property
    def encoded(self) -> bool:
        return all(shown.features is not None for shown in self.shown)

    @property
    def unencoded_tokens(self) -> int:
        encoded = sum(len(shown.features.rows) for shown in self.shown if shown.features is not None)
        return len(self.image_positions) - encoded

    def segment(self, tokens: int) -> Segment:
        """The next `tokens` pending ones, with the rows of the features that fall among them."""
        start, end = self.kv.length, self.kv.length + tokens
        first, last = bisect_left(self.image_positions, start), bisect_left(self.image_positions, end)
        sample = self.turn is not None and end == len(self.token_ids)
        places = [at - start for at in self.image_positions[first:last]]
        return Segment(self.kv, self.token_ids[start:end], self._rows(first, last), places, sample)

    def _rows(self, first: int, last: int) -> torch.Tensor | None:
        """Rows `first` to `last` of all features laid end to end; None when there are none."""
        parts, offset = [], 0
        for shown in self.shown:
            rows = shown.features.rows
            part = rows[max(first - offset, 0) : max(last - offset, 0)]
            offset += len(rows)
            if len(part):
                parts.append(part)
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Engine:
    """Holds many picture chats on one device and answers them in packed steps.

    Single-threaded: one caller applies commands and calls `step()` while `has_work`.
    """

    def __init__(
        self,
        model: Model,
        reader: Callable[[tuple[str, ...]], AnswerText],
        budget: DeviceBudget,
        prefill_chunk_tokens: int = 256,
    ) -> None:
        """`reader` makes the text reader of one answer from its stop strings."""
        self.model = model
        self._reader = reader
        self.budget = budget
        self._chunk_tokens = prefill_chunk_tokens
        self._sessions: dict[str, EngineSession] = {}
        self._turns: dict[str, EngineSession] = {}
        # A picture's features live exactly as long as a session that shows it.
        self._features: WeakValueDictionary[str, _Features] = WeakValueDictionary()
        self._tickets = 0
        self._events: list[Event] = []

    def warm_up(self, tokens: ChatTemplate) -> int:
        """Run one short chat, so that the first user pays no start-up cost and a broken checkpoint is found at once.

        Returns the device bytes that the work itself took at its peak (0 on CPU). Raises RuntimeError when it does not
        answer.
        """
        self.model.peak_bytes()
        held = self.model.allocated_bytes()
        # Where the work's peak is measured, it is the largest picture's; elsewhere that would only cost time.
        size = self.model.largest_picture if self.model.device.type == "cuda" else (64, 64)
        opening = tokens.opening([("warm-up", Image.new("RGB", size))])
        prompt_ids = tokens.prompt(opening.opened_on, "What is this?")
        self.open(OpenSession("warm-up", opening.token_ids, opening.pictures))
        self.ask(AskSession("warm-up", "warm-up", prompt_ids, Sampling(max_new_tokens=4)))
        events = []
        while self.has_work:
            events += self.step()
        self.close("warm-up")
        self.step()
        if not any(isinstance(event, Finished) for event in events):
            raise RuntimeError(f"the checkpoint does not answer a first question: {events}")
        return self.model.peak_bytes() - held

    @property
    def has_work(self) -> bool:
        """Whether `step()` would do or tell anything."""
        return bool(self._events) or any(s.active for s in self._sessions.values()) or self._cramped() is not None

    def memory(self) -> Memory:
        """What the open sessions hold now."""
        caches = [session.kv for session in self._sessions.values()]
        tiers = Counter(kv.tier for kv in caches)
        return Memory(
            resident=tiers["resident"],
            parked=tiers["parked"],
            cold=tiers["cold"],
            features_bytes=self._features_bytes(),
            kv_bytes=sum(kv.device_bytes for kv in caches),
            parked_bytes=sum(kv.host_bytes for kv in caches),
            allocated_bytes=self.model.allocated_bytes(),
        )

    def _features_bytes(self) -> int:
        return sum(features.rows.nbytes for features in self._features.values())

    def apply(self, command: Command) -> None:
        """Take one command. What comes of it is told by the events of the following steps, an error too."""
        try:
            self._do(command)
        except Exception as error:
            self._contain(error)
            log.exception("command_failed command=%s", type(command).__name__)
            message = f"{type(error).__name__}: {error}"
            if isinstance(command, AskSession) and is_out_of_memory(error):
                needed = self._sessions[command.session_id].kv.host_bytes
                self._events.append(OutOfCapacity(command.session_id, command.turn_id, needed, 0, len(self._sessions)))
            elif isinstance(command, OpenSession):
                self._events.append(OpenFailed(command.session_id, message))
            elif isinstance(command, AskSession):
                self._events.append(TurnFailed(command.turn_id, message))

    def _do(self, command: Command) -> None:
        match command:
            case OpenSession():
                self.open(command)
            case AskSession():
                self.ask(command)
            case StopTurn():
                self.stop(command.turn_id, command.reason, command.keep_answer)
            case CloseSession():
                self.close(command.session_id)

    def open(self, command: OpenSession) -> None:
        """Hold a new session, if there is room; its pictures are encoded and its ids prefilled by the next steps."""
        if command.session_id in self._sessions:
            raise ValueError("the session is open already")
        session = EngineSession(
            id=command.session_id,
            token_ids=list(command.token_ids),
            image_positions=_outside(self._image_positions(command.token_ids), command.answer_spans),
            kv=SessionKV(self.model.kv_shape),
            shown=[_Shown(picture, picture.key) for picture in command.pictures],
            ticket=self._ticket(),
            opened_at=time.perf_counter(),
            opening_tokens=len(command.token_ids),
            opening_bytes=self.model.kv_shape.device_bytes(len(command.token_ids)),
            prefix=(tuple(command.token_ids), tuple(picture.key for picture in command.pictures)),
        )
        if self._admit(session, None, session.opening_bytes, command.token_ids, command.pictures):
            self._sessions[session.id] = session
            self._events.append(Admitted(session.id))

    def ask(self, command: AskSession) -> None:
        """Start a turn, if there is room; `token_ids` and `pictures` are appended to the session's."""
        session = self._sessions.get(command.session_id)
        problem = self._unfit(session, command)
        if problem:
            self._events.append(TurnFailed(command.turn_id, problem))
            return
        sampling, start = command.sampling, len(session.token_ids)
        prompt_tokens = start + len(command.token_ids)
        max_new_tokens = min(sampling.max_new_tokens, self.model.context_tokens - prompt_tokens)
        reserved = self.model.kv_shape.device_bytes(prompt_tokens + max_new_tokens)
        reserved = max(reserved, session.kv.device_bytes)  # a cache that was grown ahead is held whole
        if not self._admit(session, command.turn_id, reserved, command.token_ids, command.pictures):
            return
        self._restore(session)
        # Whatever can fail comes before the session is touched.
        now, deadline_ms = time.perf_counter(), sampling.deadline_ms
        turn = EngineTurn(
            id=command.turn_id,
            start_tokens=start,
            start_pictures=len(session.shown),
            cached_tokens=session.kv.length,
            prompt_tokens=prompt_tokens,
            max_new_tokens=max_new_tokens,
            sampler=Sampler(sampling),
            reader=self._reader(sampling.stop),
            asked_at=now,
            ends_at=None if deadline_ms is None else now + deadline_ms / 1e3,
        )
        session.turn, session.ticket, session.reserved_bytes = turn, self._ticket(), reserved
        session.short_of_memory = False
        session.image_positions += self._image_positions(command.token_ids, start)
        session.token_ids += command.token_ids
        session.shown += [_Shown(picture, picture.key) for picture in command.pictures]
        self._turns[turn.id] = session

    def _restore(self, session: EngineSession) -> None:
        """Bring a parked cache back to the device; where that has no memory for it, idle caches leave first."""
        try:
            session.kv.restore()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            clear_device(self.budget, self._sessions.values())
            release_unused(self.model.device)
            session.kv.restore()

    def _unfit(self, session: EngineSession | None, command: AskSession) -> str | None:
        if session is None:
            return "the session is not open in the engine"
        if session.turn is not None:
            return "the session is still answering"
        if self._image_positions(command.token_ids) and not command.pictures:
            return "a prompt without a picture must not hold image tokens"
        if len(session.token_ids) + len(command.token_ids) >= self.model.context_tokens:
            return f"the conversation is longer than the model's {self.model.context_tokens} tokens"
        return None

    def _admit(
        self,
        session: EngineSession,
        turn_id: str | None,
        kv_bytes: int,
        token_ids: list[int],
        pictures: tuple[PreparedPicture, ...],
    ) -> bool:
        """Make room for what the session will hold at most, or tell that there is none, before any work.

        Openings that wait for room hold none yet, so that many may wait beside each other; but what stays for good, the
        features, leaves room for the largest of them.
        """
        known = all(picture.key in self._features for picture in pictures)
        features = 0 if known else len(self._image_positions(token_ids)) * self.model.feature_bytes
        held = self._features_bytes() + self._coming_features_bytes()
        waiting = max((s.opening_bytes for s in self._sessions.values() if s.waits_for_room), default=0)
        try:
            if features and held + features + waiting > self.budget.device_bytes:
                raise BudgetExceeded(features + waiting, max(self.budget.device_bytes - held, 0))
            make_room(self.budget, self._sessions.values(), held, kv_bytes + features, wanted=session)
        except BudgetExceeded as error:
            figures = (error.needed_bytes, error.free_bytes, len(self._sessions))
            self._events.append(OutOfCapacity(session.id, turn_id, *figures))
            return False
        return True

    def _coming_features_bytes(self) -> int:
        """Of pictures that were admitted but are not encoded yet."""
        coming = sum(s.unencoded_tokens for s in self._sessions.values() if not s.encoded)
        return coming * self.model.feature_bytes

    def _image_positions(self, token_ids: list[int], start: int = 0) -> list[int]:
        media = self.model.media_token_ids
        return [start + at for at, token in enumerate(token_ids) if token in media]

    def stop(self, turn_id: str, reason: str, keep_answer: bool) -> None:
        """End a running turn; a turn that has ended already is left alone.

        With `keep_answer` the turn finishes with its tokens. Otherwise, or if it has none, the session is rolled back.
        """
        session = self._turns.get(turn_id)
        if session is None:
            return
        turn = session.turn
        if keep_answer and turn.answer_ids:
            self._tell_text(turn, turn.reader.finish())
            self._finish(session, turn, reason)
        else:
            self._roll_back(session)
            self._events.append(Cancelled(turn_id, reason))

    def close(self, session_id: str) -> None:
        """Free a session, whatever it is doing."""
        session = self._sessions.get(session_id)
        if session is not None:
            if session.turn is not None:
                self.stop(session.turn.id, "cancelled", keep_answer=False)
            del self._sessions[session_id]
        self._events.append(Closed(session_id))

    def step(self) -> list[Event]:
        """Encode one waiting picture, run one packed forward, sample, and tell what happened since the last step."""
        self._end_overdue()
        self._encode_next()
        steps = plan(self._ready(), self._chunk_tokens)
        if steps:
            self._forward(steps)
        elif not any(s.active for s in self._sessions.values()):
            self._grow_next()
        events, self._events = self._events, []
        return events

    def _end_overdue(self) -> None:
        """End the turns whose time is up: with what they have, or as if they had not been."""
        now = time.perf_counter()
        for session in list(self._turns.values()):
            turn = session.turn
            if turn.ends_at is not None and now >= turn.ends_at:
                self.stop(turn.id, "deadline", keep_answer=True)

    def _encode_next(self) -> None:
        """Encode the picture that has waited longest; one that another session shows already costs nothing."""
        waiting = sorted((s for s in self._sessions.values() if not s.encoded), key=lambda s: s.ticket)
        for session in waiting:
            for shown in session.shown:
                shown.features = shown.features or self._features.get(shown.key)
                if shown.features is not None:
                    shown.picture = None
            if not session.encoded:
                self._encode(session)
                return

    def _encode(self, session: EngineSession) -> None:
        index, shown = next((at, shown) for at, shown in enumerate(session.shown) if shown.features is None)
        of_turn = session.turn is not None and index >= session.turn.start_pictures
        began = time.perf_counter()
        try:
            shown.features = _Features(self.model.encode(shown.picture))
            if session.encoded:
                self._check_features(session)
        except Exception as error:
            self._contain(error)
            if is_out_of_memory(error):
                self._make_do(session, error)
                return
            log.exception("encode_failed session=%s", session.id[:12])
            self._fail(session, error, opening=not of_turn)
            return
        shown.picture = None
        self._features[shown.key] = shown.features
        session.encode_ms += _ms(began)

    def _check_features(self, session: EngineSession) -> None:
        rows = sum(len(shown.features.rows) for shown in session.shown)
        if rows != len(session.image_positions):
            found = f"{rows} features for {len(session.image_positions)} image tokens"
            raise ValueError(f"the checkpoint's processor and vision tower disagree: {found}")

    def _ready(self) -> list[EngineSession]:
        """The sessions whose tokens can run, in order of arrival.

        A prompt that another session has prefilled already is copied from there; one that another is prefilling right
        now is waited for. An opening waits for room behind those that came before it.
        """
        ready: list[EngineSession] = []
        prefilling: set[Hashable] = set()
        is_full = False
        for session in sorted((s for s in self._sessions.values() if s.active), key=lambda s: s.ticket):
            if not session.encoded:
                continue
            if session.waits_for_room:
                is_full = is_full or not self._place(session)
                if is_full:
                    continue
            if session.kv.length == 0:
                self._fork(session)
            if session.kv.length < session.opening_tokens:
                if session.prefix in prefilling:
                    continue
                prefilling.add(session.prefix)
            ready.append(session)
            self._announce(session)
        return ready

    def _place(self, session: EngineSession) -> bool:
        """Make room for the KV of an opening; False where running turns leave too little now."""
        held = self._features_bytes() + self._coming_features_bytes()
        try:
            make_room(self.budget, self._sessions.values(), held, session.opening_bytes, wanted=session)
        except BudgetExceeded:
            return False
        session.reserved_bytes = session.opening_bytes
        return True

    def _fork(self, session: EngineSession) -> None:
        tokens = session.opening_tokens
        for donor in self._sessions.values():
            if donor.prefix == session.prefix and donor.kv.length >= tokens:
                try:
                    session.kv.fork(donor.kv, tokens)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    log.warning("fork_failed error=%s", _first_line(error))  # its own prefill comes instead
                return

    def _cramped(self) -> EngineSession | None:
        """The session, of those whose next turn would outgrow their cache, that has waited longest to have it grown.

        On a CPU only: there it takes as long as the first token, mostly for page faults, on a GPU next to nothing. None
        has to leave the device for it.
        """
        if self.model.device.type != "cpu":
            return None
        waiting = (s for s in self._sessions.values() if not s.short_of_memory and self._is_cramped(s))
        session = min(waiting, key=lambda s: s.ticket, default=None)
        if session is None:
            return None
        held = self._features_bytes() + sum(s.kv.device_bytes for s in self._sessions.values())
        return session if held + self.model.kv_shape.device_bytes(1) <= self.budget.device_bytes else None

    def _is_cramped(self, session: EngineSession) -> bool:
        kv = session.kv
        return kv.tier == "resident" and kv.capacity < min(kv.length + _TURN_TOKENS, self.model.context_tokens)

    def _grow_next(self) -> None:
        """While nobody waits: give a cache the room that its next turn's first token would have to wait for."""
        session = self._cramped()
        if session is None:
            return
        try:
            session.kv.reserve(session.kv.capacity + 1)
        except Exception as error:
            self._contain(error)
            session.short_of_memory = True  # not again before its next turn, which tries by itself
            log.warning("growing_failed error=%s", _first_line(error))

    def _forward(self, steps: list[tuple[EngineSession, int]]) -> None:
        now = time.perf_counter()
        for session, _ in steps:
            if session.turn is not None and session.turn.started_at is None:
                session.turn.started_at = now
        try:
            segments = [session.segment(tokens) for session, tokens in steps]
            sampled = [session for (session, _), segment in zip(steps, segments, strict=True) if segment.sample]
            logits = self.model.forward(segments)
            tokens = next_tokens(logits, [session.turn.sampler for session in sampled])
        except Exception as error:
            self._contain(error)
            if is_out_of_memory(error):
                self._make_do(max((session for session, _ in steps), key=lambda s: s.ticket), error)
                return
            log.exception("step_failed sessions=%d", len(steps))
            for session, _ in steps:
                self._fail(session, error)
            return
        for session, token in zip(sampled, tokens, strict=True):
            try:
                if isinstance(token, Exception):
                    raise token
                self._advance(session, session.turn, token)
            except Exception as error:
                log.exception("turn_failed session=%s", session.id[:12])
                self._fail(session, error)
        for session, _ in steps:
            self._announce(session)

    def _announce(self, session: EngineSession) -> None:
        """Tell once that the prompt up to the picture is in the cache."""
        if not session.announced and session.kv.length >= session.opening_tokens:
            session.announced = True
            self._events.append(Prefilled(session.id, session.encode_ms, _ms(session.opened_at)))

    def _advance(self, session: EngineSession, turn: EngineTurn, token: int) -> None:
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
        self._tell_text(turn, text)
        if reason is not None:
            self._finish(session, turn, reason)

    def _tell_text(self, turn: EngineTurn, text: str) -> None:
        if text:
            turn.text += text
            self._events.append(Delta(turn.id, text))

    def _finish(self, session: EngineSession, turn: EngineTurn, reason: str) -> None:
        session.turn = None
        del self._turns[turn.id]
        # The template writes the end-of-sequence token itself where a conversation has one.
        kept = session.token_ids[turn.prompt_tokens :]
        usage = Usage(turn.prompt_tokens, turn.cached_tokens, len(turn.answer_ids))
        queue_ms = (turn.started_at - turn.asked_at) * 1e3
        ttft_ms = (turn.first_token_at - turn.asked_at) * 1e3
        timings = Timings(queue_ms, ttft_ms, _ms(turn.asked_at))
        self._events.append(Finished(turn.id, reason, turn.text, turn.answer_ids, kept, usage, timings))

    def _contain(self, error: Exception) -> None:
        """Raise an error after which the device computes nothing any more; others stay with those whom they concern."""
        if not is_usable(self.model.device):
            raise error

    def _make_do(self, session: EngineSession, error: Exception) -> None:
        """The device ran out of memory, and nothing was lost by it. Move all idle caches away, for the next step to
        try again; where that was tried already, refuse what `session`, the last that came, wants.
        """
        if not session.short_of_memory:
            session.short_of_memory = True
            log.warning("out_of_memory parking=all_idle error=%s", _first_line(error))
            clear_device(self.budget, self._sessions.values())
            release_unused(self.model.device)
            return
        log.warning("out_of_memory refused=%s error=%s", session.id[:12], _first_line(error))
        turn_id = None if session.turn is None else session.turn.id
        if turn_id is None:
            del self._sessions[session.id]
        else:
            self._roll_back(session)
        self._events.append(OutOfCapacity(session.id, turn_id, session.reserved_bytes, 0, len(self._sessions)))

    def _fail(self, session: EngineSession, error: Exception, opening: bool = True) -> None:
        """End what the session was doing: its turn, or its opening. `opening` False: an unfinished one goes on."""
        message = f"{type(error).__name__}: {error}"
        if session.turn is not None:
            self._events.append(TurnFailed(session.turn.id, message))
            self._roll_back(session)
        if opening and not session.announced:
            self._events.append(OpenFailed(session.id, message))
            del self._sessions[session.id]

    def _roll_back(self, session: EngineSession) -> None:
        turn, session.turn = session.turn, None
        del self._turns[turn.id]
        del session.token_ids[turn.start_tokens :]
        del session.shown[turn.start_pictures :]
        del session.image_positions[bisect_left(session.image_positions, turn.start_tokens) :]
        session.kv.crop(turn.start_tokens)

    def _ticket(self) -> int:
        self._tickets += 1
        return self._tickets


def _outside(positions: list[int], spans: tuple[tuple[int, int], ...]) -> list[int]:
    return [at for at in positions if not any(start <= at < end for start, end in spans)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _ms(since: float) -> float:
    return (time.perf_counter() - since) * 1e3
