"""The metrics of the server that the demo has started."""

from __future__ import annotations

import re
import time

import httpx

_SAMPLE = re.compile(r"^(llava_\w+)\{[^}]*\} (\S+)$", re.MULTILINE)
_POLL_S = 0.05
_TIMEOUT_S = 20.0  # the server publishes its metrics at most a second late


def wait_for_metrics(metrics_url: str, **expected: float) -> dict[str, float]:
    """Return the `llava_*` metrics once those named in `expected` have these values, or as they are after 20 s."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        page = httpx.get(metrics_url, trust_env=False).raise_for_status().text
        metrics = {name: float(value) for name, value in _SAMPLE.findall(page)}
        if all(metrics.get(name) == value for name, value in expected.items()) or time.monotonic() > deadline:
            return metrics
        time.sleep(_POLL_S)
