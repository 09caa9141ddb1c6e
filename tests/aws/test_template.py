"""endpoint.yaml beyond what moto makes of it: the metric filters on real lines, the names that must agree."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import boto3
import pytest

from deploy.container import metric_lines
from deploy.sagemaker import stacks
from deploy.sagemaker.account import Account
from llava_sessions import metrics
from tests.support.metric_filters import filters, matches, template

REPO = Path(__file__).resolve().parents[2]
# As TorchServe 0.12 with metrics_mode=prometheus shows them.
PAGE = """\
# HELP CPUUtilization Torchserve prometheus gauge metric with unit: Percent
# TYPE CPUUtilization gauge
CPUUtilization{Level="Host",Hostname="box",} 12.5
# HELP llava_open_sessions Torchserve prometheus gauge metric with unit: count
# TYPE llava_open_sessions gauge
llava_open_sessions{ModelName="llava",Level="Model",Hostname="box",} 3.0
llava_running_turns{ModelName="llava",Level="Model",Hostname="box",} 0.0
llava_kv_bytes{ModelName="llava",Level="Model",Hostname="box",} 1.6777216E7
"""


@pytest.fixture
def page() -> Iterator[str]:
    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PAGE.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Metrics)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()


def test_the_filters_read_the_lines_that_the_container_prints(page: str) -> None:
    command = [sys.executable, "-m", "deploy.container.metric_lines", "--url", page, "--every", "0.01"]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        process.terminate()
    for line in lines:
        read = {name: json.loads(line)[value.removeprefix("$.")] for name, (_, value) in filters().items()}
        assert read == {"OpenSessions": 3, "RunningTurns": 0}
        assert all(matches(pattern, line) for pattern, _ in filters().values())


@pytest.mark.parametrize(
    "line",
    [
        "10:00:00 INFO  session_open session=ab pictures=1",
        "10:00:00 INFO  ready device=cuda open_sessions=3",
        '{"event": "other", "open_sessions": 3}',
        '{"event": "figures"}',
        "",
    ],
)
def test_the_filters_leave_other_lines_alone(line: str) -> None:
    assert not any(matches(pattern, line) for pattern, _ in filters().values())


def test_the_filters_name_figures_that_the_handler_has() -> None:
    for _, value in filters().values():
        assert f"llava_{value.removeprefix('$.')}" in metrics.GAUGES


HEAD = b"HTTP/1.1 200 OK\r\n"
SAMPLE = b'llava_open_sessions{ModelName="llava",} '


@pytest.fixture
def raw() -> Iterator[Callable[[bytes], str]]:
    """Return the URL of a listener that answers with these bytes and closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer(reply: bytes) -> str:
            def serve() -> None:
                with contextlib.suppress(OSError), listener.accept()[0] as client:
                    client.recv(65536)
                    client.sendall(reply)

            Thread(target=serve, daemon=True).start()
            return f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"

        yield answer


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"\xff\xfe\x00 not HTTP\r\n\r\n",
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
        HEAD + b"Content-Length: 100\r\n\r\n" + SAMPLE + b"3.0\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        HEAD + b"\r\n\xff\xfe" + SAMPLE + b"3.0\n",
        HEAD + b"\r\n" + SAMPLE + b"three\n",
        HEAD + b"\r\n" + SAMPLE + b"NaN\n",
        HEAD + b"\r\n" + SAMPLE + b"Infinity\n",
        HEAD + b"\r\n# no metric\n",
        HEAD + b"\r\n" + b"#" * (metric_lines.MAX_BYTES + 1),
        b"HTTP/1.1 302 Found\r\nLocation: ftp://x\r\n\r\n",
        HEAD + b"X: " + b"y" * 70_000 + b"\r\n\r\n",
    ],
)
def test_any_answer_of_the_page_gives_a_line_with_the_reason(raw: Callable[[bytes], str], reply: bytes) -> None:
    line = metric_lines.next_line(raw(reply))
    told = json.loads(line, parse_constant=pytest.fail)
    assert told["event"] == metric_lines.BLIND_EVENT
    assert told["reason"]
    assert not any(matches(pattern, line) for pattern, _ in filters().values())


def test_a_page_that_nobody_serves_gives_a_line_too() -> None:
    told = json.loads(metric_lines.next_line("http://127.0.0.1:9/metrics"))
    assert told["event"] == metric_lines.BLIND_EVENT
    assert "refused" in told["reason"]


def test_the_page_is_never_asked_for_through_a_proxy(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert metric_lines.read_metrics(page)["open_sessions"] == 3
    code = "import sys; from deploy.container.metric_lines import read_metrics; print(read_metrics(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, page], cwd=REPO, capture_output=True, text=True, check=True)
    assert "'open_sessions': 3.0" in done.stdout


def test_code_and_template_use_the_same_names() -> None:
    account = Account("llava", boto3.session.Session(region_name="eu-west-1"))
    resources = template()["Resources"]
    text = stacks.TEMPLATE.read_text(encoding="utf-8")
    assert text.count('"LLaVASessions/${EndpointName}"') == 8
    assert account.metrics_namespace == "LLaVASessions/llava"
    assert '"/aws/sagemaker/Endpoints/${EndpointName}"' in text
    assert account.log_group == "/aws/sagemaker/Endpoints/llava"
    assert resources["Endpoint"]["DependsOn"] == "Logs", "else SageMaker makes the group first, and the stack fails"
