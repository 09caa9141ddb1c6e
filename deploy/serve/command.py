"""The command `python -m deploy.serve`: serve a packed model until a signal."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from deploy.options import Parser, decimal_number, error_prefix, port_number, port_range

from .configuration import REPO
from .haproxy import find_haproxy
from .ports import choose_ports
from .processes import LOOPBACK, ServeError
from .service import Service

PROG = "python -m deploy.serve"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(
        prog=PROG,
        description="Serve a packed model with TorchServe behind HAProxy, in the foreground, until Ctrl-C or SIGTERM. "
        "A server that dies is restarted.",
    )
    add = parser.add_argument
    add("--model-store", type=Path, default=REPO / "model_store", metavar="DIR", help="default: model_store")
    add("--name", default="llava", help="the packed model (default: %(default)s)")
    port = "inference; management and metrics take the next two (default: %(default)s; 0: free ports)"
    add("--port", type=port_number(further=2), default=8080, metavar="N", help=port)
    inner = "all ports but the public one, both ends included (default: as above, and free ones)"
    add("--safe-ports", type=port_range, metavar="LOW-HIGH", help=inner)
    add("--host", default=LOOPBACK, help="address of HAProxy; TorchServe is always on loopback (%(default)s)")
    home = "temporary files and logs, kept (default: a temporary folder)"
    add("--home", type=Path, metavar="DIR", help=home)
    add("--java-opts", type=shlex.split, default=[], metavar="OPTS", help="options of the JVM, such as '-Xmx2g'")
    add("--log-level", choices=["error", "warn", "info", "debug"], default="warn", help="of the frontend")
    add("--timeout", type=decimal_number(0), default=600, metavar="S", help="seconds that the model may take to load")
    add("--check", action="store_true", help="check the options and the ports, and exit")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal. Return the exit code."""
    args = parse_args(argv)
    haproxy = find_haproxy()
    if args.check:
        return check(args.port, args.safe_ports)
    if haproxy is None:
        print("no HAProxy (scripts/need_haproxy.sh): TorchServe itself listens; /ping answers 200 while it loads")
    try:
        service = Service(
            args.model_store,
            args.name,
            haproxy=haproxy,
            port=args.port,
            host=args.host,
            safe_ports=args.safe_ports,
            home=args.home,
            ready_timeout_s=args.timeout,
            quiet=False,
            java_options=args.java_opts,
            log_level=args.log_level,
        )
    except ServeError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return run_until_signal(service)


def check(port: int, safe_ports: range | None) -> int:
    """Return 0 if the ports are free, else print the reason and return 1."""
    try:
        choose_ports(port, "front", safe_ports)
    except ServeError as err:
        print(f"{error_prefix(PROG)}error: {err}", file=sys.stderr)
        return 1
    return 0


def run_until_signal(service: Service) -> int:
    """Run a service until a signal stops it. Return the exit code.

    For the main thread of a process that does nothing else.
    """

    def on_signal(number: int, _frame: FrameType | None) -> None:
        service.stop(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # an ignored signal stays ignored, as under nohup
            signal.signal(number, on_signal)
    return service.run()
