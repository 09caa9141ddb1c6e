"""Kill or stop a process of the server repeatedly while 16 sessions chat without a pause.

The same sessions first chat undisturbed. Afterwards the server's resources must return to the level of that run.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.support.chats import HANG_S, Crowd, client, scene_scripts, undisturbed
from tests.support.serving import Served, pack

from .report import Record, check_crowd, check_level, level, options


def engine_kills(argv: list[str]) -> int:
    """Kill the engine process at random moments: while it computes, idles or loads."""

    def kill(served: Served, chats: Crowd, record: Record, rng: random.Random) -> None:
        # A few are killed before they are ready; many of those in a row would end the worker, as they should.
        if rng.random() < 0.8:
            _wait_random(chats, rng)
        else:
            time.sleep(rng.uniform(0, 2))
        _wait_for_another_engine(served, served.signal_engine(signal.SIGKILL))

    return _soak("engine-kills", engine_kills.__doc__, argv, kill, times=20)


def engine_stops(argv: list[str]) -> int:
    """Stop the engine process (SIGSTOP) for longer than engine_hang_s, three seconds here."""

    def stop(served: Served, chats: Crowd, record: Record, rng: random.Random) -> None:
        _wait_random(chats, rng)
        pid, began = served.signal_engine(signal.SIGSTOP), time.monotonic()
        _wait_for_another_engine(served, pid)
        record.figures.setdefault("replaced_after_s", []).append(round(time.monotonic() - began, 1))

    return _soak("engine-stops", engine_stops.__doc__, argv, stop, times=5, engine_hang_s=3)


def worker_kills(argv: list[str]) -> int:
    """Kill the worker process; the restarted server recovers its sessions from journal_dir."""

    def kill(served: Served, chats: Crowd, record: Record, rng: random.Random) -> None:
        _wait_random(chats, rng)
        seconds = served.lose_server(lambda: os.kill(served.worker_pid, signal.SIGKILL))
        record.figures.setdefault("ready_again_after_s", []).append(round(seconds, 1))

    return _soak("worker-kills", worker_kills.__doc__, argv, kill, times=5)


def server_kills(argv: list[str]) -> int:
    """Kill frontend, worker and engine together; the restarted server recovers all sessions."""

    def kill(served: Served, chats: Crowd, record: Record, rng: random.Random) -> None:
        _wait_random(chats, rng)
        seconds = served.lose_server(lambda: served.server.kill())
        record.figures.setdefault("ready_again_after_s", []).append(round(seconds, 1))

    return _soak("server-kills", server_kills.__doc__, argv, kill, times=5)


def _wait_random(chats: Crowd, rng: random.Random) -> None:
    """Some turns, and a part of one."""
    chats.wait_turns(rng.randint(1, 40))
    time.sleep(rng.uniform(0, 0.1))


def _soak(name: str, about: str | None, argv: list[str], harm: Callable, times: int, engine_hang_s: int = 60) -> int:
    chosen = options(name, about, argv, sessions=16, times=times, scripts=32, turns=5)
    record, rng = Record(name, chosen), random.Random(chosen.seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llava-soak-")))
        settings = {"engine_hang_s": engine_hang_s, "journal_dir": folder / "journal"}
        served = stack.enter_context(Served(pack(folder, sessions=4 * chosen.sessions, **settings)))
        http = stack.enter_context(client(served.url))
        scripts = scene_scripts(chosen.scripts, chosen.turns)
        record.say(f"what an undisturbed server says: {chosen.scripts} chats of {chosen.turns} turns")
        expected = undisturbed(http, scripts)

        def crowd(seed: int) -> Crowd:
            return Crowd(http, scripts, expected, chosen.sessions, seed).start()

        record.say(f"{chosen.sessions} sessions at once, still undisturbed")
        calm = crowd(chosen.seed)
        time.sleep(5)
        calm.finish()
        record.check("undisturbed sessions say the same side by side", not calm.wrong and not calm.failures, calm.chats)
        before = level(served, http, scripts[0])
        chats = crowd(chosen.seed + 1)
        for number in range(chosen.times):
            harm(served, chats, record, rng)
            record.say(f"{number + 1} of {chosen.times}: {chats.turns} turns so far, {len(chats.wrong)} wrong")
            if chats.failures:
                break
        chats.finish()
        record.figures["metrics"] = served.gauges(llava_open_sessions=0)
        check_crowd(record, chats)
        check_level(record, before, level(served, http, scripts[0]), ("java", "worker", "engine"))
        # What a killed writer had begun (.new-*) stays for ten minutes, in case another worker is writing it.
        left = sorted(path.name for path in (folder / "journal").iterdir())
        record.figures["left_in_journal_dir"] = left
        # A folder without a record is an open that its client was never told of.
        sessions = [name for name in left if any((folder / "journal" / name).glob("*.rec"))]
        record.check("no session is left in journal_dir", not sessions, f"{len(sessions)} of {len(left)} entries")
    return record.finish()


def _wait_for_another_engine(served: Served, pid: int) -> None:
    until = time.monotonic() + HANG_S
    while served.engine_pid in (pid, None):
        if time.monotonic() > until:
            raise AssertionError(f"engine {pid} was not replaced")
        time.sleep(0.02)
