"""Cost of a scrape of /metrics while answers are streamed.

Starts the whole service (`python -m deploy.serve`) with the demo model and public metrics. Each round streams answers
of fixed length on several sessions at once, without scrapes and with ten scrapes a second, in alternating order.
SageMaker's collector scrapes once a minute. Then the CPU time that the worker process takes for a scrape is measured
while no answer runs; it hardly depends on the machine's load.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

from . import harness
from .harness import Options, Result, Run, median, percentile
from .route import SESSION_HEADER, Way, service

SESSIONS = 4
TOKENS = 100
EVERY_S = 0.1
SIDES = ("no scrapes", "10 scrapes/s")


def stream(way: Way, tokens: int) -> None:
    """Open a session, stream an answer of that many tokens, and close the session."""
    session = way.open()
    body = {"type": "send_text_prompt", "prompt_text": "?", "max_new_tokens": tokens, "ignore_eos": True}
    headers = {SESSION_HEADER: session}
    with way.http.stream("POST", "/invocations", json={**body, "stream": True}, headers=headers) as reply:
        for _ in reply.raise_for_status().iter_lines():
            pass
    way.close(session)


class Scraper:
    """Scrapes at an interval in a thread while it is entered. `taken_ms`: the times of the scrapes."""

    def __init__(self, url: str, taken_ms: list[float]) -> None:
        self._http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self._taken_ms = taken_ms
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ended.wait(EVERY_S):
            began = time.perf_counter()
            self._http.get("/metrics").raise_for_status()
            self._taken_ms.append((time.perf_counter() - began) * 1e3)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._http.close()


def measure(options: Options, run: Run, url: str) -> tuple[dict[str, list[float]], list[float]]:
    """Return the tokens a second of each side, by round, and the ms of each scrape."""
    tokens = options.pick(TOKENS, 20)
    ways = [Way(url) for _ in range(SESSIONS)]
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    taken_ms: list[float] = []

    def all_streams() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(SESSIONS) as pool:
            list(pool.map(lambda way: stream(way, tokens), ways))
        return SESSIONS * tokens / (time.perf_counter() - began)

    all_streams()  # warms up
    for number in range(options.rounds):
        run.say(f"round {number + 1} of {options.rounds}")
        for side in harness.alternate(list(SIDES), number):
            if side == SIDES[0]:
                rates[side].append(all_streams())
            else:
                with Scraper(url, taken_ms):
                    rates[side].append(all_streams())
    return rates, taken_ms


def cpu_ms(options: Options, url: str) -> float:
    """Return the CPU time of the worker for one scrape, less that of an equal interval without scrapes."""
    (worker,) = (
        process
        for process in psutil.Process().children(recursive=True)
        if any(part.endswith("model_service_worker.py") for part in process.cmdline())
    )
    scrapes = options.pick(500, 5)
    used = []
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        for side in SIDES[::-1]:
            began, before = time.perf_counter(), worker.cpu_times()
            if side == SIDES[1]:
                for _ in range(scrapes):
                    http.get("/metrics").raise_for_status()
                lasted_s = time.perf_counter() - began
            else:
                time.sleep(lasted_s)
            after = worker.cpu_times()
            used.append(after.user + after.system - before.user - before.system)
    return (used[0] - used[1]) / scrapes * 1e3


def report(rates: dict[str, list[float]], taken_ms: list[float], scrape_cpu_ms: float) -> Result:
    """Return the table, and the ratio of the rates: the median over pairs."""
    result = Result(["side", "tokens/s", "best tokens/s", "scrape p50 ms", "scrape p99 ms", "scrapes"])
    for side in SIDES:
        row = {"side": side, "tokens/s": median(rates[side]), "best tokens/s": max(rates[side])}
        if side == SIDES[1]:
            row |= {"scrape p50 ms": median(taken_ms), "scrape p99 ms": percentile(taken_ms, 0.99)}
            row["scrapes"] = len(taken_ms)
        result.rows.append(row)
    pairs = zip(*(rates[side] for side in SIDES), strict=True)
    result.ratios["tokens/s with scrapes / without (median of pairs)"] = median(b / a for a, b in pairs)
    result.ratios["CPU ms of the worker process for a scrape"] = scrape_cpu_ms
    result.ratios["CPU of the worker at a scrape a minute, parts of a million"] = scrape_cpu_ms / 60e3 * 1e6
    result.samples = {**rates, "scrape ms": taken_ms}
    return result


def paint(axes, result: Result) -> None:
    """Draw the rates of both sides."""
    axes.boxplot([result.samples[side] for side in SIDES], showfliers=False)
    axes.set_xticks(range(1, len(SIDES) + 1), SIDES)
    axes.set(ylabel=f"tokens/s of {SESSIONS} streams", title="Streams while /metrics is scraped")
    axes.set_ylim(bottom=0)


def parse(argv: list[str] | None) -> Options:
    """Parse the command line."""
    return harness.served_options("scrape", __doc__, argv, rounds=8, rounds_help="pairs of measurements (8)")


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
    options = parse(argv)
    os.environ["PUBLIC_METRICS"] = "on"  # of the service, which inherits it
    run = Run(options)
    with service() as (_, url):
        rates, taken_ms = measure(options, run, url)
        scrape_cpu_ms = cpu_ms(options, url)
        return run.finish(report(rates, taken_ms, scrape_cpu_ms), paint)


if __name__ == "__main__":
    main()
