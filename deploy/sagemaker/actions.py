"""One function for each command of `llava-deploy`. The docstrings are the help texts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from . import chats, fitting, images, models, stacks, watching
from .account import Account
from .output import format_size, say
from .parameters import template_parameters
from .problems import DeployError


def push(args: argparse.Namespace, account: Account) -> None:
    """Push a local image to ECR and print its URI."""
    tool = images.builder()
    if args.build and not args.dry_run:
        images.build()
    tag = args.tag or images.local_id(tool, args.image)
    target = f"{images.repository_uri(account, args.repository)}:{tag}"
    pushed = None if account.is_offline else images.by_digest(account, images.EcrImage.parse(target))
    if pushed:
        say(f"{target} is already in ECR")
        print(pushed)
        return
    if args.dry_run:
        say(f"would push {args.image} with {tool.name} to\n{target}\nand make the repository if it is missing")
        return
    if images.ensure_repository(account, args.repository):
        say(f"made the ECR repository {args.repository}")
    say(f"pushing {args.image} with {tool.name} ...")
    images.push(account, tool, args.image, target)
    print(images.by_digest(account, images.EcrImage.parse(target)) or target)


def upload(args: argparse.Namespace, account: Account) -> None:
    """Upload a packed model to S3 and print its address."""
    model = models.read_model(args.model)
    address = models.address_of(account, args.bucket, model)
    size = f"{len(model.files)} files, {format_size(model.size)}"
    if args.dry_run:
        say(f"would send {size}, without files that are already in S3, to\n{address}")
        return
    say(f"{size} to {address}")
    sent = models.upload(account, model, address)
    say(f"sent {format_size(sent)}" if sent else "all files were already in S3")
    print(address)


def up(args: argparse.Namespace, account: Account) -> None:
    """Make or change the endpoint, and print the command to try it."""
    before = None
    if not account.is_offline:
        before = stacks.settle(account, _report) if not args.dry_run else stacks.state(account)
        stacks.check_free(account, before)
    parameters = template_parameters(args, account, before)
    if not account.is_offline:
        _check_fits(args.force, account, parameters, before)
    if args.dry_run:
        doing = "make or change" if account.is_offline else "change" if before else "make"
        say(f"would {doing} the stack {account.name!r} with these parameters:")
        for name, value in parameters.items():
            print(f"{name}={value}")
        return
    doing = "changing" if before else "making"
    say(f"{doing} the stack {account.name!r}; after Ctrl-C, AWS continues alone ...")
    done = stacks.deploy(account, before, parameters, _report)
    if done is None:
        say("the stack is unchanged")
    options = "".join(f" --{key} {value}" for key, value in _options_of(args).items())
    print(f"The endpoint {account.name!r} is up. Try it with a picture:")
    print(f'  llava-deploy invoke{options} picture.png "What is in the picture?"')


def status(_args: argparse.Namespace, account: Account) -> None:
    """Print the state of stack, endpoint, sessions and alarms."""
    stack = stacks.state(account)
    endpoint = watching.endpoint(account)
    if stack is None and endpoint is None:
        raise DeployError(f"no stack and no endpoint named {account.name!r} in {account.region}")
    print(f"stack      {stack.status if stack else 'none'}")
    if endpoint is None:
        print("endpoint   none")
        return
    print(f"endpoint   {endpoint.status}{f': {endpoint.reason}' if endpoint.reason else ''}")
    print(f"instances  {endpoint.instances} of {endpoint.desired} {endpoint.instance_type}")
    print(f"image      {endpoint.image}")
    print(f"model      {endpoint.model}")
    sessions = watching.open_sessions(account)
    print(f"sessions   {'no metric yet' if sessions is None else f'{sessions:.1f} open per instance'}")
    print(f"alarms     {', '.join(watching.alarms(account)) or 'none'}")


def invoke(args: argparse.Namespace, account: Account) -> None:
    """Open a session on a picture, ask questions, close the session."""
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
            print(flush=True)  # before the next question, which is printed on stderr
    finally:
        chat.close()
    say("closed")


def logs(args: argparse.Namespace, account: Account) -> None:
    """Print the output of the containers."""
    for line in watching.log_lines(account, args.since, args.filter, args.follow):
        print(f"{line.at:%H:%M:%S} {line.stream} {line.text}", flush=True)


def down(args: argparse.Namespace, account: Account) -> None:
    """Ask, then delete the endpoint, and on request models and images."""
    found = None if account.is_offline else stacks.state(account)
    doomed = [f"the stack {account.name!r} with its endpoint, and every open session"] if found else []
    if found and not found.is_ours:
        raise DeployError(f"the stack {account.name!r} was not made by llava-deploy; delete it by hand")
    if account.is_offline:
        doomed.append(f"the stack {account.name!r} with its endpoint, if llava-deploy made it")
    if args.objects:
        prefix = f"s3://{args.bucket or account.bucket}/{account.name}/"
        doomed.append(f"everything under {prefix}, and the bucket if llava-deploy made it")
    if args.images:
        doomed.append(f"the ECR repository {args.repository!r} with all its images")
    if not doomed:
        say(f"no stack named {account.name!r} in {account.region}: nothing to delete")
        return
    say("this deletes:\n  - " + "\n  - ".join(doomed))
    if args.dry_run:
        return
    if not args.yes:
        _confirm(account.name)
    if found:
        stacks.delete(account, found, _report)
    if args.objects:
        say(f"deleted {models.delete_all(account, args.bucket)} objects")
    if args.images and images.delete_repository(account, args.repository):
        say(f"deleted the ECR repository {args.repository}")
    print("deleted")


def _check_fits(
    is_forced: bool, account: Account, parameters: Mapping[str, str], before: stacks.StackState | None
) -> None:
    """Raise `DeployError` if the model does not fit the instance type, except with --force. Say what is unknown."""
    merged = {**(before.parameters if before else {}), **parameters}
    address = models.ModelAddress(merged["ModelBucket"], merged["ModelKey"])
    default = stacks.template_parameters()["InstanceType"]["Default"]
    verdict = fitting.verdict(account, address, merged.get("InstanceType", default))
    if verdict.fits is False and not is_forced:
        raise DeployError(f"{verdict.reason}; choose another --instance-type, or give --force")
    if not verdict.fits:
        say(f"warning: {verdict.reason}")


def _report(event: stacks.StackEvent) -> None:
    reason = f"  {event.reason}" if event.reason else ""
    say(f"{event.at:%H:%M:%S} {event.status:<28} {event.kind} {event.name}{reason}")


def _confirm(name: str) -> None:
    if not sys.stdin.isatty():
        raise DeployError("stdin is no terminal, so nothing was deleted; give --yes to delete without a question")
    if input(f"Type {name} to go on: ").strip() != name:
        raise DeployError("the name does not match; nothing was deleted")


def _options_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the options that name the same endpoint in another command."""
    options = {"name": args.name if args.name != "llava" else None, "profile": args.profile, "region": args.region}
    return {key: value for key, value in options.items() if value}
