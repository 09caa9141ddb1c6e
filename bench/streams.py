"""A client of streamed answers that takes little CPU time: one thread reads all streams, from plain sockets."""

from __future__ import annotations

import base64
import json
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
_DELTA = b'{"delta": "'
_LAST = b'{"delta": "", '
_END = b"0\r\n\r\n"
_TIMEOUT_S = 120.0


@dataclass
class Answer:
    """One answer at its client. `times`: arrival of each token, in seconds of `time.perf_counter`."""

    asked_at: float
    times: list[float] = field(default_factory=list)
    received: bytearray = field(default_factory=bytearray)
    has_ended: bool = False

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return (self.times[0] - self.asked_at) * 1e3

    @property
    def status(self) -> int:
        """The HTTP status."""
        return int(self.received.split(b" ", 2)[1])

    def take(self, data: bytes, now: float) -> None:
        """Take bytes of the reply that arrived at `now`."""
        self.received += data
        tokens = self.received.count(_DELTA) - self.received.count(_LAST)
        self.times = self.times[:tokens] + [now] * (tokens - len(self.times))
        self.has_ended = self.has_ended or self.received.endswith(_END)


class Client:
    """Asks a server at its address. Each request has a connection of its own."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._address = (address.hostname, address.port)

    def open(self, picture: bytes) -> str:
        """Open a session on an encoded picture; return its ID."""
        body = self.whole({"type": "start_session", "image": base64.b64encode(picture).decode()})
        return json.loads(body.received.partition(b"\r\n\r\n")[2])["session_id"]

    def close(self, session: str) -> None:
        """Close a session."""
        self.whole({"type": "close_session"}, session)

    def whole(self, fields: dict, session: str | None = None) -> Answer:
        """Send a request and return its whole reply."""
        sent_at = time.perf_counter()
        with self.send(fields, session) as connection:
            answer = Answer(sent_at)
            while not answer.has_ended and (data := connection.recv(65_536)):
                answer.take(data, time.perf_counter())
                answer.has_ended = answer.has_ended or _is_complete(answer.received)
            return answer

    def send(self, fields: dict, session: str | None = None) -> socket.socket:
        """Send a request on a new connection; return the connection."""
        body = json.dumps(fields).encode()
        head = "POST /invocations HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json"
        head += f"\r\nContent-Length: {len(body)}"
        if session is not None:
            head += f"\r\n{SESSION_HEADER}: {session}"
        connection = socket.create_connection(self._address, timeout=_TIMEOUT_S)
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        return connection

    def stream(
        self, sessions: Sequence[str], fields: dict, on_change: Callable[[list[Answer]], None] = lambda _: None
    ) -> list[Answer]:
        """Ask a question in each session at once, read all answers to their ends, and return them.

        `on_change` is called after each arrival.
        """
        answers = []
        with selectors.DefaultSelector() as ready:
            for session in sessions:
                answer = Answer(time.perf_counter())
                ready.register(self.send({**fields, "stream": True}, session), selectors.EVENT_READ, answer)
                answers.append(answer)
            while ready.get_map():
                for key, _ in ready.select(_TIMEOUT_S):
                    data = key.fileobj.recv(65_536)
                    key.data.take(data, time.perf_counter())
                    if not data or key.data.has_ended:
                        ready.unregister(key.fileobj)
                        key.fileobj.close()
                on_change(answers)
        return answers


def _is_complete(received: bytearray) -> bool:
    """Return whether a reply with a Content-Length has arrived."""
    head, blank, body = bytes(received).partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(blank) and bool(lengths) and len(body) >= int(lengths[0])
