"""A small HTTP server that records the requests which reach it whole."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator

TEXT = json.dumps({"text": "é 😀 ü"}, ensure_ascii=False).encode()
STREAMS = {"/stream": 50, "/endless": 10_000}


class Recorder(http.server.ThreadingHTTPServer):
    """Answers `TEXT`, 50 slow lines for `/stream`, or lines until the client leaves for `/endless`."""

    daemon_threads = True

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.cut: list[int] = []  # lengths of the bodies that ended too early
        self.lines: list[int] = []  # sent by each stream
        self.connections = 0
        super().__init__(("127.0.0.1", 0), Answering)

    def handle_error(self, *_: object) -> None:
        """Print nothing: clients leave on purpose."""


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers one connection."""

    server: Recorder
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:
            self.server.cut.append(length)
            return
        self.server.received.append(body)
        self.send_response(200)
        if self.path in STREAMS:
            self._stream(STREAMS[self.path])
            return
        self.send_header("Content-Length", str(len(TEXT)))
        self.end_headers()
        self.wfile.write(TEXT)

    def _stream(self, count: int) -> None:
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent = 0
        try:
            while sent < count:
                self.wfile.write(b"5\r\nline\n\r\n")
                sent += 1
                time.sleep(0.002)
            self.wfile.write(b"0\r\n\r\n")
        finally:
            self.server.lines.append(sent)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Run a server."""
    with Recorder() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
