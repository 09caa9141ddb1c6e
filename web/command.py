"""The command `python -m web`: serve the page, and a model server for it unless one is named."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn

from deploy.options import Parser, decimal_number, error_prefix, port_number, typed
from deploy.serve.configuration import REPO
from deploy.serve.processes import LOOPBACK, ServeError
from llava_sessions_client import AskOptions

from .application import make_app
from .chats import Chats
from .local_server import LocalServer, Progress
from .status import is_url

PROG = "python -m web"
DEFAULT_PORT = 8100


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(
        prog=PROG,
        description="Serve the web chat until Ctrl-C or SIGTERM. Without --endpoint, serve the packed model too.",
    )
    add = parser.add_argument
    endpoint = "URL of a server (http://127.0.0.1:8080), or name of a SageMaker endpoint (default: start a server)"
    add("--endpoint", default="", metavar="URL_OR_NAME", help=endpoint)
    add("--region", metavar="REGION", help="AWS region of the endpoint (default: as boto3 finds it)")
    add(
        "--port",
        type=port_number(),
        default=DEFAULT_PORT,
        metavar="N",
        help="of the page (%(default)s; 0: a free port)",
    )
    host = "address to listen on (%(default)s). Everyone who reaches another address may use the model. "
    host += "With 0.0.0.0, name the address that browsers use by --allow-host"
    add("--host", default=LOOPBACK, help=host)
    allowed = "further name under which browsers reach the page, such as chat.example.com; may be repeated"
    add("--allow-host", action="append", default=[], metavar="NAME[:PORT]", help=allowed)
    option = "option of each question, such as temperature=0.7 or max_new_tokens=256; may be repeated"
    add("--ask-option", type=_option, action="append", default=[], metavar="NAME=VALUE", help=option)
    add("--model-store", type=Path, default=REPO / "model_store", metavar="DIR", help="default: model_store")
    add("--name", default="llava", help="the packed model (default: %(default)s)")
    add("--timeout", type=decimal_number(0), default=600, metavar="S", help="seconds that the model may take to load")
    add("--check", action="store_true", help="check the options and the port, and exit")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal. Return the exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr, level=logging.WARNING)
    server: LocalServer | None = None
    _raise_on_signals()
    try:
        with listen(args.host, args.port) as listener:
            if args.check:
                return 0
            if not args.endpoint:
                server = LocalServer(args.model_store, args.name, timeout_s=args.timeout)
                _start(server)
            endpoint = args.endpoint if server is None else server.url
            _serve(endpoint, listener, args)
    except KeyboardInterrupt:
        print("\nstopping ...", flush=True)
    except (ServeError, OSError) as error:
        print(f"{error_prefix(PROG)}error: {error}", file=sys.stderr)
        return 1
    finally:
        if server is not None:
            server.stop()
    return 0


def _option(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE with the name of an option of `Chat.ask` and a value in JSON. An argparse type."""
    name, _, value = text.partition("=")
    if name not in AskOptions.__annotations__:
        raise argparse.ArgumentTypeError(f"must name one of {', '.join(AskOptions.__annotations__)}, got {name!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must have a number, true, false or a quoted text, got {value!r}") from None


def _start(server: LocalServer) -> None:
    progress = Progress("starting the model server")
    try:
        server.start(progress)
    finally:
        progress.end()


def _serve(endpoint: str, listener: socket.socket, args: argparse.Namespace) -> None:
    port = listener.getsockname()[1]
    app = make_app(
        endpoint,
        hosts_of(args.host, port, args.allow_host),
        region=args.region,
        options=cast("AskOptions", dict(args.ask_option)),
    )
    config = uvicorn.Config(
        app,
        loop="asyncio",  # with uvloop anyio fails in a connection that is reset while it is opened
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=3,
        proxy_headers=False,
    )
    shown = LOOPBACK if args.host in (LOOPBACK, "0.0.0.0", "::") else args.host
    kind = "server" if is_url(endpoint) else "SageMaker endpoint"
    print(f"web chat: http://{shown}:{port} ({kind} {endpoint}; Ctrl-C ends it)", flush=True)
    PageServer(config).run(sockets=[listener])


class PageServer(uvicorn.Server):
    """uvicorn that ends running answers on a signal, so that no connection holds up the end."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal. Runs on the main thread, and must not wait."""
        chats: Chats | None = getattr(self.config.app.state, "chats", None)  # type: ignore[union-attr]  # a Starlette
        if chats is not None:
            threading.Thread(target=chats.stop_all, name="stop-answers").start()
        super().handle_exit(sig, frame)


def hosts_of(host: str, port: int, allowed: Sequence[str]) -> set[str]:
    """Return the accepted values of the header `Host`. Another value may be an attack by DNS rebinding.

    `allowed`: further names. One without a port is accepted with the port of the page too.
    """
    own = {LOOPBACK, "localhost", "[::1]", f"[{host}]" if ":" in host else host}
    hosts = {*allowed, *(f"{name}:{port}" for name in (*own, *allowed))}
    # Browsers omit the port of plain HTTP, and that of TLS, which a proxy may add.
    short = {name.removesuffix(":80").removesuffix(":443") for name in hosts}
    return {name.lower() for name in hosts | short}


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raise `ServeError` if the port is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        option = typed("--port")
        raise ServeError(f"port {port} of {host} cannot be used ({error.strerror}); choose another {option}") from None
    return listener


def _raise_on_signals() -> None:
    """End the start of the model server on a signal. uvicorn replaces these handlers while it runs."""

    def on_signal(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # an ignored signal stays ignored, as under nohup
            signal.signal(number, on_signal)
