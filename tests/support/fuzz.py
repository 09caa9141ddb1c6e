"""Send malformed requests to HAProxy and a real server while sessions chat on, and judge every reply.

Requests are structures by hypothesis, real payloads and pictures with flipped bits and cut ends, decompression bombs,
random headers, forms, multipart bodies, odd content types, offers of HTTP/2, bodies that cost memory or time, and slow,
half-closed and broken connections; some name sessions of others. A run fails if

- a process was replaced,
- a complete request gets no reply, or one that is not documented,
- a session beside the requests answers differently from an undisturbed one,
- a reply contains anything of another session, or
- not all sessions can be opened afterwards.

The same seed makes the same requests; which of them overlap depends on the threads. Each thread has its own session
IDs: TorchServe leaves a request without a reply if it is queued on a sequence that ends at that moment. An idle session
can expire at such a moment too, so a few requests may go unanswered; the record contains their number.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import random
import secrets
import socket
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import hypothesis
from hypothesis import strategies as st

from deploy.serve.haproxy import HAProxy, find_haproxy
from deploy.serve.ports import free_ports
from deploy.serve.processes import Guard
from deploy.serve.torchserve import TorchServe
from llava_sessions.errors import STATUS_OF_CODE
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.encoding import to_png
from tests.support.server_metrics import wait_for_metrics
from tests.support.serving import Processes, pack, running
from tests.support.wire import SESSION_HEADER, ApiError, ChatSession

SESSIONS, TTL_S, IDLE_S = 32, 60, 8
THREADS, CONTROLS = 12, 3
ANSWER_S = 60.0  # a whole request must be answered by then
MOST_UNANSWERED = 0.0005  # of all requests, see above
MINE, THEIRS = "@mine@", "@theirs@"
# What HAProxy answers by itself. TorchServe's own errors reach no client.
HAPROXY = {"not_found": 404, "method_not_allowed": 405, "request_timeout": 408}
PAGE = b"<html>"  # of HAProxy 2.6, for what it cannot parse as HTTP; no configuration replaces it
PAGE_STATUSES = {400, 413, 422, 501}
# No engine dies and nothing stops here, and no request may be our fault.
UNWANTED = {"internal", "engine_restarting", "shutting_down"}
FORM, MULTIPART = "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"
PATHS = (b"/", b"/ping", b"/models", b"/predictions/none", b"/v1/models", b"/v1/chat/completions")
CONTENT_TYPES = (FORM, MULTIPART, "text/plain", "text/csv", "image/png", "application/xml", "*/*", ";", "x" * 300, "")
H2C = {"Connection": "Upgrade, HTTP2-Settings, close", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAA"}
# Bodies whose cost is out of proportion to what they say.
HEAVY = (
    b"a=&" * (1 << 21),
    b'{"type": "start_session", "image": "' + b"AA " * (1 << 20) + b'"}',
    b'{"type": "send_text_prompt", "session_id": "nobody", "prompt_text": "' + b"<s>" * 10_922 + b'"}',
    b'{"type": "start_session", "path": "' + b"a" * (1 << 22) + b'"}',
    b'{"type": "start_session", "images": [' + b'"AAAA",' * 100_000 + b'"AAAA"]}',
    b"[" * (1 << 20),
    b'{"type": "start_session", "video": "' + b"AAAA" * (1 << 20) + b'"}',
    b'{"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,'
    + b"A," * (1 << 15)
    + b'"}}]}]}',
)
QUESTIONS = ("Which shapes are there?", "How many shapes are there?", "What is in the middle?")


def encoded(picture_format: str) -> bytes:
    """A small real picture."""
    held = io.BytesIO()
    make_scene(HELD_OUT_SEEDS[7]).draw(72).save(held, picture_format)
    return held.getvalue()


def png_bomb(side: int, fill: int) -> bytes:
    """A few bytes that claim a picture of so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(fill), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


PICTURES = [encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
ODD_PICTURES = [
    png_bomb(50_000, 1_000_000),
    png_bomb(6_000, 1_000_000),
    png_bomb(1, 100),
    b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x00\x00\x00;",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"%PDF-1.4\n",
    b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(30),
    b"\xff\xd8\xff\xe0" + bytes(500),
    b"\x00\x00\x00\x20ftypavif" + bytes(100),
    b"II*\x00\xff\xff\xff\x7f" + bytes(50),
    b"BM" + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
]
SMALL = base64.b64encode(PICTURES[1]).decode()

# --- structures -------------------------------------------------------------------------------------------------------

_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_anything = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
_ids = st.sampled_from([MINE, MINE, MINE, THEIRS, "", "NEW_SESSION", "a;b", "../..", "é", "x" * 300])
_plausible = {
    "session_id": _ids,
    "session_token": st.text(min_size=16, max_size=16, alphabet="abc"),
    "image": st.sampled_from([SMALL, "data:image/png;base64," + SMALL, "data:,x", "****", SMALL[:-9], ""]),
    "images": st.lists(st.sampled_from([SMALL, "AAAA"]), max_size=10),
    "path": st.sampled_from(
        ["https://127.0.0.1/a", "https://2130706433/", "s3://b/k", "/etc/passwd", "file:///x", "\n"]
    ),
    "video": st.lists(st.just(SMALL), max_size=3)
    | st.sampled_from(
        ["data:video/mp4;base64,AAAAIGZ0eXBpc29t", "https://127.0.0.1/a.mp4", "s3://b/k", "/etc/passwd", "AAAA"]
    ),
    "video_frames": st.integers(0, 40),
    "prompt_text": st.sampled_from(QUESTIONS) | st.text(max_size=50),
    "stream": st.booleans(),
    "max_new_tokens": st.integers(1, 6),
    "temperature": st.floats(0, 3),
    "top_p": st.floats(0.1, 1),
    "seed": st.integers(0, 99),
    "stop": st.text(min_size=1, max_size=4) | st.lists(st.text(max_size=4), max_size=3),
    "ignore_eos": st.booleans(),
    "return_token_ids": st.booleans(),
    "request_id": st.text(min_size=10, max_size=70, alphabet="abc-"),
    "deadline_ms": st.integers(1, 1000),
    "resume": _ids,
    "ünknown": _anything,
}
_types = st.sampled_from(["start_session", "send_text_prompt", "send_text_prompt", "close_session", "cancel"])
_objects = st.fixed_dictionaries(
    {"type": _types | _types | _types | _anything},
    optional={name: value | value | value | _anything for name, value in _plausible.items()},
)
# Most are meant well: the fields of one type, each of them as it should be.
_meant_well = st.one_of(
    st.fixed_dictionaries({"type": st.just("start_session"), "image": _plausible["image"]}),
    st.fixed_dictionaries(
        {"type": st.just("send_text_prompt"), "prompt_text": _plausible["prompt_text"]},
        optional={name: _plausible[name] for name in ("stream", "max_new_tokens", "temperature", "stop", "session_id")},
    ),
)
_structures = _meant_well | _objects | _objects | _anything


def structures(count: int, seed: int) -> list[str]:
    """So many JSON texts; the same for the same seed."""
    found: list[str] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(_structures)
    def collect(value: object) -> None:
        found.append(json.dumps(value))

    collect()
    chance = random.Random(seed)
    return (found + chance.choices(found, k=max(count - len(found), 0)))[:count]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """With flipped bits, a cut end, or a piece that is doubled, gone or something else."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        where = chance.randrange(len(changed) + 1)
        match chance.randrange(5):
            case 0 if where < len(changed):
                changed[where] ^= 1 << chance.randrange(8)
            case 1:
                del changed[where:]
            case 2:
                del changed[where : where + chance.randrange(20)]
            case 3:
                changed[where:where] = chance.randbytes(chance.randrange(1, 9))
            case _:
                changed[where:where] = changed[max(where - 20, 0) : where]
    return bytes(changed)


# --- the run ----------------------------------------------------------------------------------------------------------


class Fuzz:
    """What all threads share: where the server is, whose sessions are chatting beside, and the books."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.address = (host, int(port))
        self.url = url
        self.memory: dict[str, dict[str, int]] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.unanswered: list[str] = []
        self.secrets: set[str] = set()
        self.theirs: list[str] = []
        self.over = threading.Event()
        self._lock = threading.Lock()

    def count(self, kind: str, outcome: str) -> None:
        """Note what came of a request."""
        with self._lock:
            self.counts[f"{kind}: {outcome}"] += 1

    def blame(self, what: str) -> None:
        """Note what must not happen."""
        print(what, file=sys.stderr, flush=True)
        with self._lock:
            self.wrong.append(what)

    def control(self, number: int) -> int:
        """Chat again and again, with a token and a word that nobody else may see. How many answers were compared."""
        compared = 0
        picture = to_png(make_scene(HELD_OUT_SEEDS[300 + number]).draw())
        word = f"canary{secrets.token_hex(6)}"
        questions = [f"{question} {word}" for question in QUESTIONS]
        with httpx.Client(base_url=self.url, timeout=ANSWER_S, trust_env=False) as own:
            expected = self._chat(own, picture, questions, word)
            while not self.over.is_set():
                try:
                    said = self._chat(own, picture, questions, word)
                except ApiError as error:
                    # The table, or the frontend, is full of fuzz: that is what they say then, and what passes.
                    if error.status not in (429, 503) or error.code in UNWANTED:
                        self.blame(f"control: {error}")
                    self.count("control", f"{error.status} {error.code}")
                    time.sleep(0.2)
                except httpx.HTTPError as error:
                    self.blame(f"control: {type(error).__name__}")
                else:
                    compared += len(said)
                    if said != expected:
                        self.blame(f"control: {said!r} instead of {expected!r}")
        return compared

    def _chat(self, own: httpx.Client, picture: bytes, questions: list[str], word: str) -> list[str]:
        token = f"token-{word}"
        image = base64.b64encode(picture).decode()
        body = {"type": "start_session", "image": image, "session_token": token}
        reply = own.post("/invocations", json=body)
        if reply.status_code != httpx.codes.OK:
            raise ApiError(
                reply.status_code, reply.json().get("error", {}).get("code", "not_ours"), "no control session"
            )
        chat = ChatSession(own, reply.json()["session_id"], "")
        self.secrets |= {word, chat.session_id}
        self.theirs.append(chat.session_id)
        try:
            return [chat.ask(question, session_token=token)["response_text"] for question in questions]
        finally:
            self.theirs.remove(chat.session_id)
            closing = {"type": "close_session", "session_token": token}
            own.post("/invocations", json=closing, headers=chat.headers)

    def attack(self, number: int, texts: list[str], seed: int) -> None:
        """Send one request for each of the texts: that text, or something worse."""
        chance = random.Random(f"{seed}/{number}")
        attacker = _Attacker(self, number, chance)
        for text in texts:
            try:
                attacker.send(text)
            except Exception as error:
                self.blame(f"attacker: {type(error).__name__}: {error}")
        attacker.leave()


class _Attacker:
    """One thread's requests, and the session that it has."""

    def __init__(self, fuzz: Fuzz, number: int, chance: random.Random) -> None:
        self._fuzz = fuzz
        self._name = f"nobody-{number}"
        self._chance = chance
        self._mine: str | None = None

    def send(self, text: str) -> None:
        """One request."""
        kinds: list[tuple[float, Callable[[str], None]]] = [
            (50, self._structure),
            (15, self._payload),
            (15, self._picture),
            (8, self._headers),
            (5, self._slow),
            (4, self._half_closed),
            (3, self._broken_http),
            (5, self._odd_type),
            (3, self._form),
            (3, self._multipart),
            (3, self._upgrade),
            (0.5, self._heavy),
        ]
        (kind,) = self._chance.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])
        kind(text)

    def leave(self) -> None:
        """Close what is open."""
        mine, self._mine = self._mine, None
        if mine is not None:
            self._ask(b'{"type": "close_session"}', "leave", {SESSION_HEADER: mine})

    # --- kinds of requests ---

    def _structure(self, text: str) -> None:
        headers = {}
        if self._mine is not None and self._chance.random() < 0.7:
            headers[SESSION_HEADER] = self._mine
        self._ask(self._filled(text), "structure", headers)

    def _payload(self, _: str) -> None:
        body = self._chance.choice(
            [
                {"type": "start_session", "image": SMALL},
                {"type": "send_text_prompt", "prompt_text": QUESTIONS[0], "max_new_tokens": 3},
                {"type": "close_session"},
                {"type": "cancel"},
            ]
        )
        self._ask(mutated(json.dumps(body).encode(), self._chance), "payload", self._session())

    def _picture(self, _: str) -> None:
        if self._chance.random() < 0.15:
            data = self._chance.choice(ODD_PICTURES)
        else:
            data = mutated(self._chance.choice(PICTURES), self._chance)
        body = {"type": "start_session", "image": base64.b64encode(data).decode()}
        self._ask(json.dumps(body).encode(), "picture", {})

    def _headers(self, text: str) -> None:
        names = [SESSION_HEADER, SESSION_HEADER.lower(), "X-Amzn-SageMaker-Inference-Id", "Content-Type", "Accept"]
        names += [
            "X-Amzn-SageMaker-Closed-Session-Id",
            "ts_request_sequence_start",
            "url_path",
            "Expect",
            "x-llava-end-sequence",
            "é",
        ]
        values = [self._name, f"{self._name};a", "NEW_SESSION", "text/plain", "multipart/form-data; boundary=x", ""]
        values += [
            "application/octet-stream",
            "100-continue",
            "true",
            "\x7f",
            "ä€".encode().decode("latin-1"),
            "x" * 7000,
        ]
        picked = {self._chance.choice(names): self._chance.choice(values) for _ in range(self._chance.randrange(1, 4))}
        self._ask(self._filled(text), "headers", picked, strict=False)

    def _odd_type(self, text: str) -> None:
        headers = {"Content-Type": self._chance.choice(CONTENT_TYPES)}
        if self._chance.random() < 0.2:
            headers["Content-Encoding"] = self._chance.choice(("gzip", "br", "identity", "é"))
        self._ask(self._filled(text), "odd type", {**self._session(), **headers})

    def _form(self, text: str) -> None:
        pairs = "&".join(f"{number}={text[:20]}%" for number in range(self._chance.randrange(50)))
        body = self._chance.choice((self._filled(text), pairs.encode("utf-8", "replace"), b"=" * 99, b"%", b"a=%zz"))
        self._ask(body, "form", {**self._session(), "Content-Type": FORM})

    def _multipart(self, text: str) -> None:
        part = b'--x\r\nContent-Disposition: form-data; name="body"\r\n\r\n' + self._filled(text)
        body = self._chance.choice((part, part + b"\r\n--x--\r\n", b"--x--", mutated(part, self._chance)))
        self._ask(body, "multipart", {**self._session(), "Content-Type": MULTIPART})

    def _upgrade(self, text: str) -> None:
        self._ask(self._filled(text), "upgrade", {**self._session(), **H2C})

    def _heavy(self, _: str) -> None:
        self._ask(self._chance.choice(HEAVY), "heavy", {"Content-Type": self._chance.choice(CONTENT_TYPES)})

    def _slow(self, text: str) -> None:
        self._ask(self._filled(text), "slow", self._session(), pieces=self._chance.randrange(2, 6))

    def _half_closed(self, text: str) -> None:
        self._ask(self._filled(text), "half closed", self._session(), half_close=True, strict=False)

    def _broken_http(self, text: str) -> None:
        whole = _request(self._filled(text), {})
        broken = mutated(whole[:200], self._chance) + whole[200:]
        data = self._chance.choice(
            [
                broken,
                broken,
                whole[: self._chance.randrange(len(whole))],
                whole.replace(b"Content-Length: ", b"Content-Length: -"),
                whole.replace(b"POST", self._chance.choice([b"GET", b"PUT", b"DELETE", b"PATCH", b"BREW"])),
                whole.replace(b"/invocations", self._chance.choice(PATHS)),
                whole.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nX"),
                self._chance.randbytes(200),
            ]
        )
        self._exchange("broken http", data, patience_s=0.5, strict=False)

    # --- on the wire ---

    def _session(self) -> dict[str, str]:
        return {} if self._mine is None or self._chance.random() < 0.3 else {SESSION_HEADER: self._mine}

    def _filled(self, text: str) -> bytes:
        theirs = next(iter(self._fuzz.theirs), "nobody")
        return text.replace(MINE, self._mine or self._name).replace(THEIRS, theirs).encode()

    def _ask(
        self,
        body: bytes,
        kind: str,
        headers: dict[str, str],
        pieces: int = 1,
        half_close: bool = False,
        strict: bool = True,
    ) -> None:
        request = _request(body, {"Content-Type": "application/json", **headers})
        self._exchange(kind, request, ANSWER_S if strict else 5.0, pieces, half_close, strict)

    def _exchange(
        self, kind: str, data: bytes, patience_s: float, pieces: int = 1, half_close: bool = False, strict: bool = True
    ) -> None:
        """Send, and judge what comes; where not `strict`, nothing may come."""
        try:
            with socket.create_connection(self._fuzz.address, timeout=patience_s) as connection:
                step = max(len(data) // pieces, 1)
                for start in range(0, len(data), step):
                    connection.sendall(data[start : start + step])
                    if pieces > 1:
                        time.sleep(self._chance.uniform(0, 0.05))
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
                reply = http.client.HTTPResponse(connection)
                reply.begin()
                self._judge(kind, data, reply, reply.read())
        except (OSError, http.client.HTTPException) as error:
            if strict and isinstance(error, TimeoutError):
                self._fuzz.unanswered.append(f"{kind}: {data[:300]!r}")
            elif strict:
                self._fuzz.blame(f"{kind}: {type(error).__name__} after {data[:300]!r}")
            self._fuzz.count(kind, "no answer")

    def _judge(self, kind: str, data: bytes, reply: http.client.HTTPResponse, body: bytes) -> None:
        outcome = _outcome(reply.status, body)
        self._fuzz.count(kind, outcome)
        if outcome.startswith("undocumented"):
            self._fuzz.blame(f"{kind}: {outcome}: {body[:300]!r} after {data[:300]!r}")
        told = body + repr(reply.getheaders()).encode()
        if leaked := [secret for secret in list(self._fuzz.secrets) if secret.encode() in told]:
            asked = data.decode("utf-8", "replace")
            if any(secret not in asked for secret in leaked):
                self._fuzz.blame(f"{kind}: tells of another session: {told[:300]!r}")
        self._note_session(reply, body)

    def _note_session(self, reply: http.client.HTTPResponse, body: bytes) -> None:
        """Keep what was opened; close what was before it."""
        announced = reply.getheader(SESSION_HEADER)
        if reply.status == http.client.OK and announced is not None:
            self.leave()
            self._mine = announced.partition(";")[0]
        elif reply.status in (404, 410) or b'"success": true' in body:
            self.leave()


def _request(body: bytes, headers: dict[str, str]) -> bytes:
    lines = ["POST /invocations HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def _outcome(status: int, body: bytes) -> str:
    """What a reply is, in words; one that is neither ours nor HAProxy's is undocumented."""
    told: object = None
    with contextlib.suppress(ValueError):
        told = json.loads(body.splitlines()[-1] if body.strip() else b"null")
    if status == http.client.OK:
        error = told.get("error") if isinstance(told, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        return "200" if code is None else f"200 {code}" if code not in UNWANTED else f"undocumented 200 {code}"
    if isinstance(told, dict) and isinstance(told.get("error"), dict):
        code = told["error"].get("code")
        known = {**STATUS_OF_CODE, **HAPROXY}.get(code) == status and code not in UNWANTED
        return f"{status} {code}" if known else f"undocumented {status} {code}"
    is_page = body.startswith(PAGE) and status in PAGE_STATUSES
    return f"{status} HAProxy's page" if is_page else f"undocumented {status}"


def fuzz(server: TorchServe, url: str, requests: int, seed: int, threads: int = THREADS, warm_up: int = 0) -> Fuzz:
    """The run on a server with sessions that idle out soon, and HAProxy at `url`.

    `wrong` of the result is what must not have happened. `memory` is what each process held before and after, in bytes;
    the first figures are those after `warm_up` other requests, when all code has run once.
    """
    warm = _run(server, url, warm_up, seed + 1_000_000, threads).wrong if warm_up else []
    before = _rss(server)
    run = _run(server, url, requests, seed, threads)
    run.wrong[:0] = warm
    run.memory = {"before": before, "after": _rss(server)}
    return run


def grown(memory: Mapping[str, Mapping[str, int]], share: float = 0.1) -> list[str]:
    """The processes of the worker and Java that hold more than before by over a share."""
    before, after = memory["before"], memory["after"]
    return [role for role in ("java", "worker") if after[role] > before[role] * (1 + share)]


def _rss(server: TorchServe) -> dict[str, int]:
    return {role: figures["rss_bytes"] for role, figures in Processes.of(server).sample().items()}


def _run(server: TorchServe, url: str, requests: int, seed: int, threads: int) -> Fuzz:
    run, processes = Fuzz(url), Processes.of(server)
    sessions = max(CONTROLS + threads, SESSIONS) if threads == THREADS else CONTROLS + threads
    with ThreadPoolExecutor(CONTROLS + threads) as pool:
        controls = [pool.submit(run.control, number) for number in range(CONTROLS)]
        share = -(-requests // threads)
        attacks = []
        for number in range(threads):
            texts = structures(min(share, requests - number * share), seed * 1000 + number)
            attacks.append(pool.submit(run.attack, number, texts, seed))
        for attack in attacks:
            attack.result()
        run.over.set()
        run.counts["control: compared"] = sum(control.result() for control in controls)
    if len(run.unanswered) > max(1, MOST_UNANSWERED * requests):
        run.blame(f"{len(run.unanswered)} requests got no answer: {run.unanswered[:5]}")
    if Processes.of(server).pids != processes.pids:
        run.blame("a process is not the one that it was")
    left = wait_for_metrics(server.metrics_url, timeout_s=2 * IDLE_S + 10, llava_open_sessions=0, llava_running_turns=0)
    if left["llava_open_sessions"] or left["llava_running_turns"]:
        run.blame(f"sessions stay open: {left}")
    _open_all(run, sessions)
    return run


def _open_all(run: Fuzz, sessions: int) -> None:
    """No place is left taken: as many sessions as there may be open, and answer."""
    picture = to_png(make_scene(HELD_OUT_SEEDS[0]).draw(72))
    with httpx.Client(base_url=run.url, timeout=ANSWER_S, trust_env=False) as own:
        try:
            with ThreadPoolExecutor(sessions) as pool:
                chats = [_open_when_there_is_room(own, picture) for _ in range(sessions)]
                answers = set(pool.map(lambda chat: chat.ask(QUESTIONS[0])["response_text"], chats))
                list(pool.map(ChatSession.close, chats))
            if len(answers) != 1:
                run.blame(f"one picture and one question got {len(answers)} different answers")
        except (ApiError, httpx.HTTPError) as error:
            run.blame(f"not all {sessions} sessions can be opened afterwards: {type(error).__name__}: {error}")


def _open_when_there_is_room(own: httpx.Client, picture: bytes) -> ChatSession:
    """Open a session. Repeat while TorchServe answers 503: a sequence that ended keeps its place for a moment."""
    until = time.monotonic() + ANSWER_S
    while True:
        try:
            return ChatSession.open(own, picture)
        except ApiError as error:
            if error.status != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > until:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def serving(folder: Path, sessions: int, idle_s: int = IDLE_S) -> Iterator[tuple[TorchServe, str]]:
    """Run a server whose sessions expire soon after their last answer, and HAProxy in front. Yield it and the URL."""
    store = pack(folder, sessions, session_ttl_s=TTL_S, session_idle_s=idle_s)
    home, port = folder / "front", free_ports(1)[0]
    (home / "logs").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        (server,) = stack.enter_context(running(TorchServe(store)))
        guard = Guard()
        stack.callback(guard.release)
        front = HAProxy(find_haproxy(), home, guard, port=port, target=server.ports["inference"])
        stack.callback(front.stop)
        front.start()
        front.open()
        yield server, f"http://127.0.0.1:{port}"
        # With one Lua state for all threads HAProxy 2.6.12 logged "attempt to index a number value" here.
        alerts = [line for line in (home / "logs" / "haproxy.log").read_text().splitlines() if "ALERT" in line]
        assert not alerts, alerts[:3]
