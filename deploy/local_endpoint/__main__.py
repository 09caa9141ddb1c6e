"""The command: `python -m deploy.local_endpoint --instances 2` starts the instances, and the endpoint before them.

Owns the processes' lives and what is told at the terminal.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn

from deploy.serve.configuration import REPO
from deploy.serve.processes import ServeError
from deploy.serve.torchserve import TorchServe

from . import contract
from .app import LOOPBACK, listen, make_app
from .contract import Corners, Limits
from .pins import Instance
from .service import Service


def start_instance(model_store: Path, model: str) -> TorchServe:
    """Start one instance; returns at once. Whatever has `url`, `log_path`, `wait_ready` and `stop` will do."""
    # The instances share the cores: a thread that waits must not spin.
    server = TorchServe(model_store, model, env={"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")})
    server.start()
    return server


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.local_endpoint",
        description="A SageMaker endpoint with sticky sessions on this machine, for boto3, the AWS CLI and OpenAI "
        "clients, until Ctrl-C or SIGTERM. Listens on loopback only; signatures are accepted unchecked.",
    )
    add = parser.add_argument
    add("--instances", type=int, default=2, metavar="N", help="TorchServe processes (default: %(default)s)")
    add("--port", type=int, default=8090, help="of the endpoint (default: %(default)s; 0: a free one)")
    add("--name", default="llava", help="the endpoint's name (default: %(default)s)")
    add("--model-store", type=Path, default=REPO / "model_store", metavar="DIR", help="default: model_store")
    add("--model", default="llava", help="the packed model in it (default: %(default)s)")
    add("--timeout", type=float, default=600, metavar="S", help="how long the model may take to load")

    limits = parser.add_argument_group("limits of the platform").add_argument
    usual = Limits()
    limits(
        "--max-body-bytes",
        type=int,
        default=usual.body_bytes,
        metavar="N",
        help="of a request (default: %(default)s, as the API says; newer pages of AWS's guide say 25 MB)",
    )
    limits("--answer-s", type=float, default=usual.answer_s, metavar="S", help="for an answer (default: %(default)s)")
    limits("--stream-s", type=float, default=usual.stream_s, metavar="S", help="for a stream (default: %(default)s)")

    corners = parser.add_argument_group("what the real platform does, where nobody has confirmed it").add_argument
    likely = Corners()
    corners(
        "--new-session",
        choices=contract.NEW_SESSION_CORNERS,
        default=likely.new_session,
        help="how NEW_SESSION reaches the container: without the header, with an empty one, or as it is "
        "(default: %(default)s)",
    )
    corners(
        "--lost-instance",
        choices=contract.LOST_INSTANCE_CORNERS,
        default=likely.lost_instance,
        help="what a session whose instance is gone is answered with: 400 ValidationError, 503 ServiceUnavailable, or "
        "what another instance says (default: %(default)s)",
    )
    corners(
        "--create-header",
        choices=contract.CREATE_HEADER_CORNERS,
        default=likely.create_header,
        help=f"where the container announces a session: {contract.SESSION_HEADER} or {contract.NEW_SESSION_HEADER} "
        "(default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.instances < 1:
        parser.error("--instances must be at least 1")
    return args


def usage(url: str, name: str) -> str:
    """What to type next."""
    return f"""endpoint {name!r} is ready: SageMaker Runtime on {url}
  loopback only; signatures are accepted unchecked, so any credentials will do
  OpenAI clients: base_url {url}/v1, any key

In another terminal:

  export AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME={url}
  export AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any AWS_DEFAULT_REGION={contract.REGION}

and then boto3 or the AWS CLI as on SageMaker (README.md has both). Ctrl-C here stops it all."""


def run(args: argparse.Namespace, servers: list[TorchServe]) -> None:
    """Serve until a signal; `servers` is filled with what has to be stopped."""
    listener = listen(args.port)
    url = f"http://{LOOPBACK}:{listener.getsockname()[1]}"
    print(f"starting {args.instances} TorchServe with {args.model_store / args.model} ...", flush=True)
    while len(servers) < args.instances:
        servers.append(start_instance(args.model_store, args.model))
    instances = []
    for number, server in enumerate(servers, 1):
        seconds = server.wait_ready(args.timeout)
        instances.append(Instance(number, server.url, str(server.log_path)))
        print(f"  instance {number}: {server.url}, ready in {seconds:.1f} s, logs in {server.log_path.parent}")
    corners = Corners(args.new_session, args.lost_instance, args.create_header)
    limits = Limits(args.max_body_bytes, args.answer_s, args.stream_s)
    service = Service(args.name, instances, corners, limits)
    print(usage(url, args.name), flush=True)
    config = uvicorn.Config(make_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])


def stop(servers: list[TorchServe]) -> None:
    """Stop them all at once."""
    began = time.monotonic()
    with ThreadPoolExecutor(max(len(servers), 1)) as pool:
        list(pool.map(lambda server: server.stop(), servers))
    print(f"stopped in {time.monotonic() - began:.1f} s", flush=True)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
            signal.signal(number, _interrupt)
    servers: list[TorchServe] = []
    try:
        run(args, servers)
    except KeyboardInterrupt:
        print("\nstopping ...", flush=True)
    except (ServeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        stop(servers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
