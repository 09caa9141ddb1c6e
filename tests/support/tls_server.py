"""A TLS server on loopback that answers each path byte for byte, and a `Fetcher` whose connections all lead to it."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpcore
import pytest

from llava_sessions.media.fetch import Fetcher

NAME = "pictures.example"
PUBLIC = "93.184.215.14"  # a public address, which the test backend never dials


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ca.pem and a certificate of that authority for pictures.example and *.cdn.example."""
    if not shutil.which("openssl"):
        pytest.skip("the openssl command is needed to make a certificate")
    folder = tmp_path_factory.mktemp("certificates")
    names = f"DNS:{NAME},DNS:*.cdn.example,IP:{PUBLIC},IP:2606:2800:21f:cb07:6820:80da:af6b:8b2c"
    (folder / "leaf.ext").write_text(f"subjectAltName={names}\nbasicConstraints=CA:FALSE\n")
    signed = ["-out", "leaf.pem", "-days", "2", "-extfile", "leaf.ext"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for command in (
        ["req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test authority"],
        ["req", *key, "-keyout", "leaf.key", "-out", "leaf.csr", "-subj", "/CN=leaf"],
        ["x509", "-req", "-in", "leaf.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", *signed],
    ):
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)
    return folder


Answer = Callable[[ssl.SSLSocket], None]


class TlsServer:
    """Answers each path with the bytes in `answers`, and records connections, SNI names and request heads."""

    def __init__(self, certificates: Path) -> None:
        self.answers: dict[str, Answer | bytes] = {}
        self.requests: list[str] = []  # request heads
        self.names: list[str | None] = []  # by SNI
        self.connections = 0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificates / "leaf.pem", certificates / "leaf.key")
        self.context.sni_callback = lambda _socket, name, _context: self.names.append(name)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        try:
            plain.settimeout(10)
            with self.context.wrap_socket(plain, server_side=True) as connection:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    piece = connection.recv(65536)
                    if not piece:
                        return
                    head += piece
                self.requests.append(head.decode())
                answer = self.answers.get(head.split()[1].decode(), b"HTTP/1.1 404 Not Found\r\n\r\n")
                if callable(answer):
                    answer(connection)
                else:
                    connection.sendall(answer)
        except OSError:
            pass  # the client closed the connection or rejected the certificate
        finally:
            plain.close()

    def close(self) -> None:
        self.listener.close()


class Rerouted(httpcore.NetworkBackend):
    """Records each requested address, and connects to the loopback server instead."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.dialled: list[tuple[str, int]] = []

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *_: object) -> httpcore.NetworkStream:
        self.dialled.append((host, port))
        return httpcore.SyncBackend().connect_tcp("127.0.0.1", self.port, timeout=timeout)


@pytest.fixture
def server(certificates: Path) -> Iterator[TlsServer]:
    running = TlsServer(certificates)
    yield running
    running.close()


@pytest.fixture
def route(server: TlsServer) -> Rerouted:
    return Rerouted(server.port)


@pytest.fixture
def fetcher(certificates: Path, route: Rerouted) -> Fetcher:
    """Return a fetcher that trusts the test authority, resolves every name to `PUBLIC`, and connects to the server."""
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    return Fetcher(resolve=lambda _host, _port: [PUBLIC], backend=route, ssl_context=context)


def ok(body: bytes, *headers: str) -> bytes:
    """Return a response of status 200."""
    lines = ["HTTP/1.1 200 OK", "Content-Type: text/plain", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str, status: int = 302) -> bytes:
    """Return a redirect."""
    return f"HTTP/1.1 {status} Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
