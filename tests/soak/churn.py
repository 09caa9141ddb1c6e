"""Open, use, abandon, expire and close sessions for half an hour on a real server; check for leaks.

    python -m tests.soak.churn --minutes 30

The soak fails if memory, threads or open files of Java, the worker or the engine grow, or if a session stays open. It
also fails if an answer differs from the undisturbed one, or if a reply is an unexpected error.

Growth is the difference of two medians, because heap size and connections vary: the last fifth of the time after the
warm-up against the first fifth, 5 minutes each in the 30-minute run. Memory may grow by 3 %, threads and open files by
3 % or by two.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from bench import machine
from deploy.options import Parser
from deploy.serve.torchserve import TorchServe
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.encoding import to_png
from tests.support.server_metrics import read_metrics, wait_for_metrics
from tests.support.serving import Processes, pack
from tests.support.wire import SESSION_HEADER, ApiError, ChatSession

from .report import RESULTS, write

SESSIONS, TTL_S, IDLE_S = 64, 20, 5
SCENES, SAMPLE_S = 200, 10.0
QUESTIONS = ("Which shapes are there?", "How many shapes are there?", "What is in the middle?")
LONG = {"max_new_tokens": 400, "temperature": 9.0, "seed": 3, "ignore_eos": True}
FIGURES = {"rss_bytes": 0, "threads": 2, "files": 2}  # and how many more may be there
SHARE_ALLOWED = 1.03
# What a client of this soak may be told: the table is full, its old turn still runs, its time was up.
TOLERATED = {"capacity", "session_busy", "session_expired"}


@dataclass(frozen=True)
class Scene:
    """A picture, and what is answered about it when nobody disturbs."""

    picture: bytes
    answers: tuple[str, ...]


class Churn:
    """What the clients share: the server, the scenes, the end, and the books."""

    def __init__(self, http: httpx.Client, scenes: list[Scene], minutes: float) -> None:
        self.http = http
        self.scenes = scenes
        self.began = time.monotonic()
        self.until = self.began + minutes * 60
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    @property
    def over(self) -> bool:
        """Whether clients shall end."""
        return time.monotonic() > self.until

    def count(self, what: str) -> None:
        """Note that something happened."""
        with self._lock:
            self.counts[what] += 1

    def blame(self, what: str) -> None:
        """Note what must not happen."""
        print(f"{time.monotonic() - self.began:.0f} s: {what}", file=sys.stderr, flush=True)
        with self._lock:
            self.wrong.append(what)

    def live(self, seed: int) -> None:
        """One client after another, each with a session of its own, until the end."""
        chance = random.Random(seed)
        while not self.over:
            try:
                self._session(chance)
            except ApiError as error:
                self.count(f"refused {error.code}")
                if error.code not in TOLERATED:
                    self.blame(str(error))
                time.sleep(chance.uniform(0.2, 1.0))
            except httpx.HTTPError as error:
                request, session = error.request, error.request.headers.get(SESSION_HEADER)
                self.blame(f"{type(error).__name__} at {request.content[:40]!r} of session {session}")

    def _session(self, chance: random.Random) -> None:
        scene = chance.choice(self.scenes)
        chat = ChatSession.open(self.http, scene.picture)
        self.count("opened")
        for question, answer in list(zip(QUESTIONS, scene.answers, strict=True))[: chance.randint(0, len(QUESTIONS))]:
            time.sleep(chance.uniform(0.0, 0.8))
            if chance.random() < 0.5:
                said = chat.ask(question)["response_text"]
            else:
                said = "".join(line["delta"] for line in chat.stream(question))
            self.count("answered")
            if said != answer:
                self.blame(f"{question!r} is answered {said!r}, undisturbed {answer!r}")
        end = chance.choice((self._close, self._vanish, self._return, self._expire))
        end(chat, chance)
        self.count(end.__name__.strip("_"))

    def _close(self, chat: ChatSession, _: random.Random) -> None:
        chat.close()

    def _vanish(self, chat: ChatSession, chance: random.Random) -> None:
        """Drop the connection in the middle of a long answer, and never come back."""
        lines = chat.stream("Say something long", **LONG)
        for _ in range(chance.randint(1, 8)):
            next(lines, None)  # by chance it may say little
        lines.close()

    def _return(self, chat: ChatSession, chance: random.Random) -> None:
        """Drop the connection, then close the session."""
        self._vanish(chat, chance)
        chat.close()

    def _expire(self, chat: ChatSession, _: random.Random) -> None:
        """Say nothing until the session is over, and see that it is."""
        time.sleep(IDLE_S + 0.5)
        with contextlib.suppress(ApiError):
            chat.ask(QUESTIONS[0])
            self.blame("a session answered after its idle limit")


def undisturbed(http: httpx.Client, seed: int) -> Scene:
    """A scene with the answers of a session that nobody disturbs."""
    picture = to_png(make_scene(seed).draw())
    chat = ChatSession.open(http, picture)
    answers = tuple(chat.ask(question)["response_text"] for question in QUESTIONS)
    chat.close()
    return Scene(picture, answers)


def watch(churn: Churn, processes: Processes) -> list[dict]:
    """A sample every few seconds until the end."""
    series = []
    while not churn.over:
        series.append({"second": round(time.monotonic() - churn.began), **processes.sample()})
        time.sleep(SAMPLE_S)
    return series


def growth(series: list[dict], warm_up_s: float) -> dict[str, dict[str, dict[str, float]]]:
    """Of each process and figure: the medians of the first and the last fifth after the warm-up, and what they make."""
    warm = [sample for sample in series if sample["second"] >= warm_up_s]
    fifth = max(len(warm) // 5, 1)
    found: dict = {}
    for role in ("java", "worker", "engine"):
        for figure in FIGURES:
            first, last = (statistics.median(s[role][figure] for s in part) for part in (warm[:fifth], warm[-fifth:]))
            found.setdefault(role, {})[figure] = {"first": first, "last": last, "ratio": round(last / first, 4)}
    return found


def run(minutes: float, warm_up_minutes: float, seed: int) -> tuple[dict, list[str]]:
    """The soak; what it found, and what of it is wrong."""
    neighbours = machine.Neighbours()
    with tempfile.TemporaryDirectory(prefix="churn-") as folder:
        store = pack(Path(folder), SESSIONS, session_ttl_s=TTL_S, session_idle_s=IDLE_S)
        limits = httpx.Limits(max_connections=SESSIONS, max_keepalive_connections=SESSIONS)
        with (
            TorchServe(store) as server,
            httpx.Client(base_url=server.url, timeout=60, limits=limits, trust_env=False) as http,
        ):
            with ThreadPoolExecutor(4) as pool:
                scenes = list(pool.map(lambda number: undisturbed(http, number), HELD_OUT_SEEDS[:SCENES]))
            processes = Processes.of(server)
            churn = Churn(http, scenes, minutes)
            with ThreadPoolExecutor(SESSIONS) as pool:
                clients = [pool.submit(churn.live, seed * 1000 + number) for number in range(SESSIONS)]
                series = watch(churn, processes)
                for client in clients:
                    client.result()
            left = wait_for_metrics(server.metrics_url, timeout_s=TTL_S + 10, llava_open_sessions=0)
            if left["llava_open_sessions"]:
                churn.blame(f"{left['llava_open_sessions']:.0f} sessions stay open")
            if Processes.of(server).pids != processes.pids:
                churn.blame("a process is not the one that it was")
            figures = read_metrics(server.metrics_url)
    grown = growth(series, warm_up_minutes * 60)
    for role, by_figure in grown.items():
        for figure, told in by_figure.items():
            if told["last"] > max(told["first"] * SHARE_ALLOWED, told["first"] + FIGURES[figure]):
                churn.blame(f"{figure} of {role} grows by {told['ratio'] - 1:.1%}")
    settings = {"minutes": minutes, "warm_up_minutes": warm_up_minutes, "sessions": SESSIONS, "seed": seed}
    settings |= {"session_ttl_s": TTL_S, "session_idle_s": IDLE_S, "scenes": SCENES}
    found = {
        "settings": settings,
        "neighbours": neighbours.report(),
        "counts": dict(sorted(churn.counts.items())),
        "wrong": churn.wrong[:50],
        "growth": grown,
        "gauges_at_the_end": figures,
        "series": series[:: max(len(series) // 60, 1)],
    }
    return found, churn.wrong


def main(argv: list[str] | None = None) -> int:
    """Open, use, abandon, expire and close sessions for half an hour; check for leaks."""
    parser = Parser(prog="python -m tests.soak churn", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long sessions come and go")
    parser.add_argument("--warm-up-minutes", type=float, default=5.0, help="before growth counts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak_churn.json")
    options = parser.parse_args(argv)
    facts = machine.facts(torch.device("cpu"))
    found, wrong = run(options.minutes, options.warm_up_minutes, options.seed)
    write(options.out, {"facts": facts, **found})
    print(found["counts"])
    for role, by_figure in found["growth"].items():
        print(role, {figure: told["ratio"] for figure, told in by_figure.items()})
    print("\n".join(["wrong:", *wrong[:20]]) if wrong else "nothing wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
