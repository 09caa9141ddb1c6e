"""Print the container's metrics for CloudWatch: one JSON line a minute on stdout, from TorchServe's metrics page.

The container runs this in a thread; `python -m deploy.container.metric_lines` runs it alone. Metric filters in
deploy/sagemaker/endpoint.yaml make CloudWatch metrics of the lines, which autoscaling follows. Each instance prints
once a minute, even without a change, so that an average over the lines is an average over the instances. While there
are no metrics, the line has the reason. Uses only the standard library.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any

from deploy.options import Parser, decimal_number

SAMPLE = re.compile(r"^llava_(\w+)\{[^}]*\} (\S+)$", re.MULTILINE)
EVENT = "figures"  # the metric filters match this name
BLIND_EVENT = "figures_missing"
TIMEOUT_S = 5.0
MAX_BYTES = 4 << 20
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the page is on loopback


class BlindError(Exception):
    """There are no metrics now."""


def read_metrics(url: str) -> dict[str, float]:
    """Return the `llava_*` metrics of a page, without that prefix. Raise `BlindError` if there are none."""
    try:
        with _DIRECT.open(url, timeout=TIMEOUT_S) as reply:
            page = _read(reply).decode()
        metrics = {name: float(value) for name, value in SAMPLE.findall(page)}
    except (OSError, HTTPException, ValueError) as error:
        raise BlindError(f"{type(error).__name__}: {error}") from error
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if not finite:
        raise BlindError("the page has no llava_* metric")
    return finite


def _read(reply: Any) -> bytes:
    """Return a body. Raise ValueError if it is too large, or does not end in time."""
    body = b""
    deadline = time.monotonic() + TIMEOUT_S
    while chunk := reply.read1(1 << 16):
        body += chunk
        if len(body) > MAX_BYTES or time.monotonic() > deadline:
            raise ValueError(f"the page must be at most {MAX_BYTES} bytes in {TIMEOUT_S:g} s, got {len(body)}")
    if reply.length:
        raise ValueError(f"the page ended {reply.length} bytes early")
    return body


def metric_line(metrics: dict[str, float]) -> str:
    """Return the metrics as one line of JSON, with whole numbers as integers."""
    numbers = {name: int(value) if value.is_integer() else value for name, value in metrics.items()}
    return json.dumps({"event": EVENT, **numbers})


def next_line(url: str) -> str:
    """Return the metrics as a line, or a line with the reason why there are none. No filter matches the latter."""
    try:
        return metric_line(read_metrics(url))
    except BlindError as error:
        return json.dumps({"event": BLIND_EVENT, "reason": str(error)[:200]})


def main(argv: Sequence[str] | None = None) -> None:
    """Print the metrics at an interval, until the process ends."""
    about = "Print the metrics of a server as one JSON line, at an interval, for CloudWatch's metric filters."
    parser = Parser(prog="python -m deploy.container.metric_lines", description=about)
    url = "metrics page (default: %(default)s)"
    parser.add_argument("--url", default="http://127.0.0.1:8082/metrics", help=url)
    every = "seconds between two lines (default: %(default)s)"
    parser.add_argument("--every", type=decimal_number(0), default=60.0, metavar="S", help=every)
    args = parser.parse_args(argv)
    while True:
        time.sleep(args.every)  # first: at the start the page does not exist yet
        print(next_line(args.url), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)
