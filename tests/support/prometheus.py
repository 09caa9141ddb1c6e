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
from typing import Any

import httpx
import yaml

from deploy.serve.ports import free_ports

REPO = Path(__file__).resolve().parents[2]
SHIPPED = REPO / "deploy" / "prometheus" / "prometheus.yml"
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

    def query(self, expression: str, at: float | None = None) -> list[float]:
        """Return the values of an instant query, now or at a time. Raise `httpx.HTTPError`."""
        when = {} if at is None else {"time": at}
        return [float(series["value"][1]) for series in self._get("query", query=expression, **when)["result"]]

    def query_range(self, expression: str, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        """Return the series of a query between two times, with labels and values. Raise `httpx.HTTPError`."""
        found = self._get("query_range", query=expression, start=start, end=end, step=step_s)["result"]
        return [
            {"labels": series["metric"], "points": [(float(at), float(value)) for at, value in series["values"]]}
            for series in found
        ]

    def rules(self) -> list[dict[str, Any]]:
        """Return the alerts with their health and state. Raise `httpx.HTTPError`."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **parameters: Any) -> dict[str, Any]:
        reply = self._http.get(f"/api/v1/{path}", params=parameters).raise_for_status()
        data: dict[str, Any] = reply.json()["data"]
        return data

    def wait_for(self, expression: str, holds: Callable[[float], bool]) -> float:
        """Return the sum of a query once it fulfils `holds`. Raise `AssertionError` if it does not in time."""
        values: list[float] = []
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            with contextlib.suppress(httpx.HTTPError):  # it is starting
                values = self.query(expression)
                if values and holds(math.fsum(values)):
                    return math.fsum(values)
            time.sleep(0.1)
        raise AssertionError(f"{expression} is {values}\n{self._log.read_text()[-3000:]}")


def _configuration(url: str) -> dict[str, Any]:
    """Return the shipped configuration for another target and faster."""
    config: dict[str, Any] = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    target = url.removeprefix("http://").removesuffix("/metrics")
    (scrape,) = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": [target]}]
    every = f"{SCRAPE_S}s"
    config["global"] = {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    config["rule_files"] = [str(SHIPPED.parent / name) for name in config["rule_files"]]
    return config


@contextlib.contextmanager
def scraping(url: str, folder: Path) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes http://HOST:PORT/metrics once a second, with all its files in `folder`.

    The rest of its configuration, and the alerts, are those of deploy/prometheus.
    """
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(_configuration(url)))
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
