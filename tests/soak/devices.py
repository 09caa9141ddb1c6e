"""Kill one of two engines repeatedly while sessions on both of them chat.

The server's log shows which engine holds each session. Only the sessions of a killed engine may be interrupted or
rebuilt, each of them once for a kill.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from llava_sessions.chat.transcript import short_id
from tests.support.chats import PatientChat, Said, Script, Tally, client, scene_scripts, undisturbed
from tests.support.placements import Placements
from tests.support.serving import Served, pack

from .report import Record, check_tally, options

ENGINES = 2
_PATIENCE_S = 120.0
_POLL_S = 0.02


def devices(argv: list[str]) -> int:
    """Kill one of two engines of a server while sessions on both of them chat."""
    chosen = options("devices", __doc__, argv, sessions=40, turns=10, at_once=8, kills=5, pause_ms=200)
    record = Record("devices", chosen)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llava-soak-")))
        listed = f"[{', '.join(['cpu'] * ENGINES)}]"
        served = stack.enter_context(Served(pack(folder, sessions=4 * chosen.at_once, devices=listed)))
        http = stack.enter_context(client(served.url))
        scripts = scene_scripts(chosen.sessions, chosen.turns)
        record.say(f"what an undisturbed server says: {chosen.sessions} chats of {chosen.turns} turns")
        expected = undisturbed(http, scripts)
        begin = len(served.log())
        record.say(f"the same chats, {chosen.at_once} at once, while engines are killed")
        talk = Talk(served, http, scripts, chosen)
        talk.hold(record)
        record.figures["metrics"] = served.gauges(llava_open_sessions=0)
        talk.check(record, expected, Placements.read(served.log()[begin:]))
    return record.finish()


@dataclass
class _Chat:
    """One session. `interrupted`: turns with a request that failed. `gaps`: between two lines of a stream: end, length.

    Times are in seconds of the monotonic clock. `gaps` has no turn that was interrupted.
    """

    session_id: str = ""
    said: list[Said] = field(default_factory=list)
    interrupted: int = 0
    gaps: list[tuple[float, float]] = field(default_factory=list)


class Talk:
    """The sessions. Some threads hold them one after another, so that new sessions are placed all the time."""

    def __init__(
        self, served: Served, http: httpx.Client, scripts: Sequence[Script], chosen: argparse.Namespace
    ) -> None:
        self._served = served
        self._http = http
        self._scripts = scripts
        self._chosen = chosen
        self._tally = Tally()
        self._chats = [_Chat() for _ in scripts]
        self._total = len(scripts) * chosen.turns
        self._turns = 0
        self._most = 0  # turns that may begin
        self._gate = threading.Condition()
        self._outages: list[tuple[float, float]] = []
        self._failures: list[str] = []

    def hold(self, record: Record) -> None:
        """Hold all chats, and kill an engine several times, evenly over the turns.

        So many turns may begin before the next engine is up that sessions chat during each outage.
        """
        rng = random.Random(self._chosen.seed)
        part = self._total // (self._chosen.kills + 1)
        with ThreadPoolExecutor(self._chosen.at_once) as pool:
            for index in range(len(self._scripts)):
                pool.submit(self._try_chat, index)
            for number in range(1, self._chosen.kills + 1):
                self._allow((number + 1) * part)
                self._await(lambda at=number * part: self._turns >= at)
                self._kill(record, rng)
            self._allow(self._total)

    def _allow(self, turns: int) -> None:
        with self._gate:
            self._most = turns
            self._gate.notify_all()

    def _kill(self, record: Record, rng: random.Random) -> None:
        """Kill an engine, and wait until another one has replaced it."""
        before = len(Placements.read(self._served.log()).up)
        began_s = time.monotonic()
        os.kill(rng.choice(self._served.engine_pids), signal.SIGKILL)
        self._await(lambda: len(Placements.read(self._served.log()).up) > before)
        self._outages.append((began_s, time.monotonic()))
        lost = Placements.read(self._served.log()).lost[-1]
        record.say(f"{self._turns} turns; {lost} was killed and is back after {time.monotonic() - began_s:.1f} s")

    def _await(self, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + _PATIENCE_S
        while not holds():
            if time.monotonic() > until or self._failures:
                raise AssertionError(f"an engine was not replaced, or the chats do not go on: {self._failures}")
            time.sleep(_POLL_S)

    def _try_chat(self, index: int) -> None:
        try:
            self._chat(self._scripts[index], self._chats[index], random.Random(f"{self._chosen.seed} {index}"))
        except Exception as error:
            self._failures.append(f"{type(error).__name__}: {error}")

    def _chat(self, script: Script, mine: _Chat, rng: random.Random) -> None:
        tally = Tally()
        chat = PatientChat(self._http, tally).open(script.picture)
        mine.session_id = chat.session_id
        for question in script.questions:
            time.sleep(2e-3 * self._chosen.pause_ms * rng.uniform(0.1, 1))
            with self._gate:
                self._gate.wait_for(lambda: self._turns < self._most, _PATIENCE_S)
            times: list[float] = []
            chat.on_line = lambda times=times: times.append(time.monotonic())
            failed = tally.repeated.total()
            mine.said.append(chat.ask(question, stream=True))
            if tally.repeated.total() > failed:
                mine.interrupted += 1
            else:
                mine.gaps += [(after, after - before) for before, after in itertools.pairwise(times)]
            with self._gate:
                self._turns += 1
        chat.close()
        with self._gate:
            self._tally.requests += tally.requests
            self._tally.repeated += tally.repeated
            self._tally.lost_s += tally.lost_s
            self._tally.longest_request_s = max(self._tally.longest_request_s, tally.longest_request_s)

    def check(self, record: Record, expected: list[list[Said]], found: Placements) -> None:
        """Check the answers, and that a killed engine harmed its own sessions only."""
        wrong = [
            (script.name, question)
            for script, chat, rights in zip(self._scripts, self._chats, expected, strict=True)
            for question, said, right in zip(script.questions, chat.said, rights, strict=False)
            if said != right
        ]
        turns = sum(len(chat.said) for chat in self._chats)
        record.figures |= {"turns": turns, "failures": self._failures, "wrong": wrong}
        whole = turns == self._total and not self._failures
        record.check("every session finished its chat", whole, f"{turns} of {self._total} turns")
        record.check("every greedy answer is the undisturbed run's", not wrong, f"{len(wrong)} of {turns}")
        record.check("engines were killed", len(found.lost) == self._chosen.kills, found.lost)
        self._check_others(record, found)
        self._note_gaps(record)
        check_tally(record, self._tally)

    def _check_others(self, record: Record, found: Placements) -> None:
        """Check that no session was interrupted or rebuilt more often than its engines died."""
        places = [found.devices[short_id(chat.session_id)] for chat in self._chats]
        losses = [found.losses.get(short_id(chat.session_id), 0) for chat in self._chats]
        on = {device: sum(device in one for one in places) for device in sorted({d for one in places for d in one})}
        rebuilt = sum(len(one) - 1 for one in places)
        interrupted = [chat.interrupted for chat in self._chats]
        without_reason = sum(max(count - most, 0) for count, most in zip(interrupted, losses, strict=True))
        record.figures |= {
            "sessions_by_device": on,
            "sessions_that_lost_an_engine": sum(map(bool, losses)),
            "interrupted_turns": sum(interrupted),
            "rebuilt": rebuilt,
        }
        record.check("sessions were on both engines", len(on) == ENGINES, on)
        record.check("sessions lost their engine and were rebuilt", rebuilt > 0, rebuilt)
        counted = record.figures["metrics"].get("llava_rebuilds_total", 0)
        record.check("the server counts the same rebuilds", counted == rebuilt, f"{counted:.0f} of {rebuilt}")
        record.check("no session was rebuilt while its engine lived", not found.unexplained, len(found.unexplained))
        record.check("no turn was interrupted while its engine lived", not without_reason, without_reason)

    def _note_gaps(self, record: Record) -> None:
        """Note the pauses within answers that were not interrupted: while an engine was absent, and else."""
        outages = self._outages
        gaps = [gap for chat in self._chats for gap in chat.gaps]
        during = [length for at, length in gaps if any(begin <= at <= end for begin, end in outages)]
        calm = [length for at, length in gaps if not any(begin <= at <= end for begin, end in outages)]
        record.figures |= {
            "outages_s": [round(end - begin, 1) for begin, end in outages],
            "gap_ms_of_the_other_engine_during_outages": _spread(during),
            "gap_ms_without_outage": _spread(calm),
        }


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]
    at = {"median": 0.5, "p99": 0.99, "longest": 1.0}
    found = {
        name: round(1e3 * ordered[min(int(part * len(ordered)), len(ordered) - 1)], 1) for name, part in at.items()
    }
    return {"count": len(seconds), **found}
