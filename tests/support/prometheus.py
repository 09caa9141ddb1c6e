"""Debian's Prometheus: promtool, and a server that scrapes one page."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from deploy.serve.ports import free_ports

REPO = Path(__file__).resolve().parents[2]
UNPACKED = REPO / ".cache" / "prometheus" / "usr" / "bin"  # by scripts/need_prometheus.sh
SCRAPE_S = 1
PATIENCE_S = 120.0


def command(name: str) -> str:
    """Return the path of prometheus or promtool. Raise `AssertionError` if it is missing."""
    found = shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}{UNPACKED}")
    assert found, f"no {name}; run scripts/need_prometheus.sh --install"
    return found


def lint(page: str) -> str:
    """Return what `promtool check metrics` prints about a page in Prometheus' text format."""
    done = subprocess.run(
        [command("promtool"), "check", "metrics"], input=page, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


class Prometheus:
    """A running Prometheus on loopback."""

    def __init__(self, port: int, log: Path) -> None:
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30)
        self._log = log

    def query(self, expression: str) -> list[float]:
        """Return the values of an instant query. Raise `httpx.HTTPError`."""
        reply = self._http.get("/api/v1/query", params={"query": expression}).raise_for_status()
        return [float(series["value"][1]) for series in reply.json()["data"]["result"]]

    def wait_for(self, expression: str, holds: Callable[[float], bool]) -> None:
        """Return when the sum of a query fulfils `holds`. Raise `AssertionError` if it does not in time."""
        values: list[float] = []
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            with contextlib.suppress(httpx.HTTPError):  # it is starting
                values = self.query(expression)
                if values and holds(math.fsum(values)):
                    return
            time.sleep(0.1)
        raise AssertionError(f"{expression} is {values}\n{self._log.read_text()[-3000:]}")


@contextlib.contextmanager
def scraping(url: str, folder: Path) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes http://HOST:PORT/metrics once a second, with all its files in `folder`."""
    config = folder / "prometheus.yml"
    target = url.removeprefix("http://").removesuffix("/metrics")
    config.write_text(
        f"global: {{scrape_interval: {SCRAPE_S}s, scrape_timeout: {SCRAPE_S}s}}\n"
        f"scrape_configs: [{{job_name: llava, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    [port] = free_ports(1)
    arguments = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    arguments.append(f"--web.listen-address=127.0.0.1:{port}")
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [command("prometheus"), *arguments], cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield Prometheus(port, log)
    finally:
        process.kill()
        process.wait()
