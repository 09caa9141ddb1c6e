"""endpoint.yaml beyond what moto makes of it: the metric filters on real lines, the names that must agree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
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


def test_nothing_is_told_while_nobody_listens() -> None:
    assert metric_lines.read_metrics("http://127.0.0.1:9/metrics") == {}


def test_code_and_template_use_the_same_names() -> None:
    account = Account("llava", boto3.session.Session(region_name="eu-west-1"))
    resources = template()["Resources"]
    text = stacks.TEMPLATE.read_text(encoding="utf-8")
    assert text.count('"LLaVASessions/${EndpointName}"') == 6
    assert account.metrics_namespace == "LLaVASessions/llava"
    assert '"/aws/sagemaker/Endpoints/${EndpointName}"' in text
    assert account.log_group == "/aws/sagemaker/Endpoints/llava"
    assert resources["Endpoint"]["DependsOn"] == "Logs", "else SageMaker makes the group first, and the stack fails"
