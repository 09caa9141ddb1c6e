"""`python -m deploy.local_endpoint scrape`: print what SageMaker would read from each instance's page of metrics."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import httpx

from deploy.options import Parser, port_number

PROG = "python -m deploy.local_endpoint scrape"


def main(argv: Sequence[str]) -> int:
    """Print the pages of a running endpoint. Return the exit code: 1 if an instance has none."""
    parser = Parser(
        prog=PROG,
        description="Print the page of metrics that SageMaker would read from each instance of a running endpoint.",
    )
    parser.add_argument("--port", type=port_number(), default=8090, help="of the endpoint (default: %(default)s)")
    args = parser.parse_args(argv)
    with httpx.Client(base_url=f"http://127.0.0.1:{args.port}", timeout=10, trust_env=False) as http:
        try:
            return scrape(http)
        except httpx.TransportError as error:
            print(f"{PROG}: error: no endpoint on port {args.port}: {type(error).__name__}", file=sys.stderr)
            return 1


def scrape(http: httpx.Client) -> int:
    """Print the page of each instance after a line with its number. Return the exit code."""
    failed = 0
    for instance in http.get("/instances").raise_for_status().json():
        page = http.get(f"/instances/{instance['number']}/metrics")
        print(f"# instance {instance['number']}: {instance['metrics_url']}, status {page.status_code}")
        print(page.text.rstrip())
        failed += page.is_error
    return 1 if failed else 0
