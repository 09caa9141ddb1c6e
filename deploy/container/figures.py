"""Tells a container's figures where SageMaker collects them: one JSON line a minute on stdout, from TorchServe's page.

The container runs it in a thread beside its launcher; `python -m deploy.container.figures` runs it by itself.
CloudWatch makes metrics of the lines (deploy/sagemaker/endpoint.yaml), which autoscaling follows. Each instance tells
its figures once a minute whether they have changed or not, so that their average is one over the instances. Needs
nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.request
from collections.abc import Sequence

GAUGE = re.compile(r"^llava_(\w+)\{[^}]*\} (\S+)$", re.MULTILINE)
EVENT = "figures"


def read_figures(url: str) -> dict[str, float]:
    """The `llava_*` metrics of a page, without that beginning; empty while nobody answers there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            page = reply.read().decode()
    except OSError:
        return {}
    return {name: float(value) for name, value in GAUGE.findall(page)}


def line(figures: dict[str, float]) -> str:
    """As one line, whole numbers as such."""
    plain = {name: int(value) if value.is_integer() else value for name, value in figures.items()}
    return json.dumps({"event": EVENT, **plain})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.container.figures", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8082/metrics", help="default: %(default)s")
    parser.add_argument("--every", type=float, default=60.0, metavar="S", help="default: %(default)s")
    args = parser.parse_args(argv)
    while True:
        if figures := read_figures(args.url):
            print(line(figures), flush=True)
        time.sleep(args.every)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)
