"""Print the container's metrics for CloudWatch: one JSON line a minute on stdout, from TorchServe's metrics page.

The container runs this in a thread; `python -m deploy.container.metric_lines` runs it alone. Metric filters in
deploy/sagemaker/endpoint.yaml make CloudWatch metrics of the lines, which autoscaling follows. Each instance prints
once a minute, even without a change, so that an average over the lines is an average over the instances. Uses only the
standard library.
"""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.request
from collections.abc import Sequence

from deploy.options import Parser, decimal_number

SAMPLE = re.compile(r"^llava_(\w+)\{[^}]*\} (\S+)$", re.MULTILINE)
EVENT = "figures"  # the metric filters match this name


def read_metrics(url: str) -> dict[str, float]:
    """Return the `llava_*` metrics of a page, without that prefix; empty if the page does not answer."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            page = reply.read().decode()
    except OSError:
        return {}
    return {name: float(value) for name, value in SAMPLE.findall(page)}


def metric_line(metrics: dict[str, float]) -> str:
    """Return the metrics as one line of JSON, with whole numbers as integers."""
    numbers = {name: int(value) if value.is_integer() else value for name, value in metrics.items()}
    return json.dumps({"event": EVENT, **numbers})


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
        if metrics := read_metrics(args.url):
            print(metric_line(metrics), flush=True)
        time.sleep(args.every)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)
