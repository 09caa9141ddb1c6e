"""Read the server's Prometheus metrics."""

from __future__ import annotations

import re
import time

import httpx

_SAMPLE = re.compile(r"^(llava_\w+)\{[^}]*\} (\S+)$", re.MULTILINE)
_POLL_S = 0.05


def read_metrics(metrics_url: str) -> dict[str, float]:
    """Return the `llava_*` metrics by name. A metric without a sample yet is absent."""
    url = f"{metrics_url.removesuffix('/metrics')}/metrics"
    reply = httpx.get(url, trust_env=False).raise_for_status()  # on this host, so through no proxy
    return {name: float(value) for name, value in _SAMPLE.findall(reply.text)}


def wait_for_metrics(metrics_url: str, timeout_s: float = 20.0, **expected: float) -> dict[str, float]:
    """Return the metrics once those named in `expected` have these values, or as they are after `timeout_s`.

    The server publishes its metrics at most a second late.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        metrics = read_metrics(metrics_url)
        if all(metrics.get(name) == value for name, value in expected.items()) or time.monotonic() > deadline:
            return metrics
        time.sleep(_POLL_S)
