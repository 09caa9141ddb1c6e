"""Lives of sessions on two instances of a worker that share a journal, and a record of what each client may expect.

Pump, manager, preparation and journal are the real ones. The engine is fake, the store is in memory, and time, threads
and the engine advance only when an operation says so. A life is a list of operations; it fails with `Broken`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import logging
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path

from PIL import Image

from llava_sessions.config import MediaLimits, RequestLimits
from llava_sessions.errors import STATUS_OF_CODE
from llava_sessions.ipc.messages import Command, OpenFailed, OutOfCapacity, Report, TurnFailed
from llava_sessions.journal.journal import Journal
from llava_sessions.protocol.constants import CLOSED_SESSION_HEADER, NEW_SESSION, SESSION_HEADER
from llava_sessions.text.chat_template import ChatTemplate, OpenedOn
from llava_sessions.text.pictures import NOTHING, Prepared
from llava_sessions.text.processors import load_processor
from llava_sessions.torchserve.batch import Reply, Row
from llava_sessions.torchserve.sequences import RETURN_S
from llava_sessions.worker.assembly import Timing, make_pump
from llava_sessions.worker.engine_set import EngineSet
from llava_sessions.worker.engines import EngineLost, EngineUp, FromEngine
from llava_sessions.worker.inbox import Inbox
from llava_sessions.worker.pending import LARGE_BYTES
from llava_sessions.worker.pump import SILENCE_S, SILENT_SWEEPS
from llava_sessions.worker.sessions import GRACE_S, MAX_ENGINE_LOSSES, SessionTable
from tests.support.fake_engine import END_TOKEN, FakeEngine, answer_of, text_of
from tests.support.manual import ManualExecutor, MemoryStore
from tests.support.tiny_families import make_internvl

START_S = 1_800_000_000.0
TTL_S = 500.0
MAX_SESSIONS = 4
MAX_NEW_TOKENS = 4
PREFILL_STEPS = 3
TURNS_AT_ONCE = 2
PROMPTS = ("Which shapes?", "How many?", "Where is it?")
COLOURS = ("red", "blue")
CLIP = "red blue"  # a clip of two frames
CONTEXT_TOKENS = 4096
DEADLINE_S = RequestLimits().default_deadline_ms / 1e3
# Rounds in which everything is done that waits. No request may need more.
ROUNDS = 60
INSTANCES = 2


class Broken(AssertionError):
    """Something that must hold does not."""


@cache
def template() -> ChatTemplate:
    """The chat template of a tiny InternVL3, which takes pictures and clips in any order."""
    with tempfile.TemporaryDirectory() as folder:
        return ChatTemplate(load_processor(make_internvl(Path(folder))))


@cache
def png(colour: str) -> str:
    """A tiny picture, in base64."""
    held = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()


def _no_fetch(url: str, limits: MediaLimits) -> bytes:
    raise AssertionError("nothing here is remote")


def shown(colour: str) -> dict[str, object]:
    """The fields of a request that shows a picture of a colour, or a clip of one frame for each of several."""
    return {"image": png(colour)} if colour != CLIP else {"video": [png(one) for one in CLIP.split()]}


@cache
def _key(colour: str) -> str:
    keys = [hashlib.sha256(base64.b64decode(png(one))).hexdigest() for one in colour.split()]
    return keys[0] if colour != CLIP else hashlib.sha256(" ".join(keys).encode()).hexdigest()


@cache
def _prepared(colour: str) -> Prepared:
    pictures = [Image.new("RGB", (8, 8), one) for one in colour.split()]
    if colour == CLIP:
        return template().prepare_clip(_key(colour), pictures)
    return template().prepare([(_key(colour), pictures[0])])


@cache
def _opening_ids(colour: str) -> tuple[int, ...]:
    return tuple(template().opening_on(_prepared(colour), _kind(colour)).token_ids)


@cache
def _prompt_ids(prompt: str, opened_on: str | None, colour: str | None) -> tuple[int, ...]:
    first = OpenedOn(_kind(opened_on), 1) if opened_on else None
    return tuple(template().prompt(first, prompt, _prepared(colour) if colour else NOTHING))


def _kind(colour: str) -> str:
    return "video" if colour == CLIP else "image"


@dataclass(frozen=True)
class Question:
    """What a client asks. Two questions with the same `request_id` are retries of each other.

    `colour`: of the picture that it shows, or `CLIP`.
    """

    prompt: str
    request_id: str | None
    colour: str | None


@dataclass(frozen=True)
class Turn:
    """A finished turn. `made` are all tokens of the answer."""

    question: Question
    made: tuple[int, ...]
    is_durable: bool = False


@dataclass(frozen=True)
class Conversation:
    """A picture or a clip, and the finished turns."""

    colour: str
    turns: tuple[Turn, ...] = ()

    def stored(self, question: Question) -> Turn | None:
        """The latest turn of which the question is a retry."""
        same = (turn for turn in reversed(self.turns) if turn.question == question)
        return next(same, None) if question.request_id is not None else None

    def answer(self, question: Question) -> tuple[int, ...]:
        """The whole answer to a new question."""
        ids: list[int] = list(_opening_ids(self.colour))
        keys = [_key(self.colour)]
        for number, turn in enumerate(self.turns):
            ids += _prompt_ids(turn.question.prompt, None if number else self.colour, turn.question.colour)
            ids += [token for token in turn.made if token != END_TOKEN]
            keys += [_key(turn.question.colour)] if turn.question.colour else []
        ids += _prompt_ids(question.prompt, None if self.turns else self.colour, question.colour)
        keys += [_key(question.colour)] if question.colour else []
        return tuple(answer_of(ids, keys, MAX_NEW_TOKENS))

    def with_turn(self, turn: Turn) -> Conversation:
        """The conversation with one more turn."""
        return replace(self, turns=(*self.turns, turn))

    def with_durable(self, question: Question) -> Conversation:
        """The conversation, all of whose turns up to a stored answer are durable."""
        last = max(number for number, turn in enumerate(self.turns) if turn.question == question)
        marked = (replace(turn, is_durable=True) for turn in self.turns[: last + 1])
        return replace(self, turns=(*marked, *self.turns[last + 1 :]))

    def prefixes(self) -> Iterator[Conversation]:
        """What a journal may hold: at least all durable turns."""
        least = max((number + 1 for number, turn in enumerate(self.turns) if turn.is_durable), default=0)
        return (replace(self, turns=self.turns[:length]) for length in range(least, len(self.turns) + 1))


@dataclass(eq=False)
class Chat:
    """An acknowledged session, as its client knows it.

    `possible`: the conversations that the server may hold; several after a client left during a turn. `is_ended`: no
    request may succeed any more; None: that is not known. `ended_at`: the instance that ended it. `claimed`: another
    instance may have taken it over. `heirs`: sessions that may continue it, of resumes without a reply. `stops`:
    cancels and closes so far. `moves`: another instance was asked for it, so it may be there. `is_split`: it moved, and
    its former instance could not read the journal and went on.
    """

    session_id: str
    home: int
    possible: set[Conversation]
    expires_at_s: float
    is_durable: bool
    is_ended: bool | None = False
    ended_at: int | None = None
    claimed: bool = False
    resumes: int = 0
    heirs: list[tuple[int, str]] = field(default_factory=list)
    stops: int = 0
    resumed_durably: bool = False
    moves: bool = False
    is_split: bool = False
    was_restarted: bool = False

    def note_moves(self) -> None:
        """Only durable turns are certainly on another instance."""
        if self.moves or self.claimed:
            self.possible = {shorter for whole in self.possible for shorter in whole.prefixes()}

    def survive_restart(self, store_has_failed: bool) -> None:
        """Only durable turns are certainly still there. The mark of a turn that ran is valid for some time."""
        self.was_restarted = True
        self.possible = {shorter for whole in self.possible for shorter in whole.prefixes()}
        if self.is_ended is False and not self.is_durable:
            self.is_ended = None
        if self.is_ended and (store_has_failed or self.claimed):
            self.is_ended = None  # its removal may have failed, or was left to the instance that claimed it


@dataclass(eq=False)
class Request:
    """A row, and what has been received for it."""

    row: Row
    kind: str
    chat: Chat | None = None
    question: Question | None = None
    colour: str | None = None
    key: str | None = None
    is_stream: bool = False
    is_large: bool = False
    began_ended: bool = False
    was_seen: bool = False
    was_dropped: bool = False
    is_counted_out: bool = False
    stops: int = 0
    sent_s: float = 0.0
    head: Reply | None = None
    last: Reply | None = None
    text: str = ""


class _Errors(logging.Handler):
    """Collects the log lines that must not appear."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith(("event_failed", "item_failed", "step_failed", "journal_error")):
            cause = record.exc_info[1] if record.exc_info else None
            self.found.append(f"{text}: {cause!r}")


@dataclass(frozen=True)
class _Client:
    """The pipe to one engine. Commands to an engine that has died are lost."""

    device: Device
    engine: FakeEngine

    def submit(self, command: Command) -> None:
        if self.device.engine is self.engine:
            self.device.commands.append(command)


class Device:
    """A device of a worker: its engine, the commands to the engine, and the reports that have not arrived."""

    def __init__(self, number: int, inbox: Inbox) -> None:
        self.number = number
        self.inbox = inbox
        self.engine: FakeEngine | None = None
        self.commands: list[Command] = []
        self.reports: list[Report] = []

    def start(self) -> EngineUp:
        """Start an engine."""
        self.engine = FakeEngine(prefill_steps=PREFILL_STEPS, turns_at_once=TURNS_AT_ONCE)
        return EngineUp(_Client(self, self.engine), None)

    def step(self) -> None:
        """Let the engine apply its commands and step."""
        if self.engine is None:
            return
        for command in self.commands:
            self.engine.apply(command)
        self.commands.clear()
        if self.engine.has_work:
            for events in self.engine.phases():
                self.reports.append(Report(events, self.engine.memory()))

    def deliver(self) -> None:
        """Let the engine's reports arrive."""
        for report in self.reports:
            self.inbox.put(FromEngine(self.number, report))
        self.reports.clear()

    def lose(self) -> bool:
        """Kill the engine. What it had written to the pipe still arrives. Return whether there was one."""
        if self.engine is None:
            return False
        self.deliver()
        self.engine = None
        self.commands.clear()
        self.inbox.put(FromEngine(self.number, EngineLost("a test", retry_after_s=3)))
        return True

    def bring(self) -> None:
        """Start another engine after a loss."""
        if self.engine is None:
            self.inbox.put(FromEngine(self.number, self.start()))

    @property
    def works(self) -> bool:
        """Whether the engine can change anything by itself."""
        return self.engine is not None and bool(self.engine.has_work or self.commands)


class Instance:
    """One worker process with its engines, and TorchServe's frontend before it."""

    def __init__(self, world: World, number: int, store: MemoryStore | None, engines: int) -> None:
        self.engines = engines
        self.number = number
        self.world = world
        self.store = store
        self.mark = ("x-mark", "ours")
        self.able = True
        self.active: list[Request] = []
        self.sequences: set[str] = set()
        self.start()

    def start(self) -> None:
        """Start the worker process, after a kill too."""
        self.inbox = Inbox()
        self.devices = [Device(number, self.inbox) for number in range(self.engines)]
        self.to_end: list[str] = []
        self.losses = 0
        self.silent_sweeps = 0
        self.exchanged_s = self.world.monotonic_s
        self.is_draining = False
        self.journal_jobs = ManualExecutor()
        self.preparations = ManualExecutor()
        self.parsing = ManualExecutor()
        self.table = SessionTable(MAX_SESSIONS, TTL_S)
        self.journal = Journal(
            [] if self.store is None else [self.store], clock=lambda: self.world.monotonic_s, pool=self.journal_jobs
        )
        self.pump = make_pump(
            engines=EngineSet(
                [device.start() for device in self.devices], [f"cpu:{device.number}" for device in self.devices]
            ),
            inbox=self.inbox,
            template=template(),
            table=self.table,
            context_tokens=CONTEXT_TOKENS,
            limits=RequestLimits(),
            media_limits=MediaLimits(),
            ender=self,
            journal=self.journal,
            timing=Timing(lambda: self.world.now_s, lambda: self.world.monotonic_s, wait_s=0.0, close_wait_s=0.0),
            executor=self.preparations,
            parsing=self.parsing,
            fetch=_no_fetch,
        )
        with self.journal_jobs.live():
            self.pump.recover()

    @property
    def pending(self) -> int:
        """End requests that are queued: part of `SequenceEnder`."""
        return len(self.to_end)

    def end(self, sequence_id: str) -> None:
        """Take a sequence for an end request."""
        self.to_end.append(sequence_id)

    @property
    def engine(self) -> FakeEngine | None:
        """The engine of the first device."""
        return self.devices[0].engine

    def device(self, n: int) -> Device:
        """Return one of the devices."""
        return self.devices[n // INSTANCES % self.engines]

    def step(self) -> None:
        """Let the engines apply their commands and step."""
        for device in self.devices:
            device.step()

    def deliver(self) -> None:
        """Let the engines' reports arrive."""
        for device in self.devices:
            device.deliver()

    def lose_engine(self, n: int = 0) -> None:
        """Kill an engine."""
        self.losses += self.device(n).lose()

    def bring_engine(self, n: int = 0) -> None:
        """Start another engine."""
        self.device(n).bring()

    def prepare(self, index: int = 0) -> None:
        """Parse one large body and run one preparation, in any order."""
        if self.parsing.waiting:
            self.parsing.run(index)
        if self.preparations.waiting:
            with self.journal_jobs.live():
                self.preparations.run(index)

    @property
    def has_lost(self) -> bool:
        """Whether an engine is absent."""
        return any(device.engine is None for device in self.devices)

    @property
    def is_idle(self) -> bool:
        """Whether only new requests can change anything."""
        works = any(device.works or device.reports for device in self.devices)
        jobs = self.parsing.waiting + self.preparations.waiting + self.journal_jobs.waiting
        jobs += len(self.to_end)
        return not (works or jobs or self.active)


class World:
    """Two instances, the chats on them, and the operations of a life."""

    def __init__(self, has_journal: bool, engines: int = 1) -> None:
        """`engines`: of each instance."""
        self.now_s = START_S
        self.monotonic_s = 1000.0
        self.store = MemoryStore(lambda: self.now_s) if has_journal else None
        self.chats: list[Chat] = []
        self.trace: list[str] = []
        self.faults = 0
        self._rows = 0
        self._is_large = False
        self._opens: list[dict[str, object]] = []
        self._questions: list[tuple[Chat, Question]] = []
        self._asked: list[Request] = []
        self._by_key: dict[str, Chat] = {}
        self._began_ended: dict[str, bool] = {}
        self._errors = _Errors()
        self._log = logging.getLogger("llava_sessions")
        self._log.addHandler(self._errors)
        self._level = self._log.level
        self._log.setLevel(logging.ERROR)
        self._log.propagate = False
        self.instances = [Instance(self, number, self.store, engines) for number in range(INSTANCES)]

    def close(self) -> None:
        """Restore the log."""
        self._log.removeHandler(self._errors)
        self._log.setLevel(self._level)
        self._log.propagate = True

    def demand(self, holds: bool, what: str) -> None:
        """Raise `Broken` with the life so far unless it holds."""
        if not holds:
            raise Broken("\n".join([what, "after:", *(f"  {line}" for line in self.trace)]))

    # --- Operations. `n` chooses among what there is. ---

    def do(self, name: str, n: int) -> None:
        """Run one operation."""
        self.trace.append(f"{name}({n})")
        getattr(self, f"op_{name}")(n)
        self.demand(not self._errors.found, f"error in the log: {self._errors.found}")

    def op_open(self, n: int) -> None:
        """Open a session: without retry, with a retry key, or behind the literal NEW_SESSION."""
        colour = CLIP if n in (5, 7) else COLOURS[n % 2]
        body = {"type": "start_session", **shown(colour)}
        if n % 3 == 1:
            body["request_id"] = f"open-{self._rows:016}"
            self._opens.append(body)
        self._open(self._instance(n // 6), body, colour, NEW_SESSION if n % 3 == 2 else None)

    def op_reopen(self, n: int) -> None:
        """Repeat an open or a resume that has a retry key, at the same instance."""
        if self._opens:
            body = self._opens[n % len(self._opens)]
            known = self._by_key.get(str(body["request_id"]))
            home = 0 if known is None else known.home
            old = next((chat for chat in self.chats if chat.session_id == body.get("resume")), None)
            if old is None:
                colour = next(one for one in (*COLOURS, CLIP) if shown(one).items() <= body.items())
                self._open(self.instances[home], body, colour)
            else:
                self.resume(self.instances[home], body, old)

    def op_resume(self, n: int) -> None:
        """Resume a session at its own instance or at the other one."""
        if self.chats:
            old = self._chat(n)
            body: dict[str, object] = {"type": "start_session", "resume": old.session_id}
            if n % 2:
                body["request_id"] = f"resume-{self._rows:016}"
                self._opens.append(body)
            self.resume(self.instances[(old.home + n // 6) % INSTANCES], body, old)

    def op_ask(self, n: int) -> None:
        """Ask something new, sometimes while the session is busy."""
        if not self.chats:
            self.op_open(n)
            self.settle()
        if self.chats:
            request_id = f"ask-{self._rows:016}" if n % 2 else None
            colour = (None, None, None, CLIP if n > 5 else None, COLOURS[1])[n % 5]
            question = Question(PROMPTS[n % len(PROMPTS)], request_id, colour)
            chat = self._chat(n)
            if request_id:
                self._questions.append((chat, question))
            self.ask(chat, question, is_stream=n % 4 >= 2)

    def op_repeat(self, n: int) -> None:
        """Repeat one of the latest questions."""
        if self._questions:
            chat, question = self._questions[-1 - n % min(3, len(self._questions))]
            self.ask(chat, question, is_stream=n % 2 == 0)

    def op_leave(self, n: int) -> None:
        """Let a client leave."""
        instance, index = self._any_request(n)
        if instance is not None:
            self.left(instance, instance.active.pop(index))

    def op_cancel(self, n: int) -> None:
        """Cancel a session's turn."""
        if self.chats:
            chat = self._chat(n)
            chat.stops += 1
            self.send(chat.home, "cancel", {"type": "cancel"}, chat.session_id, chat=chat)

    def op_close(self, n: int) -> None:
        """Close a session."""
        if self.chats:
            self.close_chat(self._chat(n))

    def op_elsewhere(self, n: int) -> None:
        """Send a request of a session to the other instance, which adopts the session."""
        if self.chats:
            chat = self._chat(n)
            chat.moves = True
            at = (chat.home + 1) % INSTANCES
            if n % 6 == 4:
                chat.stops += 1
                self.send(at, "cancel", {"type": "cancel"}, chat.session_id, chat=chat)
            elif n % 6 == 5:
                self.close_chat(chat, at)
            else:
                request_id = f"ask-{self._rows:016}" if n % 2 else None
                self.ask(chat, Question(PROMPTS[n % len(PROMPTS)], request_id, None), is_stream=n % 4 >= 2, at=at)

    def op_exchange(self, n: int) -> None:
        """Exchange rows and replies at one instance."""
        self.exchange(self._instance(n))

    def op_prepare(self, n: int) -> None:
        """Run a preparation."""
        self._instance(n).prepare(n // 2)

    def op_journal(self, n: int) -> None:
        """Run a job of the journal."""
        jobs = self._instance(n).journal_jobs
        if jobs.waiting:
            jobs.run(n // 2)

    def op_step(self, n: int) -> None:
        """Let an engine step."""
        self._instance(n).step()

    def op_deliver(self, n: int) -> None:
        """Let an engine's reports arrive."""
        self._instance(n).deliver()

    def op_round(self, n: int) -> None:
        """Do everything once at one instance."""
        self._round(self._instance(n))

    def op_settle(self, n: int) -> None:
        """Do everything that waits, at all instances."""
        self.settle()

    def op_large(self, n: int) -> None:
        """Send the next request with a large body, which is parsed later, and a small one behind it."""
        self._is_large = True
        (self.op_ask, self.op_open, self.op_close, self.op_repeat, self.op_cancel, self.op_resume)[n % 6](n)
        self._is_large = False
        (self.op_cancel, self.op_close, self.op_ask, self.op_repeat)[n // 6 % 4](n)

    def op_tick(self, n: int) -> None:
        """Let time pass: sometimes past a session's expiry."""
        self._pass((1.0, 30.0, TTL_S / 2)[n % 3])
        self._sweep()

    def op_lose(self, n: int) -> None:
        """Kill an engine."""
        self.faults += 1
        self._instance(n).lose_engine(n)

    def op_up(self, n: int) -> None:
        """Bring an engine back."""
        self._instance(n).bring_engine(n)

    def op_open_fault(self, n: int) -> None:
        """Fail the next open in the engine."""
        engine = self._instance(n).device(n // 2).engine
        if engine is not None:
            self.faults += 1
            engine.open_fault = (OpenFailed, OutOfCapacity)[n // 2 % 2]

    def op_turn_fault(self, n: int) -> None:
        """Fail the next turn in the engine."""
        engine = self._instance(n).device(n // 2).engine
        if engine is not None:
            self.faults += 1
            engine.turn_fault = (TurnFailed, OutOfCapacity)[n // 2 % 2]

    def op_fail(self, n: int) -> None:
        """Fail what an engine does for a session."""
        engine = self._instance(n).device(n).engine
        if engine is not None and engine.sessions:
            self.faults += 1
            # Those that are not prefilled first.
            found = sorted(engine.sessions, key=lambda name: (engine.sessions[name].steps_left == 0, name))
            engine.fail(found[n // 4 % len(found)])

    def op_store_fault(self, n: int) -> None:
        """Break the store for writes or reads, or mend it."""
        if self.store is not None:
            self.store.writes_fail = n % 3 == 1
            self.store.reads_fail = n % 3 == 2

    def op_stall(self, n: int) -> None:
        """Stop the frontend for a while. With n even the worker runs on, and takes its clients for disconnected."""
        instance = self._instance(n // 2)
        self._pass(SILENCE_S + 1)
        if n % 2:
            return
        for _ in range(SILENT_SWEEPS):
            self._sweep_one(instance)

    def op_drain(self, n: int) -> None:
        """Announce the end of an instance."""
        if n % 4 == 0:
            instance = self._instance(n // 4)
            instance.is_draining = True
            instance.pump.drain()

    def op_restart(self, n: int) -> None:
        """Kill a worker process, and start another."""
        if n % 3 == 0:
            self.restart(self._instance(n // 3))

    def op_abandon(self, n: int) -> None:
        """Resume a session, and let the client leave at some stage of that."""
        if self.chats:
            self.op_resume(n)
            instance = self.instances[(self._chat(n).home + n // 6) % INSTANCES]
            stages = (self.exchange, Instance.prepare, self.exchange, Instance.step, Instance.deliver)
            for stage in stages[: 1 + n % 5]:
                stage(instance)
            if instance.active and instance.active[-1].kind == "resume":
                self.left(instance, instance.active.pop())

    def op_impatient(self, n: int) -> None:
        """Ask, leave at some stage, and ask the same again."""
        if self.chats:
            chat = self._chat(n)
            instance = self.instances[chat.home]
            question = Question(PROMPTS[0], f"ask-{self._rows:016}", None)
            first = self.ask(chat, question, is_stream=n % 2 == 0)
            for _ in range(1 + n % 3):
                instance.prepare()
                self.exchange(instance)
                instance.step()
            if first in instance.active:
                instance.active.remove(first)
                self.left(instance, first)
            if n % 4:
                self.exchange(instance)
            self.ask(chat, question, is_stream=False)
            self.exchange(instance)

    def op_outage(self, n: int) -> None:
        """Ask a session of a worker process that has just started, while the store can't be read."""
        if self.chats and self.store is not None:
            chat = self._chat(n)
            self.restart(self.instances[chat.home])
            self.store.reads_fail = True
            self.ask(chat, Question(PROMPTS[0], None, None), is_stream=False)
            self.settle()
            self.store.reads_fail = False

    def op_break(self, n: int) -> None:
        """Open a session, and fail it in the engine after its acknowledgement; close it meanwhile, or not."""
        chat = self.acknowledge(n)
        instance = self._instance(n // 6)
        if chat is not None and n % 2:
            self.close_chat(chat)
            self.exchange(instance)
        self.op_fail(instance.number)

    def acknowledge(self, n: int = 0) -> Chat | None:
        """Open a session, up to its acknowledgement: the engine is still prefilling. None: it was rejected."""
        before = len(self.chats)
        self.op_open(n)
        instance = self._instance(n // 6)
        for _ in range(ROUNDS):
            if len(self.chats) > before or not instance.active:
                break
            instance.prepare()
            instance.journal_jobs.run_all()
            self.exchange(instance)
            if any(device.commands for device in instance.devices):
                instance.step()
            instance.deliver()
        return self.chats[-1] if len(self.chats) > before else None

    # --- Requests ---

    def _instance(self, n: int) -> Instance:
        return self.instances[n % INSTANCES]

    def _chat(self, n: int) -> Chat:
        """One of the latest chats."""
        return self.chats[-1 - n % min(4, len(self.chats))]

    def _any_request(self, n: int) -> tuple[Instance | None, int]:
        places = [(one, index) for one in self.instances for index in range(len(one.active))]
        return places[n % len(places)] if places else (None, 0)

    def send(self, home: int, kind: str, body: dict[str, object], session: str | None, **facts) -> Request:
        """Add a request to the rows of an instance."""
        self._rows += 1
        own = f"ts-seq-{uuid.UUID(int=self._rows)}"
        headers = {SESSION_HEADER.lower(): session} if session else {}
        is_large = self._is_large
        self._is_large = False
        sent = json.dumps(body).encode() + b" " * LARGE_BYTES if is_large else body
        row = Row(f"request-{self._rows}", session or own, session is None, headers, sent)
        request = Request(row, kind, sent_s=self.monotonic_s, is_large=is_large, **facts)
        if request.chat is not None:
            request.stops = request.chat.stops
            request.began_ended = request.chat.is_ended is True
        self.instances[home].active.append(request)
        return request

    def _open(self, instance: Instance, body: dict[str, object], colour: str, session: str | None = None) -> None:
        self.send(instance.number, "open", body, session, colour=colour, key=body.get("request_id"))

    def resume(self, instance: Instance, body: dict[str, object], old: Chat) -> Request:
        """Send an open that resumes a session."""
        old.resumes += 1
        old.claimed = old.claimed or instance.number != old.home
        request = self.send(instance.number, "resume", body, None, chat=old, key=body.get("request_id"))
        if request.key is not None:
            # The first one may have succeeded without a reply.
            request.began_ended = self._began_ended.setdefault(request.key, request.began_ended)
        return request

    def ask(self, chat: Chat, question: Question, is_stream: bool, at: int | None = None) -> Request:
        """Send a question, to the session's instance or to the instance `at`."""
        body: dict[str, object] = {
            "type": "send_text_prompt",
            "prompt_text": question.prompt,
            "max_new_tokens": MAX_NEW_TOKENS,
            "return_token_ids": True,
            "stream": is_stream,
        }
        if question.request_id:
            body["request_id"] = question.request_id
        if question.colour:
            body |= shown(question.colour)
        home = chat.home if at is None else at
        asked = self.send(home, "ask", body, chat.session_id, chat=chat, question=question, is_stream=is_stream)
        self._asked.append(asked)
        return asked

    def close_chat(self, chat: Chat, at: int | None = None) -> Request:
        """Send a close, to the session's instance or to the instance `at`."""
        chat.stops += 1
        if chat.is_ended is False:
            chat.is_ended = None
        home = chat.home if at is None else at
        return self.send(home, "close", {"type": "close_session"}, chat.session_id, chat=chat)

    # --- What moves things on ---

    def _pass(self, seconds: float) -> None:
        self.now_s += seconds
        self.monotonic_s += seconds

    def _sweep(self) -> None:
        for instance in self.instances:
            self._sweep_one(instance)

    def _sweep_one(self, instance: Instance) -> None:
        """Sweep, and note which clients the worker takes for disconnected."""
        instance.pump.sweep()
        instance.silent_sweeps += 1
        is_silent = self.monotonic_s - instance.exchanged_s > SILENCE_S
        if not is_silent or instance.silent_sweeps < SILENT_SWEEPS:
            return
        for request in instance.active:
            if request.was_seen and not request.was_dropped:
                self._uncertain(instance, request)
                request.was_dropped = True

    def _round(self, instance: Instance) -> None:
        instance.prepare()
        instance.journal_jobs.run_all()
        instance.step()
        instance.deliver()
        self.exchange(instance)

    def settle(self) -> None:
        """Do everything that waits. Fail if a request is never answered."""
        for _ in range(ROUNDS):
            for instance in self.instances:
                self._round(instance)
            if all(instance.is_idle or (instance.has_lost and not instance.active) for instance in self.instances):
                return
        waiting = [request.kind for instance in self.instances for request in instance.active]
        self.demand(False, f"requests without a reply: {waiting}")

    def restart(self, instance: Instance) -> None:
        """Kill the worker process of an instance, and start another."""
        for request in instance.active:
            self.left(instance, request)
        instance.active.clear()
        for chat in self.chats:
            if chat.home == instance.number:
                chat.survive_restart(self.store is not None and self.store.has_failed)
                # A start that can't read the directory finds no session in it. A resume does.
                chat.claimed = chat.claimed or (self.store is not None and self.store.reads_fail)
        instance.sequences.clear()
        instance.start()

    def exchange(self, instance: Instance) -> None:
        """Exchange rows and replies, and check the replies."""
        instance.silent_sweeps = 0
        instance.exchanged_s = self.monotonic_s
        ends = [self._end_row(instance, sequence) for sequence in instance.to_end]
        instance.to_end.clear()
        rows = [request.row for request in instance.active] + ends
        instance.sequences |= {row.sequence_id for row in rows if row.sequence_id != NEW_SESSION}
        try:
            replies = instance.pump.exchange(rows)
        except Exception as error:
            self.demand(False, f"exchange raised {error!r}")
        self.demand(len(replies) == len(rows), "exchange must return a reply or None for each row")
        for reply in replies:
            if reply is not None and CLOSED_SESSION_HEADER in reply.headers:
                instance.sequences.discard(reply.headers[CLOSED_SESSION_HEADER])
        waiting = []
        for request, reply in zip(instance.active, replies, strict=False):
            request.was_seen = True
            if reply is None or self._receive(instance, request, reply):
                waiting.append(request)
        self.demand(all(reply is not None for reply in replies[len(instance.active) :]), "an end request was held")
        instance.active = waiting

    def _end_row(self, instance: Instance, sequence: str) -> Row:
        self._rows += 1
        headers = {SESSION_HEADER.lower(): sequence, instance.mark[0]: instance.mark[1]}
        return Row(f"request-{self._rows}", sequence, False, headers, {"type": "close_session"})

    # --- What clients receive ---

    def _receive(self, instance: Instance, request: Request, reply: Reply) -> bool:
        """Check a reply. Return whether more follows."""
        if request.head is None:
            request.head = reply
        request.last = reply
        request.text += reply.body
        if reply.more:
            may_begin = request.is_stream or (request.is_large and request.kind == "ask")
            self.demand(may_begin and not request.was_dropped, f"a chunk for {request.kind}")
            return True
        self.demand((reply.more is False) == (request.head is not reply), "the last chunk of a stream, and only that")
        self._finish(instance, request, request.head.status)
        return False

    def _finish(self, instance: Instance, request: Request, status: int) -> None:
        lines = [json.loads(line) for line in request.text.splitlines()]
        body = lines[-1]
        self.trace.append(f"    {request.kind} of instance {instance.number}: {status} {_shown(body)}")
        error = body.get("error")
        if error is not None:
            self.demand(error["code"] in STATUS_OF_CODE, "an unknown code")
            is_stream = request.head is not None and request.head.more
            self.demand(status == (200 if is_stream else STATUS_OF_CODE[error["code"]]), f"status {status}")
            needs_retry = STATUS_OF_CODE[error["code"]] == 503 and not is_stream
            self.demand(not needs_retry or "Retry-After" in request.head.headers, "503 without Retry-After")
            self._refused(instance, request, error["code"])
            return
        # After a drop too: the reply may have become known just before it. Then the row that returns receives it.
        self.demand(status == 200, f"status {status} without an error")
        match request.kind:
            case "open" | "resume":
                self._opened(instance, request, body)
            case "ask":
                self._answered(instance, request, lines)
            case "close":
                request.chat.is_ended = True
                request.chat.ended_at = instance.number

    def _refused(self, instance: Instance, request: Request, code: str) -> None:
        chat = request.chat
        if request.kind == "resume":
            self._resume_ended(request)
        # Another error was known just before the drop, and must be right as without it.
        if request.was_dropped and (code == "request_dropped" or STATUS_OF_CODE[code] == 503):
            return
        store_failed = self.store is not None and self.store.has_failed
        match code:
            case "session_not_found":
                self.demand(self._may_be_gone(request), f"an acknowledged session was lost: {request.kind}")
            case "session_expired":
                self.demand(self.now_s >= chat.expires_at_s, "expired too early")
            case "session_busy":
                self.demand(request.kind in ("ask", "resume"), f"{request.kind} got session_busy")
            case "session_moved":
                chat = chat or self._by_key.get(request.key or "")  # a retried open has no chat of its own
                may_move = chat is not None and (chat.claimed or chat.moves or chat.was_restarted)
                self.demand(may_move, "moved without a claim")
                self._uncertain(instance, request)
            case "journal_unavailable":
                self.demand(store_failed, "the journal did not fail")
            case "engine_restarting":
                self.demand(instance.losses > 0, "no engine was lost")
            case "shutting_down":
                self.demand(instance.is_draining, "no drain was asked for")
            case "internal" | "capacity":
                self.demand(self.faults > 0 or code == "capacity", "an internal error without a fault")
                # A session that only the journal has needs a place, whatever is asked of it.
                may_work = request.kind in ("open", "resume", "ask") or (code == "capacity" and self.store is not None)
                self.demand(may_work, f"{request.kind} got {code}")
            case _:
                self.demand(False, f"unexpected {code} for {request.kind}")

    def _may_be_gone(self, request: Request) -> bool:
        chat = request.chat or self._by_key.get(request.key or "")
        if chat is None:
            return False
        others = chat.resumes > 0 or chat.heirs or chat.claimed or (chat.moves and not chat.is_durable)
        return chat.is_ended is not False or bool(others) or self.now_s >= chat.expires_at_s

    def _resume_ended(self, request: Request) -> None:
        if not request.is_counted_out:
            request.is_counted_out = True
            request.chat.resumes -= 1

    def _opened(self, instance: Instance, request: Request, body: dict) -> None:
        session_id = body["session_id"]
        durable = body.get("durable", False)
        known = next((chat for chat in self.chats if chat.session_id == session_id), None)
        if known is not None:
            self.demand(request.key is not None, "two opens got one session")
            # An instance does not know of the end of a session that has moved.
            is_known = known.is_ended is True and known.ended_at == instance.number
            self.demand(not is_known or known.claimed, "a retried open got a session that has ended")
            if request.kind == "resume":
                self._resume_ended(request)
            return
        possible = {Conversation(request.colour)} if request.kind == "open" else self._resumed(instance, request, body)
        expires_at_s = datetime.strptime(body["expires"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
        chat = Chat(session_id, instance.number, possible, expires_at_s, durable)
        chat.is_split = request.chat is not None and request.chat.is_split
        self.chats.append(chat)
        if request.key is not None:
            self._by_key[request.key] = chat

    def _resumed(self, instance: Instance, request: Request, body: dict) -> set[Conversation]:
        old = request.chat
        self._resume_ended(request)
        durable = body.get("durable", False)
        is_blind = self.store is not None and self.store.has_failed and not durable
        # A former instance that cannot read the journal resumes its old copy.
        old.is_split = old.is_split or (old.moves and is_blind)
        if old.is_split:
            old.is_ended = None
            return old.possible
        is_elsewhere = instance.number != old.home
        if is_elsewhere or old.claimed:
            possible = {shorter for whole in old.possible for shorter in whole.prefixes()}
        else:
            possible = old.possible
        possible = {one for one in possible if len(one.turns) == body.get("turns", 0)}
        self.demand(bool(possible), f"a resume lost turns: {body.get('turns', 0)} are left")
        if request.began_ended:
            # An instance acknowledges a close also where another has claimed the session, and leaves it to that one.
            has_failed = self.store is not None and self.store.has_failed
            self.demand(old.claimed or has_failed, "an ended session was resumed")
        # A removal that fails counts as done, so that the session is not lost.
        has_failed = self.store is not None and self.store.has_failed
        self.demand(has_failed or not (durable and old.resumed_durably), "a session was resumed twice")
        old.resumed_durably = old.resumed_durably or durable
        old.is_ended = True if durable or (not is_elsewhere and self.store is None) else None
        old.ended_at = instance.number
        return {_all_durable(one) if durable else one for one in possible}

    def _answered(self, instance: Instance, request: Request, lines: list[dict]) -> None:
        chat = request.chat
        body = lines[-1]
        reason = body["finish_reason"]
        text = "".join(line["delta"] for line in lines) if request.is_stream else body["response_text"]
        self.demand({"usage", "timings"} <= set(body), f"an answer that was {reason} without usage or timings")
        if "token_ids" not in body:
            was_stopped = {
                "cancelled": chat.stops > request.stops,
                "shutdown": instance.is_draining,
                "deadline": self._is_overdue(request),
            }
            self.demand(was_stopped.get(reason, False), f"an answer was {reason} without a reason")
            return
        made = tuple(body["token_ids"])
        self.demand(text == text_of(list(made)), "the text is not that of the tokens")
        self.demand(reason in ("stop", "length") or reason == "shutdown", f"finish_reason {reason}")
        durable = body.get("durable", False)
        # A turn of another instance may have ended before that, and its reply be received after it.
        was_before = not request.began_ended and chat.ended_at != instance.number
        if chat.is_ended and not was_before and not self._is_retry(chat, request.question, made):
            # A removal that fails counts as done. The session is then still stored, until it is tried again.
            self.demand(self.store is not None and self.store.has_failed, "an ended session answered")
        is_blind = self.store is not None and self.store.has_failed
        chat.is_split = chat.is_split or (chat.moves and is_blind)
        if chat.is_split:
            chat.home = instance.number
            return
        chat.note_moves()
        possible = set()
        for whole in chat.possible:
            stored = whole.stored(request.question)
            if stored is not None:
                after = whole if stored.made == made else None
            else:
                answer = whole.answer(request.question)
                is_whole = made == answer or (reason == "shutdown" and made == answer[: len(made)])
                after = whole.with_turn(Turn(request.question, made)) if is_whole else None
            if after is not None:
                possible.add(after.with_durable(request.question) if durable else after)
        self.demand(bool(possible), "the answer is that of another conversation, or a turn was lost")
        chat.possible = possible
        chat.home = instance.number
        chat.is_durable = chat.is_durable or durable

    def _is_overdue(self, request: Request) -> bool:
        """Return whether the deadline of a turn has passed: that of the first request, which retries attach to."""
        same = [request]
        if request.question.request_id is not None:
            same += [one for one in self._asked if one.chat is request.chat and one.question == request.question]
        return any(not one.is_stream and self.monotonic_s - one.sent_s >= DEADLINE_S for one in same)

    def _is_retry(self, chat: Chat, question: Question, made: tuple[int, ...]) -> bool:
        stored = (whole.stored(question) for whole in chat.possible)
        return any(turn is not None and turn.made == made for turn in stored)

    def left(self, instance: Instance, request: Request) -> None:
        """Note that a client has left."""
        if request.was_seen and not request.was_dropped:
            self._uncertain(instance, request)
        elif request.kind == "resume" and not request.was_dropped:
            self._resume_ended(request)

    def _uncertain(self, instance: Instance, request: Request) -> None:
        """Note what the server may have done for a request whose reply nobody receives."""
        chat = request.chat
        if chat is not None:
            chat.note_moves()
        match request.kind:
            case "ask":
                for whole in list(chat.possible):
                    if whole.stored(request.question) is None:
                        answer = whole.answer(request.question)
                        shortest = 1 if instance.is_draining else len(answer)
                        for length in range(shortest, len(answer) + 1):
                            chat.possible.add(whole.with_turn(Turn(request.question, answer[:length])))
            case "resume":
                chat.heirs.append((instance.number, request.row.sequence_id))
                if request.was_dropped is False:
                    self._resume_ended(request)

    # --- The end of a life ---

    def finish(self) -> None:
        """Mend everything, and check what must hold at rest and when all sessions are closed."""
        self.trace.append("finish")
        if self.store is not None:
            self.store.writes_fail = False
            self.store.reads_fail = False
        for instance in self.instances:
            for device in instance.devices:
                if device.engine is not None:
                    device.engine.open_fault = None
                    device.engine.turn_fault = None
                device.bring()
        self.settle()
        for instance in self.instances:
            if instance.is_draining:
                self.restart(instance)
        self._check_rest()
        for chat in list(self.chats):
            self._check_chat(chat)
        for chat in list(self.chats):
            self.close_chat(chat)
        self.settle()
        self._pass(TTL_S + GRACE_S + 200.0)
        self._sweep()
        self.settle()
        self._check_rest()
        for instance in self.instances:
            self.demand(not list(instance.table), f"sessions outlive their end: {list(instance.table)}")
            for device in instance.devices:
                self.demand(device.engine is not None and not device.engine.sessions, "the engine holds sessions")
            self.demand(not instance.pump.busy, "the pump is busy")
            self.demand(not self._errors.found, f"error in the log: {self._errors.found}")
        if self.store is not None:
            records = [place for place in self.store.objects if place[1].endswith(".rec")]
            # A stray record that could not be taken back is swept a day later.
            self.demand(not records or self.store.has_failed, f"{len(records)} records of sessions that have ended")

    def _check_rest(self) -> None:
        self._pass(RETURN_S)
        for _ in range(3):
            self._pass(2.0)
            self._sweep()
            self.settle()
        for instance in self.instances:
            known = {session.id for session in instance.table}
            for device in instance.devices:
                held = set() if device.engine is None else set(device.engine.sessions)
                own = {session.id for session in instance.table if session.engine == device.number}
                self.demand(held <= own, f"engine {device.number} holds sessions of others: {held - own}")
            self.demand(instance.sequences <= known, f"sequences without a session: {instance.sequences - known}")

    def _check_chat(self, chat: Chat) -> None:
        """An acknowledged session that was not closed must answer, here or where it is resumed."""
        if chat.is_ended is not False or self.now_s >= chat.expires_at_s:
            return
        home = self.instances[chat.home]
        if home.losses >= MAX_ENGINE_LOSSES:
            return
        before = len(self.chats)
        self.trace.append(f"check {chat.session_id}")
        for _ in range(2 if chat.moves else 1):  # an instance that has lost the session adopts it with the next request
            if self._still_answers(chat):
                return
        # A session that only the journal has needs a place.
        while "capacity" in self.trace[-1] and len(list(home.table)) >= MAX_SESSIONS:
            if not self._make_room(home, chat) or self._still_answers(chat):
                return
        if chat.moves and not chat.is_durable:
            return
        for number, heir in chat.heirs:
            session = self.instances[number].table.find(heir)
            if session is not None:
                self.chats.append(Chat(heir, number, set(), session.expires_at_s, False, is_ended=None))
                return
        self.demand(chat.claimed, f"an acknowledged session does not answer: {self.trace[-1]}")
        for number in range(INSTANCES):
            self.resume(self.instances[number], {"type": "start_session", "resume": chat.session_id}, chat)
            self.settle()
            if len(self.chats) > before:
                return
        full = any(len(list(one.table)) >= MAX_SESSIONS for one in self.instances)
        self.demand(full or not chat.is_durable, "a claimed session can't be resumed")

    def _still_answers(self, chat: Chat) -> bool:
        self.ask(chat, Question("Still there?", None, None), is_stream=False)
        self.settle()
        if not self.trace[-1].strip().startswith("ask of"):
            self.demand(False, "the check has no reply")
        return ": 200" in self.trace[-1]

    def _make_room(self, instance: Instance, chat: Chat) -> bool:
        """Close another session that takes a place. Return False if no chat has any."""
        for other in self.chats:
            if other is not chat and other.is_ended is False and instance.table.find(other.session_id) is not None:
                self.close_chat(other, instance.number)
                self.settle()
                return True
        return False


def _all_durable(whole: Conversation) -> Conversation:
    return replace(whole, turns=tuple(replace(turn, is_durable=True) for turn in whole.turns))


def _shown(body: dict) -> str:
    if "error" in body:
        return str(body["error"]["code"])
    return " ".join(str(body[name]) for name in ("finish_reason", "token_ids", "session_id", "durable") if name in body)


OPERATIONS: dict[str, int] = {
    "round": 16,
    "ask": 8,
    "elsewhere": 6,
    "exchange": 6,
    "open": 5,
    "repeat": 5,
    "resume": 4,
    "prepare": 4,
    "step": 4,
    "deliver": 4,
    "journal": 3,
    "leave": 3,
    "close": 3,
    "cancel": 3,
    "settle": 3,
    "lose": 2,
    "up": 3,
    "open_fault": 2,
    "turn_fault": 2,
    "fail": 2,
    "store_fault": 3,
    "large": 4,
    "stall": 2,
    "tick": 2,
    "reopen": 2,
    "abandon": 2,
    "impatient": 2,
    "outage": 1,
    "break": 2,
    "drain": 1,
    "restart": 1,
}
WEIGHTED = tuple(name for name, weight in OPERATIONS.items() for _ in range(weight))


def live(has_journal: bool, operations: list[tuple[str, int]], engines: int = 1) -> World:
    """Run a life to its end. Raise `Broken`. `engines`: of each instance."""
    world = World(has_journal, engines)
    try:
        for name, n in operations:
            world.do(name, n)
        world.finish()
    finally:
        world.close()
    return world


@contextlib.contextmanager
def world(has_journal: bool = True, engines: int = 1) -> Iterator[World]:
    """A world for a plain test."""
    made = World(has_journal, engines)
    try:
        yield made
    finally:
        made.close()
