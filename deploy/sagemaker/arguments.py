"""The options of `llava-deploy`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from deploy.doctor import command as doctor
from deploy.options import Parser, decimal_number, whole_number

from . import actions, capacity
from .account import Account

REPO = Path(__file__).resolve().parents[2]

Action = Callable[[argparse.Namespace, Account], None]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options. `run` is the function of the command, or None for `capacity` and `doctor`."""
    parser = Parser(
        prog="llava-deploy",
        description="LLaVA Sessions on Amazon SageMaker. Credentials, profile and region as for the AWS CLI.",
        epilog="In this order: push, upload, up, invoke, status, logs, down. docs/sagemaker.md explains each step.",
    )
    commands = _Commands(parser)
    _add_push(commands)
    _add_upload(commands)
    _add_up(commands)
    commands.add("status", actions.status)
    _add_invoke(commands)
    _add_logs(commands)
    _add_down(commands)
    _add_capacity(commands)
    _add_doctor(commands)
    return parser.parse_args(argv)


class _Commands:
    """The subparsers, and the options that several commands share."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        self.endpoint = argparse.ArgumentParser(add_help=False)
        name = "the endpoint and its stack (default: %(default)s)"
        self.endpoint.add_argument("--name", default="llava", type=_name, help=name)
        self.endpoint.add_argument("--profile", help="a profile of ~/.aws (default: AWS_PROFILE)")
        self.endpoint.add_argument("--region", help="default: AWS_REGION, or the profile's")
        self.dry_run = argparse.ArgumentParser(add_help=False)
        self.dry_run.add_argument("--dry-run", action="store_true", help="print the steps, and change nothing")
        self.repository = argparse.ArgumentParser(add_help=False)
        self.repository.add_argument("--repository", default="llava-sessions", help="in ECR (default: %(default)s)")
        self.bucket = argparse.ArgumentParser(add_help=False)
        bucket = "in S3 (default: llava-sessions-<account>-<region>, made if it is missing)"
        self.bucket.add_argument("--bucket", help=bucket)

    def add(self, name: str, run: Action, *shared: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add the parser of a command, with the options of `shared`."""
        text = (run.__doc__ or "").strip().rstrip(".")
        parser = self.subparsers.add_parser(
            name, help=text[0].lower() + text[1:], description=run.__doc__, parents=[self.endpoint, *shared]
        )
        parser.set_defaults(run=run)
        return parser


def _add_push(commands: _Commands) -> None:
    add = commands.add("push", actions.push, commands.dry_run, commands.repository).add_argument
    add("--image", default="llava-sessions:cuda", help="the local image (default: %(default)s)")
    add("--tag", help="its tag in ECR (default: its ID)")
    add("--build", action="store_true", help="run `make image` first")


def _add_upload(commands: _Commands) -> None:
    add = commands.add("upload", actions.upload, commands.dry_run, commands.bucket).add_argument
    default = REPO / "model_store/llava.sagemaker"
    packed = "output of build_mar.sh --sagemaker (default: model_store/llava.sagemaker)"
    add("model", nargs="?", type=Path, default=default, metavar="DIR", help=packed)


def _add_up(commands: _Commands) -> None:
    add = commands.add("up", actions.up, commands.dry_run, commands.repository, commands.bucket).add_argument
    add("--image", metavar="URI", help="in ECR (default: the newest in --repository)")
    add("--model", metavar="S3_URI", help="default: the latest upload")
    add("--instance-type", metavar="TYPE", help="see `llava-deploy capacity` (default: ml.g5.2xlarge)")
    add("--instances", type=whole_number(1), metavar="N", help="initial and minimum number (default: 1)")
    add("--max-instances", type=whole_number(1), metavar="N", help="maximum of autoscaling (default: --instances)")
    add("--sessions", type=whole_number(1), metavar="N", help="sessions that an instance admits (default: as packed)")
    add("--role", metavar="ARN", help="role of the containers (default: one is made)")
    add("--subnets", metavar="ID,ID", help="of a VPC, for the containers")
    add("--security-groups", metavar="ID,ID", help="with --subnets")
    add("--alarm-topic", metavar="ARN", help="an SNS topic that receives alarms")
    add("--journal", metavar="PREFIX/", help="folder of the bucket for the sessions' journal")
    add("--force", action="store_true", help="deploy a model that does not fit the instance type by `capacity`")
    ami = "InferenceAmiVersion (default: driver 580 if the instance type has an older one)"
    add("--ami", metavar="VERSION", help=ami)
    rest = "any other parameter of deploy/sagemaker/endpoint.yaml; may be repeated"
    add("--set", type=_pair, action="append", default=[], metavar="NAME=VALUE", help=rest)


def _add_invoke(commands: _Commands) -> None:
    add = commands.add("invoke", actions.invoke, commands.dry_run).add_argument
    add("picture", type=Path, help="PNG, JPEG, WEBP, GIF, BMP or TIFF")
    add("question", nargs="+", help="asked one after another, in one session")


def _add_logs(commands: _Commands) -> None:
    add = commands.add("logs", actions.logs).add_argument
    add("--since", type=_duration, default=timedelta(minutes=10), help="30s, 10m, 2h or 1d (default: 10m)")
    add("--filter", default="", metavar="PATTERN", help="a CloudWatch filter pattern")
    add("--follow", action="store_true", help="print new lines until Ctrl-C")


def _add_down(commands: _Commands) -> None:
    shared = (commands.dry_run, commands.repository, commands.bucket)
    add = commands.add("down", actions.down, *shared).add_argument
    add("--objects", action="store_true", help="delete the uploaded models and journals too")
    add("--images", action="store_true", help="delete the pushed images too")
    add("--yes", action="store_true", help="do not ask")


def _add_capacity(commands: _Commands) -> None:
    text = "Print how many sessions fit on which instance"
    parser = commands.subparsers.add_parser("capacity", help=text.lower(), description=f"{text}. {capacity.NOTE}")
    parser.set_defaults(run=None)
    model = "a part of the names of the models to print, such as InternVL3.5 (default: all models)"
    parser.add_argument("--model", type=_part_of_name, default="", metavar="NAME", help=model)
    tokens = "text tokens of a conversation, without its picture (default: %(default)s)"
    parser.add_argument("--text-tokens", type=whole_number(1), default=1024, metavar="N", help=tokens)
    reserve = "GPU memory for CUDA itself and for temporary tensors (default: as the engine reserves for the model)"
    parser.add_argument("--reserve-gib", type=decimal_number(0), metavar="GIB", help=reserve)
    precisions = ["auto", "int8"]
    weights = "as `llava.weights`: auto for 16 bits, or int8 (default: %(default)s)"
    parser.add_argument("--weights", choices=precisions, default="auto", help=weights)
    kv = "as `llava.kv_dtype`: auto for 16 bits, or int8 (default: %(default)s)"
    parser.add_argument("--kv-dtype", choices=precisions, default="auto", help=kv)


def _add_doctor(commands: _Commands) -> None:
    about = f"{doctor.ABOUT}, and print what to do"
    parser = commands.subparsers.add_parser("doctor", help=about[0].lower() + about[1:], description=f"{about}.")
    parser.set_defaults(run=None)
    doctor.add_options(parser)


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-zA-Z](-?[a-zA-Z0-9]){0,62}", text):
        raise argparse.ArgumentTypeError(
            f"must be letters, digits and inner hyphens, a letter first, at most 63, got {text!r}"
        )
    return text


def _part_of_name(text: str) -> str:
    if not capacity.with_precision("auto", "auto", text):
        names = ", ".join(shape.name for shape in capacity.SHAPES)
        raise argparse.ArgumentTypeError(f"must be a part of one of the names {names}, got {text!r}")
    return text


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be like 30s, 10m, 2h or 1d, got {text!r}")
    return timedelta(seconds=int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]])
