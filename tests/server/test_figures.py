"""The container's figures as they come from a real TorchServe: what CloudWatch's metric filters are to read."""

from __future__ import annotations

import json

import httpx

from deploy.container import metric_lines
from deploy.serve.torchserve import TorchServe
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.metric_filters import filters, matches
from tests.support.server_metrics import wait_for_metrics
from tests.support.wire import ChatSession


def test_open_sessions_reach_the_metric_filters(server: TorchServe, http: httpx.Client) -> None:
    chat = ChatSession.open(http, make_scene(HELD_OUT_SEEDS[0]).draw())
    try:
        wait_for_metrics(server.metrics_url, llava_open_sessions=1)
        line = metric_lines.metric_line(
            metric_lines.read_metrics(f"{server.metrics_url.removesuffix('/metrics')}/metrics")
        )
    finally:
        chat.close()
    pattern, value = filters()["OpenSessions"]
    assert matches(pattern, line)
    assert json.loads(line)[value.removeprefix("$.")] == 1
