"""Send hostile requests in a row, and check that memory is bounded meanwhile and comes back at the end.

Requests of the kinds that cost most: many large pictures of one colour, megabytes of base64 with spaces or escapes,
forms, long questions of special tokens, and sessions that hold encoded pictures. A second server runs with the
threshold for mmap that glibc would reach by itself, for comparison.
"""

from __future__ import annotations

import base64
import io
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from tests.support.chats import Script, client
from tests.support.encoding import to_png
from tests.support.serving import Processes, Served, pack
from tests.support.wire import SESSION_HEADER

from .isolation import QUESTIONS, pictures
from .report import Record, check_level, level, options

LARGEST_PIXELS = 40_000_000
# Pillow has 4 bytes per pixel.
MOST_GROWTH_BYTES = int(2.5 * 4 * LARGEST_PIXELS)
HELD_BYTES = 24 * 2**20
SAMPLE_S = 0.02
WARM_UP = 2
# glibc's own limits (mallopt(3)): it raises the threshold for mmap up to 32 MiB, and trims at twice that.
GLIBC = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20)}
ROLES = ("java", "worker", "engine")
JSON = {"Content-Type": "application/json"}


def flat(mode: str, width: int, height: int) -> str:
    """Return a PNG of one colour, in base64. It has a few kilobytes."""
    file = io.BytesIO()
    Image.new(mode, (width, height), 1).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def noise(number: int) -> str:
    """Return a PNG of about 4 MB, another one for each number, in base64."""
    file = io.BytesIO()
    Image.frombytes("L", (2000, 2000), os.urandom(4_000_000 - 1) + bytes([number % 256])).save(
        file, "PNG", compress_level=0
    )
    return base64.b64encode(file.getvalue()).decode()


class Attack:
    """Hostile requests against one server."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self.replies: Counter[str] = Counter()
        self.unexpected: list[str] = []
        bits = flat("1", 8000, 5000)
        self._clip = {"video": [bits] * 32}
        self._too_many = {"images": [bits] * 8}
        self._largest = {"images": [bits] * 2}
        self._large = {"images": [flat("RGBA", 4000, 2500)] * 4}
        self._escaped = {"image": "data:;base64," + "%41" * 9_000_000}
        self.kinds: dict[str, Callable[[], None]] = {
            "clip of 32 x 40 MP": lambda: self._open("clip of 32 x 40 MP", self._clip, {415}),
            "8 x 40 MP": lambda: self._open("8 x 40 MP", self._too_many, {413}),
            "2 x 40 MP": lambda: self._open("2 x 40 MP", self._largest, {200}),
            "4 x 10 MP with alpha": lambda: self._open("4 x 10 MP with alpha", self._large, {200}),
            "spaced base64": lambda: self._open("spaced base64", {"image": "AA " * 10_000_000}, {413}),
            "escaped base64": lambda: self._open(
                "escaped base64", {"image": "data:;base64," + "%41" * 9_000_000}, {413}
            ),
            "long path": lambda: self._open("long path", {"path": "a" * 30_000_000}, {400}),
            "special tokens": self._ask_special_tokens,
            "held pictures": self._hold_pictures,
        }

    def form(self) -> None:
        """Send a form of 6 MiB. What it is answered is another soak's matter."""
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        self._note("form", self._http.post("/invocations", content=b"a=&" * 2**21, headers=headers), {200, 400, 415})

    def _post(self, **fields: Any) -> httpx.Response:
        return self._http.post("/invocations", content=json.dumps(fields), headers=JSON)

    def _note(self, kind: str, reply: httpx.Response, expected: set[int]) -> None:
        self.replies[f"{kind}: {reply.status_code}"] += 1
        if reply.status_code not in expected:
            self.unexpected.append(f"{kind}: {reply.status_code} {reply.text[:200]}")

    def _open(self, kind: str, pictures: dict[str, Any], expected: set[int]) -> str | None:
        """Open a session and close it. Return its ID if it was opened."""
        reply = self._post(type="start_session", **pictures)
        self._note(kind, reply, expected)
        if reply.status_code != 200:
            return None
        session_id: str = reply.json()["session_id"]
        self._close(session_id)
        return session_id

    def _close(self, session_id: str) -> None:
        self._http.post(
            "/invocations",
            content=json.dumps({"type": "close_session", "session_id": session_id}),
            headers={**JSON, SESSION_HEADER: session_id},
        )

    def _ask_special_tokens(self) -> None:
        session_id = self._post(type="start_session", image=flat("L", 64, 64)).json()["session_id"]
        reply = self._post(type="send_text_prompt", session_id=session_id, prompt_text="<s>" * 10_922)
        self._note("special tokens", reply, {422})
        self._close(session_id)

    def _hold_pictures(self) -> None:
        """Open sessions with large pictures until one is rejected, then close them."""
        held = []
        for number in range(12):
            reply = self._post(type="start_session", image=noise(number))
            self._note("held picture", reply, {200, 429})
            if reply.status_code != 200:
                break
            held.append(reply.json()["session_id"])
        if len(held) != HELD_BYTES // 4_000_000 and len(held) != HELD_BYTES // 4_000_000 - 1:
            self.unexpected.append(f"{len(held)} sessions hold pictures")
        for session_id in held:
            self._close(session_id)


class Peaks:
    """The largest RSS of each process, sampled until `stop`."""

    def __init__(self, served: Served) -> None:
        self._processes = Processes.of(served.server)
        self.bytes = dict.fromkeys(ROLES, 0)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            for role in ROLES:
                rss = getattr(self._processes, role).memory_info().rss
                self.bytes[role] = max(self.bytes[role], rss)

    def stop(self) -> dict[str, int]:
        """Stop sampling. Return the peaks."""
        self._stopped.set()
        self._thread.join()
        return self.bytes


@contextmanager
def attacked(store: Path, env: dict[str, str] | None, requests: int, forms: bool, record: Record) -> Iterator[Any]:
    """Start a server and send it the requests. Yield the attack, the levels before and after, and the peaks."""
    with ExitStack() as stack:
        served = stack.enter_context(Served(store, env))
        http = stack.enter_context(client(served.url))
        attack = Attack(http)
        kinds = dict(attack.kinds)
        if forms:
            kinds["form"] = attack.form
        for kind in [*attack.kinds.values()] * WARM_UP:  # what is loaded once, the pools of threads, Java's heap
            kind()
        script = Script("level", to_png(pictures(1)[0].draw()), QUESTIONS)
        before = level(served, http, script)
        peaks = Peaks(served)
        for number in range(requests):
            list(kinds.values())[number % len(kinds)]()
            if number % 20 == 0:
                record.say(f"{number} of {requests} requests")
        most = peaks.stop()
        time.sleep(5)
        yield attack, before, level(served, http, script), most


def memory(argv: list[str]) -> int:
    """Check that hostile requests take bounded memory, which is given back."""
    chosen = options("memory", __doc__, argv, requests=200, control=36, forms=1)
    record = Record("memory", chosen)
    with tempfile.TemporaryDirectory(prefix="llava-soak-") as folder:
        store = pack(Path(folder), sessions=16, held_bytes=HELD_BYTES)
        with attacked(store, None, chosen.requests, bool(chosen.forms), record) as (attack, before, after, most):
            kept = {role: after[role]["rss_bytes"] - before[role]["rss_bytes"] for role in ROLES}
            growth = {role: most[role] - before[role]["rss_bytes"] for role in ROLES}
            record.figures |= {"replies": dict(attack.replies), "growth_bytes": growth, "kept_bytes": kept}
            record.check("every reply is the expected one", not attack.unexpected, attack.unexpected[:3] or "all")
            for role in ROLES:
                words = f"{growth[role] / 2**20:.0f} MiB at the peak"
                what = f"the {role} process grows by at most 2.5 times the largest decoded picture"
                record.check(what, growth[role] <= MOST_GROWTH_BYTES, words)
            check_level(record, before, after, ROLES)
        if chosen.control:
            with attacked(store, GLIBC, chosen.control, False, record) as (_, first, last, _):
                control = {role: last[role]["rss_bytes"] - first[role]["rss_bytes"] for role in ROLES}
                level_bytes = {"product": after["worker"]["rss_bytes"], "control": last["worker"]["rss_bytes"]}
                ratio = round(level_bytes["control"] / level_bytes["product"], 2)
                record.figures["control"] = {"kept_bytes": control, "worker_rss_bytes": level_bytes, "ratio": ratio}
                record.say(f"the worker with glibc's own threshold holds {ratio} times as much at the end")
    return record.finish()
