"""Debian's Prometheus with the shipped configuration: each panel of the board has data, each alert can be evaluated.

promtool checks configuration and alerts, and runs the tests of the alerts.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import board
from tests.support.prometheus import SHIPPED, Prometheus, command, scraping

# Panels that may show zero on a healthy, idle server.
MAY_BE_ZERO = {"Turns in progress", "Rejected with 5xx", "Engine restarts and rebuilt sessions"}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Run a server with small budgets and a Prometheus that has scraped it before and after a short load."""
    folder = tmp_path_factory.mktemp("board")
    with (
        board.serving(folder) as served,
        scraping(f"{served.url}/metrics", folder) as prometheus,
        httpx.Client(base_url=served.url, timeout=60, trust_env=False) as http,
    ):
        prometheus.wait_for("count_over_time(llava_turns_total[1h])", lambda scrapes: scrapes >= 2)
        turns = chat(http, served.worker_pid)
        prometheus.wait_for("llava_turns_total", lambda value: value >= turns)
        prometheus.wait_for("llava_journal_failures_total", lambda value: value >= 1)
        yield prometheus


def chat(http: httpx.Client, worker_pid: int) -> int:
    """Take all places, ask in each session, cause errors. Return the number of answers."""
    sessions = [board.open_session(http, number // 2) for number in range(board.SESSIONS)]  # each picture twice
    for session in reversed(sessions):  # the last ones are in memory, so that some are restored and not rebuilt
        board.ask(http, session, board.QUESTIONS[0]).raise_for_status()
    assert board.cause_errors(http, sessions[0]) == {"capacity": 429, "session_not_found": 404, "invalid_request": 400}
    board.ask_without_session(http)
    with board.failing_journal(worker_pid):
        reply = board.ask(http, sessions[0], board.QUESTIONS[1]).raise_for_status()
        assert reply.json()["durable"] is False
    return len(sessions) + 2


def test_each_panel_of_the_board_has_data(prometheus: Prometheus) -> None:
    largest: dict[str, float] = {}
    for title, legend, expression in board.panel_queries(window="1h"):
        values = prometheus.query(expression)
        assert values, f"{title}, {legend}: no series"
        assert all(math.isfinite(value) and value >= 0 for value in values), f"{title}, {legend}: {values}"
        largest[title] = max([largest.get(title, 0.0), *values])
    assert {title for title, value in largest.items() if value == 0} <= MAY_BE_ZERO, largest
    assert len(largest) > len(MAY_BE_ZERO)


def test_an_instance_that_is_not_chosen_is_not_shown(prometheus: Prometheus) -> None:
    for title, _, expression in board.panel_queries(window="1h", instance="another:8080"):
        assert prometheus.query(expression) == [], title


def test_prometheus_evaluates_each_alert(prometheus: Prometheus) -> None:
    rules = {rule["name"]: rule for rule in prometheus.rules()}
    assert len(rules) > 10
    assert {name: rule["lastError"] for name, rule in rules.items() if rule["health"] != "ok"} == {}
    firing = {name for name, rule in rules.items() if rule["state"] == "firing"}
    assert firing == {"LlavaJournalFails"}


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", SHIPPED.name), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_accepts_the_files(arguments: tuple[str, ...]) -> None:
    folder: Path = SHIPPED.parent
    done = subprocess.run([command("promtool"), *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
