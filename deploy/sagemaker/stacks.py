"""The endpoint's CloudFormation stack: made, changed, watched and deleted.

AWS does the work by itself; we ask for it and follow its events. So an interrupted run loses nothing: the next one
finds the stack at work, follows it to its end, and goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from botocore.exceptions import ClientError

from .account import MADE_BY, Account
from .problems import DeployError, code_of, message_of

TEMPLATE = Path(__file__).resolve().parent / "endpoint.yaml"
POLL_S = 5.0
DEAD = {"ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED", "DELETE_FAILED"}  # can be deleted and nothing else
FAILED = {*DEAD, "UPDATE_ROLLBACK_COMPLETE", "UPDATE_ROLLBACK_FAILED", "UPDATE_FAILED"}


@dataclass(frozen=True)
class Happening:
    """One line of a stack's history."""

    id: str
    at: datetime
    status: str
    kind: str
    name: str
    reason: str


@dataclass(frozen=True)
class State:
    """A stack as it is."""

    id: str
    status: str
    parameters: dict[str, str]
    outputs: dict[str, str]
    is_ours: bool

    @property
    def is_busy(self) -> bool:
        return self.status.endswith("_IN_PROGRESS") and self.status != "REVIEW_IN_PROGRESS"


Tell = Callable[[Happening], None]


def state(account: Account, stack: str | None = None) -> State | None:
    """The stack of the account's endpoint (or the one of that id); None where there is none."""
    try:
        found = account.client("cloudformation").describe_stacks(StackName=stack or account.name)["Stacks"][0]
    except ClientError as error:
        if code_of(error) == "ValidationError" and "does not exist" in message_of(error):
            return None
        raise
    return State(
        found["StackId"],
        found["StackStatus"],
        {item["ParameterKey"]: item["ParameterValue"] for item in found.get("Parameters", [])},
        {item["OutputKey"]: item["OutputValue"] for item in found.get("Outputs", [])},
        MADE_BY in found.get("Tags", []),
    )


@cache
def template_parameters() -> dict[str, dict[str, Any]]:
    """The template's parameters by name, as it declares them."""
    return yaml.load(TEMPLATE.read_text(encoding="utf-8"), _Loader)["Parameters"]


def check_free(account: Account, before: State | None) -> None:
    """Raises `DeployError` where the name belongs to something that we did not make."""
    if before is not None:
        if not before.is_ours:
            raise DeployError(
                f"a stack named {account.name!r} is there that llava-deploy did not make; choose another --name"
            )
        return
    try:
        account.client("sagemaker").describe_endpoint(EndpointName=account.name)
    except ClientError as error:
        if code_of(error) in ("ValidationException", "ResourceNotFound"):
            return
        raise
    raise DeployError(
        f"an endpoint named {account.name!r} is there that belongs to no stack of its name; choose another --name"
    )


def settle(account: Account, tell: Tell) -> State | None:
    """The stack at rest: what goes on is followed to its end, and one that failed to be made is deleted."""
    found = state(account)
    if found is not None and found.is_busy:
        follow(account, found, None, tell)
        found = state(account)
    if found is not None and found.is_ours and found.status in DEAD:
        delete(account, found, tell)
        found = None
    return found


def deploy(account: Account, before: State | None, parameters: Mapping[str, str], tell: Tell) -> State | None:
    """Make the stack, or change it to these parameters, and see it through; None when nothing was to be changed.

    Parameters that are not given keep the value they have, or the template's. Raises `DeployError` with
    CloudFormation's reason when it was rolled back.
    """
    client = account.client("cloudformation")
    request = {
        "StackName": account.name,
        "TemplateBody": TEMPLATE.read_text(encoding="utf-8"),
        "Capabilities": ["CAPABILITY_IAM"],
        "Tags": [MADE_BY],
        "Parameters": _parameters(before, parameters),
    }
    seen = _newest_event(account, before)
    if before is None:
        stack = client.create_stack(**request)["StackId"]
    else:
        try:
            stack = client.update_stack(**request)["StackId"]
        except ClientError as error:
            if "No updates are to be performed" in message_of(error):
                return None
            raise
    begun = state(account, stack)
    assert begun is not None
    return follow(account, begun, seen, tell)


def delete(account: Account, found: State, tell: Tell) -> None:
    """Delete the stack, and see it through."""
    seen = _newest_event(account, found)
    account.client("cloudformation").delete_stack(StackName=found.id)
    begun = state(account, found.id)
    if begun is not None:
        follow(account, begun, seen, tell)


def follow(account: Account, begun: State, seen: str | None, tell: Tell) -> State | None:
    """Tell the events of what goes on, as they come, until it has ended; the stack then. Raises `DeployError` when it
    failed."""
    reason, found = "", begun
    while True:
        for happening in _events_since(account, begun.id, seen):
            tell(happening)
            seen = happening.id
            if not reason and happening.status.endswith("_FAILED") and "cancelled" not in happening.reason:
                reason = f"{happening.name}: {happening.reason or 'no reason given'}"
        if not found.is_busy:
            break
        time.sleep(POLL_S)
        latest = state(account, begun.id)
        if latest is None:
            return None
        found = latest
    if found.status in FAILED:
        raise DeployError(f"the stack {account.name!r} ended as {found.status}: {reason or 'its events say no more'}")
    return found


def _parameters(before: State | None, given: Mapping[str, str]) -> list[dict[str, str]]:
    known = template_parameters()
    values = {name: str(known[name]["Default"]) for name in known if "Default" in known[name]}
    values |= {name: value for name, value in before.parameters.items() if name in known} if before else {}
    return [{"ParameterKey": name, "ParameterValue": value} for name, value in {**values, **given}.items()]


def _newest_event(account: Account, found: State | None) -> str | None:
    if found is None:
        return None
    events = account.client("cloudformation").describe_stack_events(StackName=found.id)["StackEvents"]
    return events[0]["EventId"] if events else None


def _events_since(account: Account, stack: str, seen: str | None) -> Iterator[Happening]:
    """Events after `seen`, or all that there are, oldest first."""
    fresh = []
    pages = account.client("cloudformation").get_paginator("describe_stack_events").paginate(StackName=stack)
    for event in (event for page in pages for event in page["StackEvents"]):
        if event["EventId"] == seen:
            break
        fresh.append(
            Happening(
                event["EventId"],
                event["Timestamp"],
                event["ResourceStatus"],
                event.get("ResourceType", ""),
                event.get("LogicalResourceId", ""),
                event.get("ResourceStatusReason", ""),
            )
        )
    return reversed(fresh)


class _Loader(yaml.SafeLoader):
    """YAML with CloudFormation's short functions (`!Ref`), whose meaning does not matter here."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
