"""GET /metrics of the public port: Debian's Prometheus scrapes it, and promtool has no objection."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from deploy.serve.configuration import PUBLIC_METRICS_VARIABLE
from deploy.serve.haproxy import HAProxy, find_haproxy
from deploy.serve.ports import free_ports
from deploy.serve.processes import Guard
from deploy.serve.torchserve import TorchServe
from llava_sessions.metrics import METRICS
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.prometheus import lint, scraping
from tests.support.wire import ChatSession

SCENE = make_scene(HELD_OUT_SEEDS[0])
QUESTIONS = ("How many shapes are there?", "And what colours do they have?")


@pytest.fixture
def http(front: HAProxy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=front.url, timeout=60, trust_env=False) as client:
        yield client


def at_least(least: float) -> Callable[[float], bool]:
    return lambda value: value >= least


def test_prometheus_answers_a_query_for_every_metric(front: HAProxy, http: httpx.Client, tmp_path: Path) -> None:
    with scraping(f"{front.url}/metrics", tmp_path) as prometheus:
        prometheus.wait_for("up", at_least(1))
        prometheus.wait_for("llava_session_ttl_seconds", at_least(1200))
        refused = 'llava_refusals_total{code="session_not_found"}'
        names = ("llava_turns_total", "llava_prompt_tokens_total", "llava_generation_tokens_total", refused)
        names += ("llava_opens_total", "llava_picture_hits_total")
        before = {name: sum(prometheus.query(name)) for name in names}
        chat = ChatSession.open(http, SCENE.draw())
        usages = [chat.ask(question)["usage"] for question in QUESTIONS]
        second = ChatSession.open(http, SCENE.draw())  # the same picture
        prometheus.wait_for("llava_open_sessions", at_least(2))
        prometheus.wait_for("llava_kv_cache_usage_ratio", lambda value: 0 < value < 1)
        second.close()
        chat.close()
        asked = {"type": "send_text_prompt", "prompt_text": QUESTIONS[0]}
        assert http.post("/invocations", json=asked, headers=chat.headers).status_code == 404
        more = (
            len(usages),
            sum(usage["prompt_tokens"] for usage in usages),
            sum(usage["completion_tokens"] for usage in usages),
            1,
            2,
            1,
        )
        for name, increase in zip(names, more, strict=True):
            prometheus.wait_for(name, at_least(before[name] + increase))
        for metric in METRICS:
            if metric.kind == "histogram":
                prometheus.wait_for(f"{metric.name}_count", at_least(1))
                (median,) = prometheus.query(f"histogram_quantile(0.5, {metric.name}_bucket)")
                assert 0 <= median <= metric.buckets[-1], metric.name
            else:
                assert all(value >= 0 for value in prometheus.query(metric.name)), metric.name
                assert prometheus.query(metric.name), metric.name


def running_turns(http: httpx.Client) -> float:
    """Return the number of turns in progress on the worker's page."""
    return float(re.search(r"^llava_running_turns (\S+)$", http.get("/metrics").text, re.MULTILINE)[1])


def wait_until_idle(http: httpx.Client) -> None:
    """Wait until no turn is in progress."""
    until = time.monotonic() + 60
    while running_turns(http):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_turn_is_in_progress_from_its_first_token_on(http: httpx.Client) -> None:
    """Short turns end before the next sweep, so the page must show them at once."""
    chat = ChatSession.open(http, SCENE.draw())
    body = {"type": "send_text_prompt", "prompt_text": QUESTIONS[0], "stream": True, "max_new_tokens": 1000}
    for _ in range(3):
        wait_until_idle(http)
        with http.stream("POST", "/invocations", json={**body, "ignore_eos": True}, headers=chat.headers) as reply:
            next(reply.iter_raw())
            assert running_turns(http) == 1
    wait_until_idle(http)
    chat.close()


def test_promtool_has_no_objection(http: httpx.Client) -> None:
    reply = http.get("/metrics", headers={"Accept": "text/plain"})
    assert reply.headers["Content-Type"].startswith("text/plain; version=")
    assert lint(reply.text) == ""
    assert "no help text" in lint("x_seconds 1\n"), "promtool objects to other pages"


def test_the_page_is_for_get_alone_and_503_while_no_worker_serves(
    front: HAProxy, http: httpx.Client, server: TorchServe
) -> None:
    for method in ("POST", "PUT", "DELETE"):
        reply = http.request(method, "/metrics", json={})
        assert (reply.status_code, reply.json()["error"]["code"]) == (405, "method_not_allowed")
        assert reply.headers["Allow"] == "GET"
    assert (http.head("/metrics").status_code, http.get("/metrics?name[]=llava_kv_bytes").status_code) == (405, 200)
    front.shut()
    try:
        reply = http.get("/metrics")
    finally:
        front.open()
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_restarting")
    assert reply.headers["Retry-After"] == "2"
    assert httpx.get(server.worker_metrics_url, trust_env=False).is_success


def test_a_page_that_does_not_answer_is_503(
    server: TorchServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher has not noticed yet that the worker died."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setenv(PUBLIC_METRICS_VARIABLE, "on")
    guard = Guard()
    port, closed = free_ports(2)
    front = HAProxy(find_haproxy(), tmp_path, guard, port=port, target=server.ports["inference"], metrics=closed)
    try:
        front.start()
        front.open()
        reply = httpx.get(f"{front.url}/metrics", trust_env=False, timeout=30)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_restarting")
    finally:
        front.stop()
        guard.release()
