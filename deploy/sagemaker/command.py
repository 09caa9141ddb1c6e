"""`llava-deploy`: from a folder of weights to a SageMaker endpoint, and back to nothing.

Owns the command line: what can be asked for, what is said, and the exit code. Results go to stdout and progress to
stderr; a failure is one line. What each errand does on AWS is in the other modules. Every command can be given again:
it does what is left to do.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from deploy.sagemaker import capacity, chats, images, models, roles, stacks, watching
from deploy.sagemaker.account import Account
from deploy.sagemaker.problems import DeployError, explain

REPO = Path(__file__).resolve().parents[2]
GPU_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"  # NVIDIA driver 580: what the image's CUDA 13 needs
NEEDS_AMI = re.compile(r"ml\.(g[456]|p[45])[a-z]*\.")  # newer ones have such a driver anyway
TARGET_SHARE = 0.7  # of the sessions that an instance admits, where autoscaling adds one
INTERRUPTED = 130

# option of `up` -> parameter of the template
PARAMETERS = {
    "instance_type": "InstanceType",
    "instances": "InstanceCount",
    "max_instances": "MaxInstanceCount",
    "sessions": "SessionsPerInstance",
    "role": "ExecutionRoleArn",
    "subnets": "SubnetIds",
    "security_groups": "SecurityGroupIds",
    "alarm_topic": "AlarmTopicArn",
    "journal": "JournalS3Prefix",
    "ami": "InferenceAmiVersion",
}


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout holds the result alone."""
    print(text, file=sys.stderr, flush=True)


# --- the commands -----------------------------------------------------------------------------------------------------


def push(args: argparse.Namespace, account: Account) -> None:
    """A local image to ECR; prints its URI there."""
    tool = images.builder()
    if args.build and not args.dry_run:
        images.build()
    tag = args.tag or images.local_id(tool, args.image)
    target = f"{images.repository_uri(account, args.repository)}:{tag}"
    if there := images.by_digest(account, images.Image.parse(target)):
        say(f"{target} is there already")
        print(there)
        return
    if args.dry_run:
        say(f"would push {args.image} with {tool.name} to\n{target}\nand make the repository if it is missing")
        return
    if images.ensure_repository(account, args.repository):
        say(f"made the ECR repository {args.repository}")
    say(f"pushing {args.image} with {tool.name} ...")
    images.push(account, tool, args.image, target)
    print(images.by_digest(account, images.Image.parse(target)) or target)


def upload(args: argparse.Namespace, account: Account) -> None:
    """A packed model to S3; prints its address there."""
    model = models.read_model(args.model)
    address = models.address_of(account, args.bucket, model)
    size = f"{len(model.files)} files, {_size(model.size)}"
    if args.dry_run:
        say(f"would send {size}, less what is there already, to\n{address}")
        return
    say(f"{size} to {address}")
    sent = models.upload(account, model, address)
    say(f"sent {_size(sent)}" if sent else "all of it was there already")
    print(address)


def up(args: argparse.Namespace, account: Account) -> None:
    """The endpoint, made or changed; ends with the command to try."""
    before = stacks.settle(account, _tell) if not args.dry_run else stacks.state(account)
    stacks.check_free(account, before)
    parameters = _parameters(args, account, before)
    if args.dry_run:
        say(f"would {'change' if before else 'make'} the stack {account.name!r} with these parameters:")
        for name, value in parameters.items():
            print(f"{name}={value}")
        return
    doing = "changing" if before else "making"
    say(f"{doing} the stack {account.name!r}; Ctrl-C leaves it to itself ...")
    done = stacks.deploy(account, before, parameters, _tell)
    if done is None:
        say("nothing was to be changed")
    where = "".join(f" --{key} {value}" for key, value in _where(args).items())
    print(f"The endpoint {account.name!r} is up. Try it with a picture of yours:")
    print(f'  llava-deploy invoke{where} picture.png "What is in the picture?"')


def status(_args: argparse.Namespace, account: Account) -> None:
    """Stack, endpoint, sessions and alarms."""
    stack, endpoint = stacks.state(account), watching.endpoint(account)
    if stack is None and endpoint is None:
        raise DeployError(f"no stack and no endpoint named {account.name!r} in {account.region}")
    print(f"stack      {stack.status if stack else 'none'}")
    if endpoint is None:
        print("endpoint   none")
        return
    print(f"endpoint   {endpoint.status}{f': {endpoint.reason}' if endpoint.reason else ''}")
    print(f"instances  {endpoint.instances} of {endpoint.wanted} {endpoint.instance_type}")
    print(f"image      {endpoint.image}")
    print(f"model      {endpoint.model}")
    sessions = watching.open_sessions(account)
    print(f"sessions   {'not told yet' if sessions is None else f'{sessions:.1f} open per instance'}")
    print(f"alarms     {', '.join(watching.alarms(account)) or 'none'}")


def invoke(args: argparse.Namespace, account: Account) -> None:
    """One chat: opens a session, asks, closes it."""
    if args.dry_run:
        say(f"would open a session on {args.picture}, ask {len(args.question)} questions and close it")
        return
    chat = chats.open_chat(account, args.picture)
    say(f"open until {chat.expires}")
    try:
        for question in args.question:
            say(f"> {question}")
            for piece in chat.ask(question):
                print(piece, end="", flush=True)
            print(flush=True)  # before the next question, which goes to stderr
    finally:
        chat.close()
    say("closed")


def logs(args: argparse.Namespace, account: Account) -> None:
    """What the containers print."""
    for line in watching.log_lines(account, args.since, args.filter, args.follow):
        print(f"{line.at:%H:%M:%S} {line.stream} {line.text}", flush=True)


def down(args: argparse.Namespace, account: Account) -> None:
    """Everything deleted that was asked for; asks first."""
    found = stacks.state(account)
    goes = [f"the stack {account.name!r} with its endpoint, and every session that is open"] if found else []
    if found and not found.is_ours:
        raise DeployError(f"the stack {account.name!r} was not made by llava-deploy; delete it by hand")
    if args.objects:
        prefix = f"s3://{args.bucket or account.bucket}/{account.name}/"
        goes.append(f"everything under {prefix}, with the bucket if it was made here")
    if args.images:
        goes.append(f"the ECR repository {args.repository!r} with all its images")
    if not goes:
        say(f"no stack named {account.name!r} in {account.region}: nothing to delete")
        return
    say("this deletes:\n  - " + "\n  - ".join(goes))
    if args.dry_run:
        return
    if not args.yes:
        _ask_for(account.name)
    if found:
        stacks.delete(account, found, _tell)
    if args.objects:
        say(f"deleted {models.delete_all(account, args.bucket)} objects")
    if args.images and images.delete_repository(account, args.repository):
        say(f"deleted the ECR repository {args.repository}")
    print("deleted")


# --- what they share --------------------------------------------------------------------------------------------------


def _parameters(args: argparse.Namespace, account: Account, before: stacks.State | None) -> dict[str, str]:
    """The template's parameters, from the options; checked against what is there."""
    packed = None if args.model else models.current(account, args.bucket)
    address = packed.address if packed else models.Address.parse(args.model)
    models.check_there(account, address)
    uri = args.image or images.newest(account, args.repository)
    image = images.Image.parse(uri)
    pinned = images.by_digest(account, image)
    if pinned is None:
        raise DeployError(f"ECR has no image {uri}: run `llava-deploy push` first")
    if args.role:
        roles.check_role(account, args.role)
    partition = account.session.get_partition_for_region(account.region)
    parameters = {
        "EndpointName": account.name,
        "ImageUri": pinned,
        "ImageRepositoryArn": image.repository_arn(partition),
        "ModelBucket": address.bucket,
        "ModelKey": address.key,
        "ModelFormat": "tarball" if address.is_tarball else "folder",
    }
    if packed and packed.sessions:
        parameters["SessionsPerInstance"] = str(packed.sessions)
    given = {name: getattr(args, option) for option, name in PARAMETERS.items() if getattr(args, option) is not None}
    parameters |= {name: str(value) for name, value in given.items()}
    parameters |= _derived(parameters, before)
    for name, value in args.set:
        if name not in stacks.template_parameters():
            raise DeployError(f"--set {name}: deploy/sagemaker/endpoint.yaml has no such parameter")
        parameters[name] = value
    return parameters


def _derived(given: Mapping[str, str], before: stacks.State | None) -> dict[str, str]:
    """What follows from the options, where they don't say it themselves."""
    derived = {}
    if "InstanceCount" in given and "MaxInstanceCount" not in given:
        most = int(before.parameters.get("MaxInstanceCount", 0)) if before else 0
        derived["MaxInstanceCount"] = str(max(int(given["InstanceCount"]), most))
    if "SessionsPerInstance" in given:
        derived["SessionsTarget"] = str(max(int(TARGET_SHARE * int(given["SessionsPerInstance"])), 1))
    default = stacks.template_parameters()["InstanceType"]["Default"]
    kind = given.get("InstanceType", "" if before else default)
    if kind and "InferenceAmiVersion" not in given:
        derived["InferenceAmiVersion"] = GPU_AMI if NEEDS_AMI.match(kind) else ""
    return derived


def _tell(happening: stacks.Happening) -> None:
    reason = f"  {happening.reason}" if happening.reason else ""
    say(f"{happening.at:%H:%M:%S} {happening.status:<28} {happening.kind} {happening.name}{reason}")


def _ask_for(name: str) -> None:
    if not sys.stdin.isatty():
        raise DeployError("nobody is here to be asked; give --yes if you mean it")
    if input(f"Type {name} to go on: ").strip() != name:
        raise DeployError("that was something else; nothing was deleted")


def _where(args: argparse.Namespace) -> dict[str, str]:
    """The options that name the same endpoint again."""
    chosen = {"name": args.name if args.name != "llava" else None, "profile": args.profile, "region": args.region}
    return {key: value for key, value in chosen.items() if value}


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# --- the command line -------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="llava-deploy",
        description="LLaVA Sessions on Amazon SageMaker. Credentials, profile and region as for the AWS CLI.",
        epilog="In this order: push, upload, up, invoke, status, logs, down. docs/sagemaker.md goes through it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--name", default="llava", type=_name, help="the endpoint and its stack (default: %(default)s)")
    where.add_argument("--profile", help="a profile of ~/.aws (default: AWS_PROFILE)")
    where.add_argument("--region", help="default: AWS_REGION, or the profile's")
    dry = argparse.ArgumentParser(add_help=False)
    dry.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")
    repository = argparse.ArgumentParser(add_help=False)
    repository.add_argument("--repository", default="llava-sessions", help="in ECR (default: %(default)s)")
    bucket = argparse.ArgumentParser(add_help=False)
    bucket.add_argument("--bucket", help="in S3 (default: llava-sessions-<account>-<region>, made when missing)")

    def command(name: str, run, parents: Sequence[argparse.ArgumentParser]) -> argparse.ArgumentParser:
        text = run.__doc__.strip().rstrip(".")
        made = commands.add_parser(
            name, help=text[0].lower() + text[1:], description=run.__doc__, parents=list(parents)
        )
        made.set_defaults(run=run)
        return made

    one = command("push", push, [where, dry, repository])
    one.add_argument("--image", default="llava-sessions:cuda", help="the local image (default: %(default)s)")
    one.add_argument("--tag", help="its tag in ECR (default: its id)")
    one.add_argument("--build", action="store_true", help="run `make image` first")

    one = command("upload", upload, [where, dry, bucket])
    packed = "what build_mar.sh --sagemaker made (default: model_store/llava.sagemaker)"
    one.add_argument(
        "model", nargs="?", type=Path, default=REPO / "model_store/llava.sagemaker", metavar="DIR", help=packed
    )

    one = command("up", up, [where, dry, repository, bucket])
    one.add_argument("--image", metavar="URI", help="in ECR (default: the newest in --repository)")
    one.add_argument("--model", metavar="S3_URI", help="default: what was uploaded last")
    one.add_argument("--instance-type", metavar="TYPE", help="see `llava-deploy capacity` (default: ml.g5.2xlarge)")
    one.add_argument("--instances", type=_positive, metavar="N", help="at the start, and the fewest (default: 1)")
    one.add_argument("--max-instances", type=_positive, metavar="N", help="autoscaling's most (default: --instances)")
    one.add_argument("--sessions", type=_positive, metavar="N", help="what an instance admits (default: as packed)")
    one.add_argument("--role", metavar="ARN", help="the containers' role (default: one is made)")
    one.add_argument("--subnets", metavar="ID,ID", help="of a VPC, for the containers")
    one.add_argument("--security-groups", metavar="ID,ID", help="with --subnets")
    one.add_argument("--alarm-topic", metavar="ARN", help="an SNS topic that hears of alarms")
    one.add_argument("--journal", metavar="PREFIX/", help="folder of the bucket for the sessions' journal")
    one.add_argument(
        "--ami", metavar="VERSION", help="InferenceAmiVersion (default: driver 580 where the type has an older one)"
    )
    rest = "any other parameter of deploy/sagemaker/endpoint.yaml; again for more"
    one.add_argument("--set", type=_pair, action="append", default=[], metavar="NAME=VALUE", help=rest)

    command("status", status, [where])

    one = command("invoke", invoke, [where, dry])
    one.add_argument("picture", type=Path, help="PNG, JPEG, WEBP, GIF, BMP or TIFF")
    one.add_argument("question", nargs="+", help="one after another, in one session")

    one = command("logs", logs, [where])
    one.add_argument("--since", type=_duration, default=timedelta(minutes=10), help="30s, 10m, 2h or 1d (default: 10m)")
    one.add_argument("--filter", default="", metavar="PATTERN", help="a CloudWatch filter pattern")
    one.add_argument("--follow", action="store_true", help="go on until Ctrl-C")

    one = command("down", down, [where, dry, repository, bucket])
    one.add_argument("--objects", action="store_true", help="the uploaded models and journals, too")
    one.add_argument("--images", action="store_true", help="the pushed images, too")
    one.add_argument("--yes", action="store_true", help="don't ask")

    sizes = commands.add_parser(
        "capacity", help="how many sessions fit on which instance", description=capacity.__doc__
    )
    sizes.set_defaults(run=None)
    text = "of a conversation, beside its picture (default: %(default)s)"
    sizes.add_argument("--text-tokens", type=_positive, default=1024, metavar="N", help=text)
    reserve = "GPU memory for CUDA itself and the work in progress (default: %(default)s)"
    sizes.add_argument("--reserve-gib", type=float, default=2.0, metavar="GIB", help=reserve)
    return parser.parse_args(argv)


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-zA-Z](-?[a-zA-Z0-9]){0,62}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits and inner hyphens, a letter first, at most 63")
    return text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: wanted 1 or more")
    return value


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted NAME=VALUE")
    return name, value


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted 30s, 10m, 2h or 1d")
    return timedelta(seconds=int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.command == "capacity":
        with contextlib.suppress(BrokenPipeError):  # whoever reads it has seen enough
            print(capacity.report(args.text_tokens, args.reserve_gib), flush=True)
        return 0
    try:
        region = args.region or os.environ.get("AWS_REGION")  # the AWS CLI reads it, boto3 alone does not
        account = Account(args.name, boto3.Session(profile_name=args.profile, region_name=region))
        if args.run is not invoke:  # a chat needs no account, and may be with a local endpoint
            say(f"account {account.id}, region {account.region}")
        args.run(args, account)
    except DeployError as error:
        say(f"error: {error}")
        return 1
    except (BotoCoreError, ClientError, ResponseParserError) as error:
        say(f"error: {explain(error)}")
        return 1
    except OSError as error:  # a file that can't be read
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("\ninterrupted. The same command again goes on from here")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
