"""A load that puts data on each panel of Grafana's board, on a server with small budgets. Speaks the wire protocol."""

from __future__ import annotations

import base64
import contextlib
import io
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deploy.serve.configuration import PUBLIC_METRICS_VARIABLE
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from scripts.dashboard import board
from tests.support.serving import Served, pack

SESSIONS = 24
# The KV caches of all sessions fit neither on the device nor on the host, so that caches move and some are dropped.
DEVICE_BYTES = 8 << 20
HOST_BYTES = 1_500_000
SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
QUESTIONS = ("How many shapes are there?", "And what colours do they have?", "Which shapes are there?")
SHORT = {"max_new_tokens": 16}


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """Serve the demo model behind HAProxy with a public metrics page, small budgets and a journal."""
    journal = folder / "journal"
    store = pack(folder, SESSIONS, device_bytes=DEVICE_BYTES, host_bytes=HOST_BYTES, journal_dir=str(journal))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(PUBLIC_METRICS_VARIABLE, "on")
        with Served(store) as served:
            yield served


def panel_queries(window: str, instance: str = ".*") -> Iterator[tuple[str, str, str]]:
    """Yield title, legend and PromQL of each query on the board, as Grafana sends it for a window and an instance."""
    for panel in board()["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", window).replace("$instance", instance)
            assert "$" not in expression, expression
            yield panel["title"], target["legendFormat"], expression


def picture(number: int) -> str:
    """Return a PNG of one of the demo model's scenes, in base64."""
    file = io.BytesIO()
    make_scene(HELD_OUT_SEEDS[number]).draw().save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def post(http: httpx.Client, body: Mapping[str, Any], session: str = "") -> httpx.Response:
    """Send a request of the native protocol, in a session if one is given."""
    return http.post("/invocations", json=body, headers={SESSION_HEADER: session} if session else {})


def open_session(http: httpx.Client, number: int) -> str:
    """Open a session on a picture and return its ID."""
    reply = post(http, {"type": "start_session", "image": picture(number)}).raise_for_status()
    return reply.headers[SESSION_HEADER].partition(";")[0]


def ask(http: httpx.Client, session: str, text: str, **options: Any) -> httpx.Response:
    """Ask a question and return the reply, whatever its status."""
    return post(http, {"type": "send_text_prompt", "prompt_text": text, **(options or SHORT)}, session)


@contextlib.contextmanager
def failing_journal(worker_pid: int) -> Iterator[None]:
    """Let the worker write no byte to a file while this lasts."""
    worker = psutil.Process(worker_pid)
    limits = worker.rlimit(resource.RLIMIT_FSIZE)
    worker.rlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        worker.rlimit(resource.RLIMIT_FSIZE, limits)


def cause_errors(http: httpx.Client, session: str) -> dict[str, int]:
    """Send requests that are rejected, with all places of `SESSIONS` taken. Return their statuses by code."""
    replies = (
        post(http, {"type": "start_session", "image": picture(0)}),
        ask(http, "0" * 8 + "-0000-0000-0000-" + "0" * 12, QUESTIONS[0]),
        post(http, {"type": "send_text_prompt", "prompt_text": 3}, session),
    )
    return {reply.json()["error"]["code"]: reply.status_code for reply in replies}


def ask_without_session(http: httpx.Client) -> None:
    """Ask a question by the OpenAI route, which makes an implicit session."""
    url = f"data:image/png;base64,{picture(1)}"
    content = [{"type": "text", "text": QUESTIONS[0]}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "llava", "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    http.post("/v1/chat/completions", json=body).raise_for_status()
