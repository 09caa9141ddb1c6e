"""Clients as they should be: they repeat what failed in a way that may be repeated, with the same request id, and hold
scripted chats, each beside what the undisturbed server said.

Speaks the wire protocol only. Must not know who disturbs the server, or how.
"""

from __future__ import annotations

import base64
import itertools
import json
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from llava_sessions_client.lines import split_lines
from models.shapes.scenes import HELD_OUT_SEEDS, dialogue, make_scene
from tests.support.encoding import to_png
from tests.support.wire import SESSION_HEADER, ApiError

# No request may hang longer; a client waits for a reply's next bytes as long.
HANG_S = 30.0
# On a busy machine one start after another may take so long.
PATIENCE_S = 600.0
# What a request may be repeated after: ours says when (Retry-After), the others are of a TorchServe without its worker,
# or its proxy's.
_OURS = ("engine_restarting", "shutting_down")
_NOT_OURS = (500, 502, 503, 504, 507)
# An answer that lasts for as long as a test needs it, whatever tokens this machine's arithmetic draws.
LONG = {"max_new_tokens": 1000, "temperature": 9.0, "seed": 3, "ignore_eos": True}
T = dict


class Again(Exception):
    """The request failed in a way that may be repeated, after `pause_s`."""

    def __init__(self, reason: str, pause_s: float) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pause_s = pause_s


class GaveUp(Exception):
    """A request was repeated for too long."""


@dataclass(frozen=True)
class Said:
    """What a turn came to. A turn that had run twice would be seen in `prompt_tokens`, of the whole conversation."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str


@dataclass
class Tally:
    """What many clients went through. Thread-safe enough: each has a lock around its notes."""

    requests: int = 0
    repeated: Counter[str] = field(default_factory=Counter)
    longest_request_s: float = 0.0
    lost_s: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def note(self, seconds: float, reason: str | None) -> None:
        """One request, and why it has to be repeated, where it has."""
        with self.lock:
            self.requests += 1
            self.longest_request_s = max(self.longest_request_s, seconds)
            if reason is not None:
                self.repeated[reason] += 1

    def note_lost(self, seconds: float) -> None:
        """How long one request and its repetitions took in all."""
        with self.lock:
            self.lost_s.append(seconds)


class PatientChat:
    """One session, by a client that repeats."""

    def __init__(self, http: httpx.Client, tally: Tally | None = None, patience_s: float = PATIENCE_S) -> None:
        self._http = http
        self.tally = tally or Tally()
        self._patience_s = patience_s
        self.session_id = ""
        self.on_line: Callable[[], None] = lambda: None  # called for each line of a stream

    @property
    def headers(self) -> dict[str, str]:
        """What ties a request to this session."""
        return {SESSION_HEADER: self.session_id} if self.session_id else {}

    def open(self, picture: bytes, **options: object) -> PatientChat:
        """Open it on a picture."""
        image = base64.b64encode(picture).decode()
        return self._open({"image": image, **options})

    def resume(self, session_id: str, **options: object) -> PatientChat:
        """Open it where another session stopped."""
        return self._open({"resume": session_id, **options})

    def _open(self, fields: dict) -> PatientChat:
        body = {"type": "start_session", "request_id": str(uuid.uuid4()), **fields}
        self.session_id = self._persist(lambda: self._post(body))["session_id"]
        return self

    def ask(self, text: str, stream: bool = False, **options: object) -> Said:
        """Ask until there is an answer."""
        ids = {"request_id": str(uuid.uuid4()), "return_token_ids": True}
        body = {"type": "send_text_prompt", "prompt_text": text, "stream": stream, **ids, **options}
        return self._persist(lambda: self._stream(body) if stream else _said(self._post(body)))

    def close(self) -> None:
        """End it. A close whose reply was lost with the server finds nothing to close."""
        tries = itertools.count()

        def once() -> None:
            number = next(tries)
            try:
                self._post({"type": "close_session"})
            except ApiError as error:
                if error.code != "session_not_found" or number == 0:
                    raise

        self._persist(once)

    def _persist(self, send: Callable[[], T]) -> T:
        until, began = time.monotonic() + self._patience_s, time.monotonic()
        tries = 0
        while True:
            sent, reason, pause_s = time.monotonic(), None, 0.0
            tries += 1
            try:
                return send()
            except Again as again:
                reason, pause_s = again.reason, again.pause_s
            except httpx.TransportError as error:
                reason, pause_s = type(error).__name__, 0.3
            finally:
                now = time.monotonic()
                self.tally.note(now - sent, reason)
                if reason is None and tries > 1:
                    self.tally.note_lost(now - began)
            if time.monotonic() > until:
                raise GaveUp(f"{tries} tries in {self._patience_s:.0f} s, the last: {reason}")
            time.sleep(pause_s * random.uniform(0.5, 1.0))

    def _post(self, body: dict) -> dict:
        told = _checked(self._http.post("/invocations", json=body, headers=self.headers)).json()
        if "error" in told:  # the request was large, and failed after its status was sent
            raise _problem(200, told["error"], 1.0)
        return told

    def _stream(self, body: dict) -> Said:
        text = ""
        with self._http.stream("POST", "/invocations", json=body, headers=self.headers) as reply:
            if reply.status_code != httpx.codes.OK:
                reply.read()
            for line in map(json.loads, split_lines(_checked(reply).iter_bytes())):
                self.on_line()
                if "error" in line:
                    raise _problem(200, line["error"], 1.0)
                text += line["delta"]
                if "finish_reason" in line:
                    return _said({"response_text": text, **line})
        raise Again("stream without a last line", 0.3)


def _said(body: dict) -> Said:
    return Said(body["response_text"], tuple(body["token_ids"]), body["usage"]["prompt_tokens"], body["finish_reason"])


def _checked(reply: httpx.Response) -> httpx.Response:
    """The reply. Raises `Again` or `ApiError`."""
    if reply.is_success:
        return reply
    try:
        error = reply.json()["error"]
    except (ValueError, KeyError, TypeError):
        if reply.status_code in _NOT_OURS:
            raise Again(f"status {reply.status_code}", 0.5) from None
        raise ApiError(reply.status_code, "not_ours", reply.text[:200]) from None
    raise _problem(reply.status_code, error, float(reply.headers.get("Retry-After", 1)))


def _problem(status: int, error: dict, after_s: float) -> Exception:
    if error["code"] in _OURS:
        return Again(error["code"], after_s)
    return ApiError(status, error["code"], error["message"])


def client(url: str) -> httpx.Client:
    """For as many threads as there are sessions."""
    limits = httpx.Limits(max_connections=400, max_keepalive_connections=100)
    return httpx.Client(base_url=url, timeout=HANG_S, limits=limits, trust_env=False)


# --- scripts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """A picture and what is asked about it; `picture` is a PNG."""

    name: str
    picture: bytes
    questions: tuple[str, ...]


def scene_scripts(count: int, turns: int, first: int = 0) -> list[Script]:
    """Conversations about held-out scenes."""
    seeds = HELD_OUT_SEEDS[first : first + count]
    return [
        Script(
            str(seed), to_png(make_scene(seed).draw()), tuple(q.text for q in dialogue(make_scene(seed), seed, turns))
        )
        for seed in seeds
    ]


def undisturbed(http: httpx.Client, scripts: Sequence[Script]) -> list[list[Said]]:
    """What the server says when nobody else asks and nothing fails: one session after another."""
    told = []
    for script in scripts:
        chat = PatientChat(http, patience_s=0).open(script.picture)
        told.append([chat.ask(question) for question in script.questions])
        chat.close()
    return told


@dataclass(frozen=True)
class Wrong:
    """An answer that the undisturbed server did not give."""

    script: str
    question: str
    said: Said
    expected: Said


class Crowd:
    """Many sessions at once: each thread holds one scripted chat after another, at a random pace, until it is told to
    finish; then it ends the chat that it holds.
    """

    def __init__(
        self,
        http: httpx.Client,
        scripts: Sequence[Script],
        expected: Sequence[Sequence[Said]],
        sessions: int,
        seed: int,
        pause_s: float = 0.3,
    ) -> None:
        self._http = http
        self._scripts = scripts
        self._expected = expected
        self._next = itertools.count()
        self._pause_s = pause_s
        self._seed = seed
        self._enough = threading.Event()
        self.tally = Tally()
        self.chats = 0
        self.turns = 0
        self.wrong: list[Wrong] = []
        self.failures: list[str] = []
        self._threads = [
            threading.Thread(target=self._chat_on, args=(number,), daemon=True) for number in range(sessions)
        ]

    def start(self) -> Crowd:
        """Start them all."""
        for thread in self._threads:
            thread.start()
        return self

    def wait_turns(self, more: int) -> None:
        """Until so many more turns are finished; not longer than the clients have patience."""
        wanted, until = self.turns + more, time.monotonic() + PATIENCE_S
        while self.turns < wanted and not self.failures and time.monotonic() < until:
            time.sleep(0.01)

    def finish(self, timeout_s: float = PATIENCE_S) -> None:
        """Have each end its chat, and wait for that."""
        self._enough.set()
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
            if thread.is_alive():
                self.failures.append(f"{thread.name} hangs")

    def _chat_on(self, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        while not self._enough.is_set():
            index = next(self._next) % len(self._scripts)
            try:
                self._chat(self._scripts[index], self._expected[index], rng)
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")

    def _chat(self, script: Script, expected: Sequence[Said], rng: random.Random) -> None:
        chat = PatientChat(self._http, self.tally).open(script.picture)
        for question, right in zip(script.questions, expected, strict=True):
            time.sleep(rng.uniform(0, 2 * self._pause_s))
            said = chat.ask(question, stream=rng.random() < 0.5)
            with self.tally.lock:
                self.turns += 1
            if said != right:
                self.wrong.append(Wrong(script.name, question, said, right))
        chat.close()
        self.chats += 1
