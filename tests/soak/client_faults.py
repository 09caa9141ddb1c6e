"""Hold random chats with the Python client while random faults meet its requests.

Each chat runs undisturbed first, then through a `FaultProxy` to TorchServe, HAProxy or a local endpoint over two
instances. Some sessions are closed by another client between two questions. Every answer must be the undisturbed one.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from deploy.serve.torchserve import TorchServe
from llava_sessions_client import Answer, Chat, Endpoint, Timeouts
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.client_servers import SERVERS, Servers, client_of, serving
from tests.support.encoding import to_png
from tests.support.fault_proxy import BEFORE_REPLY, Fault, FaultProxy, Server, Stop
from tests.support.serving import pack, running
from tests.support.wire import SESSION_HEADER

from .report import Record, options

QUESTIONS = ("Which shapes are there?", "How many shapes are there?", "Is there a circle?", "What is in the middle?")
SHORT: dict[str, Any] = {"max_new_tokens": 8}
FIRST_PICTURE, PICTURES = 6_000, 12
TOTAL_S, SILENT_S, CONFIRM_S = 300.0, 4.0, 20
SLACK_S = 30.0
CHATS_AT_ONCE = 6


@dataclass(frozen=True)
class Step:
    """An operation of a chat. `kind`: ask, stream, leave, edit or retry. `picture`: shown with the question."""

    kind: str
    text: str = ""
    picture: bytes | None = None
    turn: int = 0


@dataclass(frozen=True)
class Said:
    """What must be equal of an answer in both runs."""

    text: str
    prompt_tokens: int


@dataclass
class Tally:
    """The outcome of all chats."""

    chats: int = 0
    answers: int = 0
    met: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    recovered: int = 0
    longest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


def client_faults(argv: list[str]) -> int:
    """Disturb every operation of the Python client at random, in front of each kind of server."""
    chosen = options("client-faults", client_faults.__doc__, argv, chats=120)
    record, tally = Record("client-faults", chosen), Tally()
    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llava-soak-")))
        (folder / "journal").mkdir()
        store = pack(folder, journal_dir=folder / "journal")
        instances = stack.enter_context(running(TorchServe(store), TorchServe(store)))
        servers = stack.enter_context(serving(instances, folder / "front"))
        pool = stack.enter_context(ThreadPoolExecutor(CHATS_AT_ONCE))
        work = [pool.submit(_hold, servers, f"{chosen.seed} {number}", tally) for number in range(chosen.chats)]
        for number, chat in enumerate(work, 1):
            chat.result()
            if number % 10 == 0:
                record.say(f"{number} of {chosen.chats} chats: {tally.answers} answers, {tally.lost} sessions lost")
        still_open = servers.open_sessions(CONFIRM_S + 30)
    record.figures |= {
        "chats": tally.chats,
        "answers": tally.answers,
        "faults_met": dict(sorted(tally.met.items())),
        "sessions_lost": tally.lost,
        "sessions_recovered": tally.recovered,
        "longest_call_s": round(tally.longest_s, 2),
        "wrong": tally.wrong,
        "failures": tally.failures,
    }
    record.check("every chat ended", not tally.failures, tally.failures[:3] or f"{tally.chats} chats")
    record.check("every answer is the undisturbed one", not tally.wrong, tally.wrong[:3] or f"{tally.answers} answers")
    record.check(
        "every lost session was recovered", tally.recovered == tally.lost, f"{tally.recovered} of {tally.lost}"
    )
    record.check("no call outlasted its time-out", tally.longest_s < TOTAL_S + SLACK_S, round(tally.longest_s, 1))
    record.check("no session stays open", not any(still_open), still_open)
    return record.finish()


def _hold(servers: Servers, seed: str, tally: Tally) -> None:
    """Hold one chat twice and compare."""
    rng = random.Random(seed)
    server = rng.choice(SERVERS)
    picture, steps = _picture(rng), list(_steps(rng))
    try:
        expected = _run(client_of(server, servers.urls[server]), picture, steps, _Undisturbed())
        with FaultProxy(servers.urls[server]) as proxy:
            timeouts = Timeouts(
                first_byte_s=SILENT_S, between_s=SILENT_S, total_s=TOTAL_S, close_s=TOTAL_S, confirm_s=CONFIRM_S
            )
            disturber = _Disturber(proxy, rng, servers.urls[server] if server != "endpoint" else "", tally)
            said = _run(client_of(server, proxy.url, timeout_s=timeouts), picture, steps, disturber)
    except Exception as error:
        tally.failures.append(f"chat {seed} ({server}): {type(error).__name__}: {error}")
        return
    with tally.lock:
        tally.chats += 1
        tally.answers += len(said)
    if said != expected:
        tally.wrong.append(f"chat {seed} ({server}): {steps} gave {said}, expected {expected}")


def _picture(rng: random.Random) -> bytes:
    return to_png(make_scene(HELD_OUT_SEEDS[FIRST_PICTURE + rng.randrange(PICTURES)]).draw())


def _steps(rng: random.Random) -> Iterator[Step]:
    """Yield three to seven operations."""
    turns = 0
    for _ in range(rng.randint(3, 7)):
        kinds = ["ask", "ask", "stream", "stream", "leave", *(["edit", "retry"] if turns else [])]
        kind = rng.choice(kinds)
        picture = _picture(rng) if kind in ("ask", "stream") and rng.random() < 0.25 else None
        turn = rng.randrange(turns) if kind == "edit" else 0
        if kind == "edit":
            turns = turn + 1
        elif kind in ("ask", "stream"):
            turns += 1
        yield Step(kind, rng.choice(QUESTIONS), picture, turn)


class _Undisturbed:
    """Leaves a chat alone."""

    @contextlib.contextmanager
    def around(self, chat: Chat | None) -> Iterator[None]:
        """Do nothing."""
        yield


class _Disturber(_Undisturbed):
    """Plans a random fault for each operation, and closes some sessions. `url`: of the server, "" without closes."""

    def __init__(self, proxy: FaultProxy, rng: random.Random, url: str, tally: Tally) -> None:
        self._proxy = proxy
        self._rng = rng
        self._url = url
        self._tally = tally

    @contextlib.contextmanager
    def around(self, chat: Chat | None) -> Iterator[None]:
        """Disturb and time one operation."""
        closed = self._close(chat) if chat is not None and self._url and self._rng.random() < 0.1 else None
        fault = _fault(self._rng) if self._rng.random() < 0.7 else None
        if fault is not None:
            self._proxy.disturb(fault, times=self._rng.choice((1, 1, 1, 2)))
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._proxy.forget()
        with self._tally.lock:
            self._tally.longest_s = max(self._tally.longest_s, seconds)
            if fault is not None and self._proxy.met(fault):
                self._tally.met[fault.name] += 1
            if chat is not None and closed is not None:
                self._tally.lost += 1
                self._tally.recovered += chat.session_id != closed

    def _close(self, chat: Chat) -> str:
        """Close the session as another client. Return its ID."""
        body, header = {"type": "close_session"}, {SESSION_HEADER: chat.session_id}
        httpx.post(f"{self._url}/invocations", json=body, headers=header, timeout=TOTAL_S, trust_env=False)
        return chat.session_id


def _fault(rng: random.Random) -> Fault:
    """Return a random fault."""
    server = rng.choice(list(Server))
    at = rng.choice((BEFORE_REPLY, 0, rng.randrange(1, 400)))
    pieces = rng.choice(((), (), (1,), (3, 1, 11), (40, 2)))
    return rng.choice(
        (
            Fault("latency", delay_s=rng.uniform(0.01, 0.2), pause_s=rng.uniform(0, 0.3), at=max(at, 0)),
            Fault("odd parts", pieces=rng.choice(((1,), (7,), (5, 1, 17)))),
            Fault("cut request", request_bytes=rng.randrange(0, 2000), stop=rng.choice((Stop.END, Stop.RESET))),
            Fault("half-closed request", half_close=True),
            Fault("cut reply", stop=Stop.END, at=at, server=server, pieces=pieces),
            Fault("reset reply", stop=Stop.RESET, at=at, server=server, pieces=pieces),
            Fault("half-closed reply", stop=Stop.HALF_CLOSE, at=max(at, 0), server=server),
            Fault("silence", stop=Stop.SILENCE, at=at, server=server),
        )
    )


def _run(endpoint: Endpoint, picture: bytes, steps: list[Step], disturber: _Undisturbed) -> list[Said]:
    """Hold a chat and return its answers."""
    said: list[Said] = []
    with disturber.around(None):
        chat = endpoint.open(picture, on_lost="replay")
    with chat:
        for step in steps:
            with disturber.around(chat):
                answer = _perform(chat, step)
            if answer is not None:
                said.append(Said(answer.text, answer.usage.prompt_tokens))
        with disturber.around(None):
            chat.close()
    return said


def _perform(chat: Chat, step: Step) -> Answer | None:
    """Perform an operation. Return its answer, or None for a stream that is left."""
    if step.picture is not None:
        chat.add_image(step.picture)
    if step.kind == "ask":
        return chat.ask(step.text, **SHORT)
    if step.kind == "edit":
        return chat.edit(step.turn, step.text, **SHORT)
    if step.kind == "retry":
        return chat.retry(**SHORT)
    with chat.stream(step.text, **SHORT) as stream:
        for _ in stream:
            if step.kind == "leave":
                return None
        return stream.answer if step.kind == "stream" else None
