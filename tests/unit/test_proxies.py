"""Loopback is reached without the proxy of the environment."""

from __future__ import annotations

import ast
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.container import metric_lines
from deploy.serve.ports import free_ports
from llava_sessions_client.http import client_options
from llava_sessions_client.sources import fetch
from tests.support.server_metrics import read_metrics

ROOT = Path(__file__).parents[2]
PAGE = b'llava_open_sessions{ModelName="llava"} 3.0\n'
CALLS = {"AsyncClient", "Client", "get", "post", "request", "stream"}


class Metrics(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve a page of metrics; the environment names a proxy that nobody runs."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_ports(1)[0]}")
    for name in ("NO_PROXY", "no_proxy", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
        server.shutdown()


def test_metrics_are_read_directly(url: str) -> None:
    assert read_metrics(url) == {"llava_open_sessions": 3}
    assert metric_lines.read_metrics(url) == {"open_sessions": 3}


@pytest.mark.parametrize(("address", "trusted"), [("127.0.0.1", False), ("[::1]", False), ("example.com", True)])
def test_the_python_client_uses_a_proxy_except_for_this_machine(address: str, trusted: bool) -> None:
    assert client_options(f"http://{address}:8080")["trust_env"] is trusted


def test_the_python_client_reads_a_picture_of_this_machine_directly(url: str) -> None:
    assert fetch(url) == PAGE


def test_every_httpx_client_ignores_the_environment() -> None:
    folders = ("bench", "demo", "deploy", "tests/deploy", "tests/server", "tests/soak", "tests/support", "web")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    calls = [(path, call) for path in files for call in ast.walk(ast.parse(path.read_text())) if _opens(call)]
    assert len(calls) > 10
    assert [f"{path}:{call.lineno}" for path, call in calls if not _ignores_environment(call)] == []


def _opens(node: ast.AST) -> bool:
    """Return whether the node is a call of httpx that reads the environment by default."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="httpx"), attr=name)):
            return name in CALLS
    return False


def _ignores_environment(call: ast.Call) -> bool:
    return any(
        keyword.arg == "trust_env" and isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        for keyword in call.keywords
    )
