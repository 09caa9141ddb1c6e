"""The command `python -m deploy.local_endpoint`: start the instances and the endpoint in front of them."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn

from deploy.options import Parser, decimal_number, error_prefix, port_number, typed, whole_number
from deploy.serve.configuration import REPO, cors_origins
from deploy.serve.processes import ServeError
from deploy.serve.torchserve import TorchServe

from . import contract, scrape
from .app import LOOPBACK, listen, make_app, server_config
from .contract import Corners, PlatformLimits
from .pins import Instance
from .routing import STRATEGIES, Router
from .service import EndpointService

PROG = "python -m deploy.local_endpoint"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(
        prog=PROG,
        description="A SageMaker endpoint with sticky sessions on this machine, for boto3, the AWS CLI and OpenAI "
        "clients, until Ctrl-C or SIGTERM. Listens on loopback only; signatures are not checked. The subcommand scrape "
        "prints the metrics of its instances.",
    )
    add = parser.add_argument
    add("--instances", type=whole_number(1), default=2, metavar="N", help="TorchServe processes (default: %(default)s)")
    add("--port", type=port_number(), default=8090, help="of the endpoint (default: %(default)s; 0: a free port)")
    add("--name", default="llava", help="the endpoint's name (default: %(default)s)")
    add("--model-store", type=Path, default=REPO / "model_store", metavar="DIR", help="default: model_store")
    add("--model", default="llava", help="the packed model in the store (default: %(default)s)")
    add("--timeout", type=decimal_number(0), default=600, metavar="S", help="seconds that the model may take to load")
    add("--check", action="store_true", help="check the options and the port, and exit")
    add("--cut-parts", action="store_true", help="cut streamed replies at odd bytes, as SageMaker may")
    _add_limits(parser)
    _add_routing(parser)
    _add_corners(parser)
    return parser.parse_args(argv)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits of the platform").add_argument
    usual = PlatformLimits()
    size = "of a request (default: %(default)s, the limit in the API reference; newer pages of AWS's guide have 25 MB)"
    add("--max-body-bytes", type=whole_number(1), default=usual.body_bytes, metavar="N", help=size)
    add(
        "--answer-s",
        type=decimal_number(0),
        default=usual.answer_s,
        metavar="S",
        help="for an answer (default: %(default)s)",
    )
    add(
        "--stream-s",
        type=decimal_number(0),
        default=usual.stream_s,
        metavar="S",
        help="for a stream (default: %(default)s)",
    )


def _add_routing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("routing of requests without a session").add_argument
    usual = Router()
    add("--routing", choices=STRATEGIES, default=usual.strategy, help="default: %(default)s")
    add(
        "--prefix-length",
        type=whole_number(1),
        default=usual.prefix_length,
        metavar="N",
        help="PREFIX_AWARE compares so many bytes of a body, or characters of the text of messages (%(default)s)",
    )
    add(
        "--prefix-concurrency",
        type=whole_number(1),
        default=usual.concurrency,
        metavar="N",
        help="running requests of an instance at which PREFIX_AWARE chooses another one (default: %(default)s)",
    )


def _add_corners(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("undocumented behaviour of the platform").add_argument
    likely = Corners()
    add(
        "--new-session",
        choices=contract.NEW_SESSION_CORNERS,
        default=likely.new_session,
        help="session header that the container receives for NEW_SESSION: none, an empty one, or the literal "
        "(default: %(default)s)",
    )
    add(
        "--lost-instance",
        choices=contract.LOST_INSTANCE_CORNERS,
        default=likely.lost_instance,
        help="reply for a session whose instance is lost: 400 ValidationError, 503 ServiceUnavailable, or the reply of "
        "another instance, which receives the session's ID (default: %(default)s)",
    )
    add(
        "--create-header",
        choices=contract.CREATE_HEADER_CORNERS,
        default=likely.create_header,
        help=f"header in which the container announces a session: {contract.SESSION_HEADER} or "
        f"{contract.NEW_SESSION_HEADER} (default: %(default)s)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal, or print the instances' metrics. Return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["scrape"]:
        return scrape.main(words[1:])
    args = parse_args(words)
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # an ignored signal stays ignored, as under nohup
            signal.signal(number, _interrupt)
    servers: list[TorchServe] = []
    try:
        with listener_on(args.port) as listener:
            if args.check:
                return 0
            run(args, servers, listener)
    except KeyboardInterrupt:
        print("\nstopping ...", flush=True)
    except (ServeError, OSError) as error:
        print(f"{error_prefix(PROG)}error: {error}", file=sys.stderr)
        return 1
    finally:
        if servers:
            stop(servers)
    return 0


def listener_on(port: int) -> socket.socket:
    """Return the endpoint's listener. Raise `ServeError` if the port is in use."""
    try:
        return listen(port)
    except OSError as error:
        raise ServeError(f"{typed('--port')}: port {port} cannot be used: {error.strerror}") from None


def run(args: argparse.Namespace, servers: list[TorchServe], listener: socket.socket) -> None:
    """Serve until a signal. Append each started instance to `servers`; the caller stops them."""
    url = f"http://{LOOPBACK}:{listener.getsockname()[1]}"
    print(f"starting {args.instances} TorchServe with {args.model_store / args.model} ...", flush=True)
    while len(servers) < args.instances:
        servers.append(start_instance(args.model_store, args.model))
    instances = []
    for number, server in enumerate(servers, 1):
        seconds = server.wait_ready(args.timeout)
        instances.append(
            Instance(number, server.url, str(server.log_path), server.openai_url, server.worker_metrics_url)
        )
        print(f"  instance {number}: {server.url}, ready in {seconds:.1f} s, logs in {server.log_path.parent}")
    corners = Corners(args.new_session, args.lost_instance, args.create_header)
    limits = PlatformLimits(args.max_body_bytes, args.answer_s, args.stream_s)
    router = Router(args.routing, args.prefix_length, args.prefix_concurrency)
    service = EndpointService(args.name, instances, corners, limits, cut_parts=args.cut_parts, router=router)
    print(usage(url, args.name), flush=True)
    app = make_app(service, cors_origins(os.environ))
    uvicorn.Server(server_config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listener])


def start_instance(model_store: Path, model: str) -> TorchServe:
    """Start one instance and return at once."""
    # The instances share the cores, so that a waiting thread must not spin.
    server = TorchServe(model_store, model, env={"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")})
    server.start()
    return server


def stop(servers: list[TorchServe]) -> None:
    """Stop all instances at the same time."""
    began = time.monotonic()
    with ThreadPoolExecutor(max(len(servers), 1)) as pool:
        list(pool.map(lambda server: server.stop(), servers))
    print(f"stopped in {time.monotonic() - began:.1f} s", flush=True)


def usage(url: str, name: str) -> str:
    """Return the settings for clients."""
    return f"""endpoint {name!r} is ready: SageMaker Runtime on {url}
  loopback only; signatures are not checked, so that any credentials work
  OpenAI clients: base_url {url}/endpoints/{name}/openai/v1, any key

In another terminal:

  export AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME={url}
  export AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any AWS_DEFAULT_REGION={contract.REGION} NO_PROXY={LOOPBACK}

and then boto3 or the AWS CLI as on SageMaker (docs/sagemaker.md has both). Ctrl-C here stops everything."""


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
