"""`make board`: draw docs/img/board.png, the panels of Grafana's board with the data of a short load on this machine.

The server, HAProxy and Prometheus are real; the queries are those of deploy/grafana/dashboard.json. The load has users
who chat and leave, requests that are rejected, a journal that fails for a moment, and one killed engine.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from deploy.options import Parser, decimal_number
from scripts.dashboard import COLUMNS, board
from tests.support.board import (
    QUESTIONS,
    ask,
    ask_without_session,
    cause_errors,
    failing_journal,
    open_session,
    panel_queries,
    post,
    serving,
)
from tests.support.prometheus import Prometheus, scraping
from tests.support.serving import Served

OUTPUT = Path(__file__).parents[1] / "docs" / "img" / "board.png"
USERS = 30
STEP_S = 2
WINDOW = "15s"
LINES_MAX = 6  # of a panel: lines that are always zero are left out above this number
COLORS = ("#3274d9", "#e0752d", "#37872d", "#8f3bb8", "#c4162a", "#806600")
SIZE_IN = (17, 16)
DPI = 80
LINE_WIDTH_PX = 2


# --- the load ---------------------------------------------------------------------------------------------------------


def load(served: Served, seconds: float) -> None:
    """Chat for a time, with errors on the way. Return when all users have left."""
    over = threading.Event()
    users = [threading.Thread(target=chat, args=(served.url, seed, over)) for seed in range(USERS)]
    for user in users:
        user.start()
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as http:
        time.sleep(0.3 * seconds)
        with failing_journal(served.worker_pid):
            time.sleep(0.1 * seconds)
        served.signal_engine(signal.SIGKILL)
        time.sleep(0.3 * seconds)
        with contextlib.suppress(httpx.HTTPError, KeyError):
            cause_errors(http, "")
        time.sleep(0.3 * seconds)
    over.set()
    for user in users:
        user.join()


def chat(url: str, seed: int, over: threading.Event) -> None:
    """Open sessions and ask questions with pauses until `over`. Replies of any status are accepted."""
    draw = random.Random(seed)
    over.wait(draw.uniform(0, 10))
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        while not over.is_set():
            with contextlib.suppress(httpx.HTTPError):
                if draw.random() < 0.1:
                    ask_without_session(http)
                session = open_session(http, draw.randrange(200))
                for _ in range(draw.randint(2, 6)):
                    over.wait(draw.uniform(0.5, 4))
                    ask(http, session, draw.choice(QUESTIONS), max_new_tokens=draw.choice((8, 24, 64)))
                if draw.random() < 0.05:
                    ask(http, "x" * 36, QUESTIONS[0])  # no such session
                post(http, {"type": "close_session"}, session)
            over.wait(draw.uniform(1, 3))


# --- the picture ------------------------------------------------------------------------------------------------------


def read(prometheus: Prometheus, start: float, end: float) -> dict[str, list[tuple[str, list[tuple[float, float]]]]]:
    """Return the lines of each panel by its title: the legend and the points, in seconds from the start."""
    lines: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {}
    for title, legend, expression in panel_queries(WINDOW):
        for series in prometheus.query_range(expression, start, end, STEP_S):
            name = legend
            for label, value in series["labels"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            points = [(at - start, value if math.isfinite(value) else math.nan) for at, value in series["points"]]
            lines.setdefault(title, []).append((name, points))
    return lines


def draw(lines: dict[str, Any], seconds: float, path: Path) -> None:
    """Draw the board as Grafana places it, and write it as a PNG with few colours."""
    import matplotlib as mpl  # imported here, because loading it is slow

    mpl.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    items = board()["panels"]
    height = max(item["gridPos"]["y"] + item["gridPos"]["h"] for item in items)
    figure = pyplot.figure(figsize=SIZE_IN, dpi=DPI, facecolor="white")
    for item in items:
        place = item["gridPos"]
        left, bottom = place["x"] / COLUMNS, 0.985 - 0.975 * (place["y"] + place["h"]) / height
        if item["type"] == "row":
            figure.text(0.008, bottom + 0.003, item["title"], fontsize=13, fontweight="bold")
            continue
        inset = (left + 0.032, bottom + 0.03, place["w"] / COLUMNS - 0.045, 0.975 * place["h"] / height - 0.052)
        _draw_panel(figure.add_axes(inset), item, lines.get(item["title"], []), seconds)
    where = f"demo model on {os.cpu_count()} CPU cores, {datetime.now(UTC):%Y-%m-%d}; x: seconds"
    figure.text(0.992, 0.988, where, fontsize=9, color="#666666", ha="right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def _draw_panel(
    axes: Any, item: dict[str, Any], lines: list[tuple[str, list[tuple[float, float]]]], end: float
) -> None:
    axes.set_title(item["title"], fontsize=10, loc="left", color="#333333")
    defaults = item["fieldConfig"]["defaults"]
    if item["type"] == "stat":
        axes.axis("off")
        value = lines[0][1][-1][1] if lines else math.nan
        axes.text(0.5, 0.5, f"{value / 60:g} min", fontsize=26, ha="center", va="center", color=COLORS[2])
        return
    if len(lines) > LINES_MAX:
        lines = [line for line in lines if any(value > 0 for _, value in line[1])]
    if defaults["unit"] == "bytes":
        lines = [(name, [(at, value / 2**20) for at, value in points]) for name, points in lines]
    names = ["the server" if name.startswith("127.") else name for name, _ in lines]
    custom = defaults["custom"]
    if custom["stacking"]["mode"] == "normal":
        times = [at for at, _ in lines[0][1]]
        axes.stackplot(times, *[[value for _, value in points] for _, points in lines], labels=names, colors=COLORS)
    else:
        for name, (_, points), color in zip(names, lines, COLORS, strict=False):
            axes.plot([at for at, _ in points], [value for _, value in points], label=name, color=color, linewidth=1.4)
    axes.set_xlim(0, end)
    highest = defaults.get("max", 0) * 1.03 or max(axes.get_ylim()[1], 1e-3)
    if names:
        highest /= 1 - _add_legend(axes)
    axes.set_ylim(0, highest)
    axes.yaxis.set_major_formatter(_format_of(defaults["unit"], highest))
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.tick_params(length=2, labelsize=8, colors="#666666")


def _add_legend(axes: Any) -> float:
    """Add a legend at the top, as wide as the panel at most. Return the part of the panel's height that it takes."""
    renderer = axes.figure.canvas.get_renderer()
    for columns in (3, 2, 1):
        legend = axes.legend(
            fontsize=8, frameon=False, loc="upper left", ncols=columns, handlelength=1.2, columnspacing=1
        )
        size = legend.get_window_extent(renderer)
        if size.width <= axes.bbox.width:
            break
    return min((axes.bbox.y1 - size.y0 + LINE_WIDTH_PX) / axes.bbox.height, 0.8)


def _format_of(unit: str, highest: float) -> Any:
    """Return the format of an axis in Grafana's unit."""
    if unit == "bytes":
        return lambda value, _: f"{_rounded(value)} MiB"
    if unit == "percentunit":
        return lambda value, _: f"{value:.0%}" if value <= 1 else ""
    if unit == "s" and highest <= 1:
        return lambda value, _: f"{_rounded(value * 1000)} ms"
    suffix = {"s": " s", "reqps": "/s"}.get(unit, "")
    return lambda value, _: f"{_rounded(value)}{suffix}"


def _rounded(value: float) -> str:
    """Return a number with three digits that count, without an exponent."""
    return f"{float(f'{value:.3g}'):.15g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, chat, and draw the board. Return the exit code."""
    parser = Parser(prog="python -m tests.board", description="Draw Grafana's board with the data of a short load.")
    seconds = "length of the load (default: %(default)s)"
    parser.add_argument("--seconds", type=decimal_number(0), default=120.0, metavar="S", help=seconds)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="default: docs/img/board.png")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="llava-board-") as name:
        folder = Path(name)
        print("starting the server and Prometheus ...", flush=True)
        with serving(folder) as served, scraping(f"{served.url}/metrics", folder) as prometheus:
            prometheus.wait_for("count_over_time(llava_turns_total[1h])", lambda scrapes: scrapes >= 3)
            start = time.time()
            print(f"{USERS} users chat for {args.seconds:g} s ...", flush=True)
            load(served, args.seconds)
            lines = read(prometheus, start, time.time())
            end = time.time() - start
    draw(lines, end, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
