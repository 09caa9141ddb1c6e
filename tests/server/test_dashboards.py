"""Debian's Prometheus with the shipped configuration: each panel of the board has data, each alert can be evaluated.

promtool checks configuration and alerts, and runs the tests of the alerts.
"""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from PIL import Image

from scripts import dashboard
from tests import board as picture
from tests.support import board
from tests.support.prometheus import PATIENCE_S, SHIPPED, Prometheus, command, scraping

GPU_ONLY = {("Device memory", "{{instance}}, taken")}  # lines without data on a CPU
# Panels that may show zero on a healthy, idle server.
MAY_BE_ZERO = {"Turns in progress", "Rejected with 5xx", "Engine restarts and rebuilt sessions"}


@dataclass(frozen=True)
class Scraped:
    """A Prometheus that scraped a server before and after a short load. `at` is the time of a scrape after the load.

    A query at that time has the same result if a later scrape fails, as on a busy machine.
    """

    prometheus: Prometheus
    at: float

    def query(self, expression: str) -> list[float]:
        """Return the values of a query after the load."""
        return self.prometheus.query(expression, self.at)


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    """Run a server with small budgets and a Prometheus, and chat."""
    folder = tmp_path_factory.mktemp("board")
    with (
        board.serving(folder) as served,
        scraping(f"{served.url}/metrics", folder) as prometheus,
        httpx.Client(base_url=served.url, timeout=60, trust_env=False) as http,
    ):
        prometheus.wait_for("count_over_time(llava_turns_total[1h])", lambda scrapes: scrapes >= 2)
        turns = chat(http, served.worker_pid)
        scrape = f"timestamp(llava_turns_total) and llava_turns_total >= {turns} and llava_journal_failures_total > 0"
        yield Scraped(prometheus, at=prometheus.wait_for(scrape, lambda at: at > 0))


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


def test_each_panel_of_the_board_has_data(scraped: Scraped) -> None:
    largest: dict[str, float] = {}
    for title, legend, expression in board.panel_queries(window="1h"):
        values = scraped.query(expression)
        if (title, legend) in GPU_ONLY:
            assert values == []
            continue
        assert values, f"{title}, {legend}: no series"
        assert all(math.isfinite(value) and value >= 0 for value in values), f"{title}, {legend}: {values}"
        largest[title] = max([largest.get(title, 0.0), *values])
    assert {title for title, value in largest.items() if value == 0} <= MAY_BE_ZERO, largest
    assert len(largest) > len(MAY_BE_ZERO)


def test_an_instance_that_is_not_chosen_is_not_shown(scraped: Scraped) -> None:
    for title, _, expression in board.panel_queries(window="1h", instance="another:8080"):
        assert scraped.query(expression) == [], title


def test_the_picture_has_a_line_for_each_query(scraped: Scraped, tmp_path: Path) -> None:
    lines = picture.read(scraped.prometheus, scraped.at - 30, scraped.at)
    for title, legend, _ in board.panel_queries(picture.WINDOW):
        assert title in lines
        if "{{" not in legend:
            assert [name for name, _ in lines[title]].count(legend) == 1
    path = tmp_path / "board.png"
    picture.draw(lines, 30, path)
    with Image.open(path) as image:
        assert image.size == (picture.SIZE_IN[0] * picture.DPI, picture.SIZE_IN[1] * picture.DPI)


@pytest.mark.parametrize("names", [2, 6])
def test_the_legend_of_a_panel_covers_no_line(names: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here, because loading it is slow
    from matplotlib.figure import Figure

    (item,) = [panel for panel in dashboard.board()["panels"] if panel["title"] == "Rejected with 5xx"]
    figure = Figure(picture.SIZE_IN, dpi=picture.DPI)
    axes = FigureCanvasAgg(figure).figure.add_axes((0.4, 0.2, 0.3, 0.07))
    lines = [(f"a_code_of_an_error_{number}", [(0.0, 3.5), (60.0, 3.5)]) for number in range(names)]
    picture._draw_panel(axes, item, lines, 60)
    figure.canvas.draw()
    _, highest_px = axes.transData.transform((0, 3.5))
    legend = axes.get_legend().get_window_extent()
    assert legend.y0 > highest_px
    assert legend.x1 <= axes.bbox.x1 + 1


@pytest.mark.parametrize("unit", ["s", "bytes", "short", "reqps", "percentunit"])
def test_the_labels_of_an_axis_have_no_exponent(unit: str) -> None:
    for highest in (0.02, 1, 1.2, 2500):
        label = picture._format_of(unit, highest)
        assert not any("e" in label(part * highest, 0) for part in (0, 0.1, 0.25, 0.5, 1))


def test_prometheus_evaluates_each_alert(scraped: Scraped) -> None:
    groups = yaml.safe_load((SHIPPED.parent / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    names = {rule["alert"] for group in groups for rule in group["rules"]}
    until = time.monotonic() + PATIENCE_S
    rules = scraped.prometheus.rules()
    while any(rule["health"] == "unknown" for rule in rules):  # not evaluated yet
        assert time.monotonic() < until, rules
        time.sleep(0.1)
        rules = scraped.prometheus.rules()
    assert {rule["name"]: (rule["health"], rule.get("lastError", "")) for rule in rules} == dict.fromkeys(
        names, ("ok", "")
    )


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", SHIPPED.name), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_accepts_the_files(arguments: tuple[str, ...]) -> None:
    folder: Path = SHIPPED.parent
    done = subprocess.run([command("promtool"), *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
