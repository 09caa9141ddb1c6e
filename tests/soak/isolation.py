"""Check that each of 200 sessions receives answers about its own picture only.

The pictures differ in one fact each, and the sessions ask in random order. Memory is short, so most KV caches are
offloaded or dropped. Engine and worker are killed meanwhile.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import httpx

from models.shapes.drawing import Background
from models.shapes.scenes import COLOURS, KINDS, PLACES, Scene, Shape
from tests.support.chats import PatientChat, Said, Script, Tally, client, undisturbed
from tests.support.encoding import to_png
from tests.support.serving import Served, pack

from .report import Record, check_level, check_tally, level, options

# The answers of each name its picture's colour, kind and place.
QUESTIONS = ("Which shapes are there?", "Where is the shape?", "What colour is the shape?")
BACKGROUND = Background("plain", (128, 128, 128), (128, 128, 128), 0.0, 4, 0)
# The KV cache of 256 tokens of the demo model in float32: what a session takes on the device, and at most on the host.
SESSION_BYTES = 256 * 4 * 2 * 192 * 4


def pictures(count: int) -> list[Scene]:
    """Scenes of one shape; each differs from its neighbour in the list by its colour, its kind or its place alone."""
    facts, turn = [], False
    for place in PLACES:
        for kind in KINDS if not turn else reversed(KINDS):
            colours = COLOURS if len(facts) // len(COLOURS) % 2 == 0 else tuple(reversed(COLOURS))
            facts += product((kind,), colours, (place,))
        turn = not turn
    return [Scene((Shape(*fact, size=0.75),), BACKGROUND) for fact in facts[:count]]


def isolation(argv: list[str]) -> int:
    """Check that no session receives an answer about the picture of another session."""
    chosen = options(
        "isolation", __doc__, argv, sessions=200, at_once=16, turns=5, engine_kills=6, worker_kills=2, resident=30
    )
    record, rng = Record("isolation", chosen), random.Random(chosen.seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llava-soak-")))
        budget = {"device_bytes": chosen.resident * SESSION_BYTES, "host_bytes": chosen.resident * SESSION_BYTES // 6}
        store = pack(folder, sessions=chosen.sessions, journal_dir=folder / "journal", session_ttl_s=1200, **budget)
        served = stack.enter_context(Served(store))
        http = stack.enter_context(client(served.url))
        scenes = pictures(chosen.sessions)
        asked = [tuple(rng.choice(QUESTIONS) for _ in range(chosen.turns)) for _ in scenes]
        scripts = [Script(_name(s), to_png(s.draw()), qs) for s, qs in zip(scenes, asked, strict=True)]
        record.say(f"what an undisturbed server says about each of {len(scripts)} pictures, one session at a time")
        expected = undisturbed(http, scripts)
        before = level(served, http, scripts[0])
        record.say("all of them at once, in random order")
        talk = Talk(http, served, scripts, expected, chosen.at_once)
        talk.hold(rng, _moments(chosen, rng), record)
        record.figures["metrics"] = served.gauges(llava_open_sessions=0)
        talk.check(record)
        check_tally(record, talk.tally)
        check_level(record, before, level(served, http, scripts[0]), ("worker", "engine"))
    return record.finish()


def _moments(chosen, rng: random.Random) -> dict[int, str]:
    """After how many turns what is killed."""
    turns = rng.sample(range(chosen.at_once, chosen.sessions * chosen.turns), chosen.engine_kills + chosen.worker_kills)
    harms = ["engine"] * chosen.engine_kills + ["worker"] * chosen.worker_kills
    rng.shuffle(harms)
    return dict(zip(turns, harms, strict=True))


class Talk:
    """All sessions, open at once; some threads speak for them."""

    def __init__(
        self, http: httpx.Client, served: Served, scripts: list[Script], expected: list[list[Said]], at_once: int
    ) -> None:
        self.tally = Tally()
        self._served = served
        self._scripts = scripts
        self._expected = expected
        self._at_once = at_once
        self._chats = [PatientChat(http, self.tally) for _ in scripts]
        self._said: list[list[Said]] = [[] for _ in scripts]
        self._tiers: Counter[str] = Counter()
        self._turns = 0
        self._lock = threading.Lock()
        self.failures: list[str] = []

    def hold(self, rng: random.Random, harms: dict[int, str], record: Record) -> None:
        """Open all, let them speak in random order, each its own turns in theirs, and close them; meanwhile, kill."""
        order = [index for index in range(len(self._scripts)) for _ in self._scripts[index].questions]
        rng.shuffle(order)
        locks = [threading.Lock() for _ in self._scripts]

        def speak(index: int) -> None:
            with locks[index]:
                question = self._scripts[index].questions[len(self._said[index])]
                self._said[index].append(self._chats[index].ask(question, stream=index % 2 == 0))
            with self._lock:
                self._turns += 1

        ended = threading.Event()
        killer = threading.Thread(target=self._kill, args=(harms, ended, record), daemon=True)
        with ThreadPoolExecutor(self._at_once) as pool:
            self._each(pool, lambda index: self._chats[index].open(self._scripts[index].picture), range(len(locks)))
            killer.start()
            self._each(pool, speak, order)
            ended.set()
            killer.join()
            self._each(pool, lambda index: self._chats[index].close(), range(len(locks)))

    def _each(self, pool: ThreadPoolExecutor, work, indices) -> None:
        for future in [pool.submit(work, index) for index in indices]:
            try:
                future.result()
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")

    def _kill(self, harms: dict[int, str], ended: threading.Event, record: Record) -> None:
        for turns, what in sorted(harms.items()):
            while self._turns < turns and not ended.wait(0.05):
                pass
            figures = self._served.gauges(timeout_s=0)
            tiers = {tier: int(figures.get(f"llava_{tier}_sessions", 0)) for tier in ("resident", "offloaded", "cold")}
            self._tiers |= Counter(tiers)
            record.say(f"after {self._turns} turns the {what} is killed; {tiers}")
            if what == "engine":
                self._served.signal_engine(signal.SIGKILL)
            else:
                self._served.lose_server(lambda: os.kill(self._served.worker_pid, signal.SIGKILL))

    def check(self, record: Record) -> None:
        """Each answer is what is said of its own picture, and none is what is said only of another one's."""
        wrong, foreign = [], []
        texts_of = [
            {(q, said.text) for q, said in self._turns_of(i, self._expected)} for i in range(len(self._scripts))
        ]
        everybody = set().union(*texts_of)
        for index, own in enumerate(texts_of):
            for number, (question, said) in enumerate(self._turns_of(index, self._said)):
                if said != self._expected[index][number]:
                    wrong.append((self._scripts[index].name, question, said.text))
                    if (question, said.text) not in own and (question, said.text) in everybody:
                        foreign.append(wrong[-1])
        distinct = len({tuple(said.text for said in told) for told in self._expected})
        right = sum(_tells(script.name, told) for script, told in zip(self._scripts, self._expected, strict=True))
        turns = sum(map(len, self._said))
        wanted = sum(len(script.questions) for script in self._scripts)
        record.figures |= {"turns": turns, "most_in_tier": dict(self._tiers), "wrong": wrong, "failures": self.failures}
        record.figures |= {"pictures_told_apart": distinct, "pictures_told_rightly": right}
        record.check("every session finished its chat", turns == wanted and not self.failures, f"{turns} of {wanted}")
        record.check("not one answer is from another session's picture", not foreign, len(foreign))
        record.check("every greedy answer is the undisturbed run's", not wrong, f"{len(wrong)} of {turns}")
        many = {tier: self._tiers[tier] for tier in ("resident", "offloaded", "cold")}
        record.check("sessions were on the device, on the host and cold", all(many.values()), many)

    def _turns_of(self, index: int, told: list[list[Said]]) -> list[tuple[str, Said]]:
        return list(zip(self._scripts[index].questions, told[index], strict=False))


def _name(scene: Scene) -> str:
    (shape,) = scene.objects
    return f"{shape.name} at {shape.place}"


def _tells(name: str, told: list[Said]) -> bool:
    """Whether each answer names something of the picture and nothing else."""
    words = set(name.replace(" at ", " ").split())
    others = {*COLOURS, *KINDS} - words
    return all(not others & set(said.text.rstrip(".").split()) for said in told)
