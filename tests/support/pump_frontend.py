"""Stands around a pump in its tests: a real engine on a tiny checkpoint, rows as TorchServe numbers them, and a clock.

Time is a variable and the engine steps when a test says so, so nothing here waits for luck.
"""

from __future__ import annotations

import base64
import io
import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from llava_sessions.config import MediaLimits, RequestLimits
from llava_sessions.engine.budget import choose_budget
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import Admitted, AskSession, CloseSession, OpenSession, Report
from llava_sessions.journal.journal import Journal
from llava_sessions.protocol.constants import CLOSED_SESSION_HEADER, SESSION_HEADER
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.torchserve.batch import Reply, Row
from llava_sessions.worker.assembly import Policy, Timing, make_pump
from llava_sessions.worker.engine_set import EngineSet
from llava_sessions.worker.engines import EngineLost, EngineUp, FromEngine
from llava_sessions.worker.exporter import Histograms
from llava_sessions.worker.inbox import Inbox
from llava_sessions.worker.pending import LARGE_BYTES
from llava_sessions.worker.pump import Pump
from llava_sessions.worker.sessions import SessionTable

NOW = 1_800_000_000.0
TTL = 60.0
PATIENCE_S = 20.0
# The engine steps between exchanges only, so an exchange never waits for it with success.
WAIT_S = 0.002
QUESTIONS = ["What is the red circle doing?", "Where is the blue square near two green stars?", "And now?"]


def png(colour: str = "red") -> str:
    held = io.BytesIO()
    Image.new("RGB", (60, 40), colour).save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()


class Frontend:
    """What stands around a pump: rows as TorchServe numbers them, a clock, and the engine behind a door.

    The door is synchronous: a command takes effect when it is submitted, its events reach the inbox by `step()`; of a
    close, at once. `ended` are the sequences that the pump had ended by a request of its own.
    """

    def __init__(
        self,
        model: Model,
        tokens: ChatTemplate,
        max_sessions: int = 8,
        context_tokens: int | None = None,
        deaf: bool = False,
        journal: Journal | None = None,
        idle_s: float | None = None,
        first_row: int = 0,
        close_wait_s: float = WAIT_S,
        parsing: Executor | None = None,
        adopt_sessions: bool = True,
        share_pictures: bool = True,
    ) -> None:
        """`deaf`: commands are only recorded, and a test tells by itself what came of them. `first_row` sets the ids
        of two servers apart. `parsing` parses large bodies.
        """
        self.now_s = NOW
        self.template_lock = tokens.lock
        self.skipped_s = 0.0
        self.longest_step_s = 0.0
        self.commands: list = []
        self.inbox = Inbox()
        self._new_engine = lambda: Engine(model, tokens.answer_text, choose_budget(model.device))
        self.engine = self._new_engine()
        self._deaf = deaf
        self._rows = first_row
        self.table = SessionTable(max_sessions, TTL, idle_s)
        self.journal = journal or Journal()
        self.histograms = Histograms()
        self._ended: list[str] = []
        self.mark = ("x-mark", "ours")
        self.able = True
        self.pending = 0
        self.pump = self._make_pump(
            template=tokens,
            context_tokens=context_tokens or model.context_tokens,
            parsing=parsing,
            policy=Policy(share_pictures=share_pictures, adopt_sessions=adopt_sessions),
            timing=Timing(
                clock=lambda: self.now_s,
                monotonic=lambda: time.monotonic() + self.skipped_s,
                wait_s=WAIT_S,
                close_wait_s=close_wait_s,
            ),
        )

    def _make_pump(self, **options: Any) -> Pump:
        """Make the pump, with this object as its engine and as what ends its sequences."""
        return make_pump(
            engines=EngineSet([EngineUp(self, None)], ["cpu"]),
            inbox=self.inbox,
            table=self.table,
            limits=RequestLimits(),
            media_limits=MediaLimits(),
            ender=self,
            journal=self.journal,
            histograms=self.histograms,
            **options,
        )

    def end(self, sequence_id: str) -> None:
        self._ended.append(sequence_id)

    @property
    def ended(self) -> list[str]:
        """What was ended once nothing more was asked."""
        self.pump.sweep()
        return self._ended

    def submit(self, command) -> None:
        self.commands.append(command)
        if self._deaf:
            if isinstance(command, OpenSession):
                self.tell(Admitted(command.session_id))
        else:
            self.engine.apply(command)
            if isinstance(command, CloseSession):
                self.step()

    def step(self) -> None:
        if self.engine.has_work:
            self.tell(*self.engine.step())

    def tell(self, *events) -> None:
        self.put(Report(list(events), self.engine.memory(), self.longest_step_s))

    def lose_engine(self) -> None:
        """The engine dies with all that it holds."""
        self.engine = self._new_engine()
        self.put(EngineLost("a test", retry_after_s=3))

    def bring_engine(self) -> None:
        """Another one is ready."""
        self.put(EngineUp(self, None))

    def put(self, item: Report | EngineLost | EngineUp) -> None:
        """Put an item of the engine into the inbox."""
        self.inbox.put(FromEngine(0, item))

    def row(self, body: Any, session: str | None = None, headers: dict | None = None) -> Row:
        """A request with the session header, or without one, for which TorchServe makes an id."""
        self._rows += 1
        own = f"ts-seq-{uuid.UUID(int=self._rows)}"
        headers = {SESSION_HEADER.lower(): session, **(headers or {})} if session else headers or {}
        return Row(f"request-{self._rows}", session or own, session is None, headers, body)

    def ask_row(self, session: str | None, prompt: str = QUESTIONS[0], **fields: Any) -> Row:
        body = {"type": "send_text_prompt", "prompt_text": prompt, "max_new_tokens": 6, **fields}
        return self.row(body, session)

    def large(self, body: dict, session: str | None = None) -> Row:
        """A request whose body is too long to be parsed on the pump's thread."""
        return self.row(json.dumps(body).encode() + b" " * LARGE_BYTES, session)

    def large_ask(self, session: str, **fields: Any) -> Row:
        return self.large(
            {"type": "send_text_prompt", "prompt_text": QUESTIONS[0], "max_new_tokens": 6, **fields}, session
        )

    def exchange(self, *rows: Row) -> list[Reply | None]:
        return self.pump.exchange(list(rows))

    def settle(self, *rows: Row) -> list[list[Reply]]:
        """Exchange, with the engine stepping, until every row has its last reply. All replies of each row."""
        told: dict[str, list[Reply]] = {row.request_id: [] for row in rows}
        active, until = list(rows), time.monotonic() + PATIENCE_S
        while active:
            assert time.monotonic() < until, "rows were never answered"
            replies = self.exchange(*active)
            for row, reply in zip(active, replies, strict=True):
                if reply is not None:
                    told[row.request_id].append(reply)
            active = [row for row, reply in zip(active, replies, strict=True) if reply is None or reply.more]
            self.step()
        return list(told.values())

    def answer(self, row: Row) -> Reply:
        """The one reply of a row that is answered as a whole."""
        ((reply,),) = self.settle(row)
        assert reply.more is None
        return reply

    def answer_beside(self, running: Row, row: Row) -> Reply:
        """The one reply of a row that is answered at once, while another is held."""
        held, reply = self.exchange(running, row)
        assert held is None
        return reply

    def settle_with(self, row: Row, *held: Row) -> Reply:
        """The reply of a row that is answered as a whole while the engine steps and other rows stay held."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            reply, *others = self.exchange(row, *held)
            assert others == [None] * len(held)
            if reply is not None:
                return reply
            self.step()
        raise AssertionError("the row was never answered")

    def settle_beside(self, held: Row, row: Row) -> Reply:
        """The last reply of a row, while another row stays held."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            _, reply = self.exchange(held, row)
            if reply is not None:
                return reply
        raise AssertionError("the row was never answered")

    def body_of(self, row: Row) -> dict:
        """The content of the reply to a row that is answered as a whole."""
        return json.loads(self.answer(row).body)

    def open(self, colour: str = "red", session: str | None = None, **fields: Any) -> str:
        reply = self.answer(self.row({"type": "start_session", "image": png(colour), **fields}, session))
        assert reply.status == 200, reply.body
        while self.engine.has_work:
            self.step()
        return json.loads(reply.body)["session_id"]

    def is_ended(self, row: Row, reply: Reply) -> bool:
        """Whether the row's own sequence is ended: in one of the two ways, never by both."""
        assert self.ended.count(row.sequence_id) + (CLOSED_SESSION_HEADER in reply.headers) <= 1
        return row.sequence_id in (*self.ended, reply.headers.get(CLOSED_SESSION_HEADER))

    def ask(self, session: str | None, prompt: str = QUESTIONS[0], **fields: Any) -> dict:
        return self.body_of(self.ask_row(session, prompt, **fields))

    def start(self, session: str, prompt: str = QUESTIONS[0], **fields: Any) -> Row:
        """An ask whose turn runs, and whose row is still held."""
        row = self.ask_row(session, prompt, **{"max_new_tokens": 200, **fields})
        while not any(isinstance(one, AskSession) and one.turn_id == row.request_id for one in self.commands):
            assert self.exchange(row) == [None]
        return row

    def close_row(self, session: str, **fields: Any) -> Row:
        return self.row({"type": "close_session", **fields}, session)

    def describe_row(self, session: str, **fields: Any) -> Row:
        return self.row({"type": "describe_session", **fields}, session)

    def cancel_row(self, session: str) -> Row:
        return self.row({"type": "cancel"}, session)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[Model]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny model only loses by more
    yield Model.load(tiny, device="cpu")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokens(tiny: Path) -> ChatTemplate:
    return ChatTemplate(transformers.AutoProcessor.from_pretrained(tiny))


def code(reply: Reply) -> str:
    return json.loads(reply.body)["error"]["code"]


def lines(replies: list[Reply]) -> list[dict]:
    return [json.loads(line) for reply in replies for line in reply.body.splitlines()]
