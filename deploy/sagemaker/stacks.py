"""The endpoint's CloudFormation stack: make, change, follow and delete it.

AWS does the work, and we follow its events. An interrupted run therefore loses nothing: the next run follows the stack
to its end and resumes from there.
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
class StackEvent:
    """One event of a stack."""

    id: str
    at: datetime
    status: str
    kind: str
    name: str
    reason: str


@dataclass(frozen=True)
class StackState:
    """The state of a stack. `is_ours` is true if llava-deploy made it."""

    id: str
    status: str
    parameters: dict[str, str]
    outputs: dict[str, str]
    is_ours: bool

    @property
    def is_busy(self) -> bool:
        """Whether CloudFormation is changing the stack."""
        return self.status.endswith("_IN_PROGRESS") and self.status != "REVIEW_IN_PROGRESS"


OnEvent = Callable[[StackEvent], None]


def state(account: Account, stack: str | None = None) -> StackState | None:
    """Return the state of the endpoint's stack, or of the stack with that ID; None if there is none."""
    try:
        found = account.client("cloudformation").describe_stacks(StackName=stack or account.name)["Stacks"][0]
    except ClientError as error:
        if code_of(error) == "ValidationError" and "does not exist" in message_of(error):
            return None
        raise
    return StackState(
        found["StackId"],
        found["StackStatus"],
        {item["ParameterKey"]: item["ParameterValue"] for item in found.get("Parameters", [])},
        {item["OutputKey"]: item["OutputValue"] for item in found.get("Outputs", [])},
        MADE_BY in found.get("Tags", []),
    )


@cache
def template_parameters() -> dict[str, dict[str, Any]]:
    """Return the parameters that the template declares, by name."""
    return yaml.load(TEMPLATE.read_text(encoding="utf-8"), _Loader)["Parameters"]


def check_free(account: Account, before: StackState | None) -> None:
    """Raise `DeployError` if the name belongs to a stack or endpoint that llava-deploy did not make."""
    if before is not None:
        if not before.is_ours:
            raise DeployError(f"llava-deploy did not make the stack {account.name!r}; choose another --name")
        return
    try:
        account.client("sagemaker").describe_endpoint(EndpointName=account.name)
    except ClientError as error:
        if code_of(error) in ("ValidationException", "ResourceNotFound"):
            return
        raise
    raise DeployError(f"the endpoint {account.name!r} belongs to no stack of its name; choose another --name")


def settle(account: Account, on_event: OnEvent) -> StackState | None:
    """Wait until the stack is not busy. Delete a stack that could not be made. Return the state then."""
    found = state(account)
    if found is not None and found.is_busy:
        follow(account, found, None, on_event)
        found = state(account)
    if found is not None and found.is_ours and found.status in DEAD:
        delete(account, found, on_event)
        found = None
    return found


def deploy(
    account: Account, before: StackState | None, parameters: Mapping[str, str], on_event: OnEvent
) -> StackState | None:
    """Make or change the stack and wait for the end. Return its state, or None if nothing changed.

    Other parameters keep their present value, or have the template's default. Raise `DeployError` with CloudFormation's
    reason after a rollback.
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
    return follow(account, begun, seen, on_event)


def delete(account: Account, found: StackState, on_event: OnEvent) -> None:
    """Delete the stack and wait for the end."""
    seen = _newest_event(account, found)
    account.client("cloudformation").delete_stack(StackName=found.id)
    begun = state(account, found.id)
    if begun is not None:
        follow(account, begun, seen, on_event)


def follow(account: Account, begun: StackState, seen: str | None, on_event: OnEvent) -> StackState | None:
    """Report events after `seen` until the stack is not busy. Return its state, or None if it was deleted.

    Raise `DeployError` if the operation failed.
    """
    reason = ""
    found = begun
    while True:
        for event in _events_since(account, begun.id, seen):
            on_event(event)
            seen = event.id
            if not reason and event.status.endswith("_FAILED") and "cancelled" not in event.reason:
                reason = f"{event.name}: {event.reason or 'no reason given'}"
        if not found.is_busy:
            break
        time.sleep(POLL_S)
        latest = state(account, begun.id)
        if latest is None:
            return None
        found = latest
    if found.status in FAILED:
        raise DeployError(f"the stack {account.name!r} ended as {found.status}: {reason or 'no event has a reason'}")
    return found


def _parameters(before: StackState | None, given: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return all parameters: given ones, those of the stack before, and the template's defaults for the rest."""
    known = template_parameters()
    values = {name: str(known[name]["Default"]) for name in known if "Default" in known[name]} | dict(given)
    kept = {name for name in known if before and name in before.parameters and name not in given}
    return [
        {"ParameterKey": name, "UsePreviousValue": True}
        if name in kept
        else {"ParameterKey": name, "ParameterValue": values[name]}
        for name in {**values, **dict.fromkeys(kept)}
    ]


def resource_names(account: Account, kind: str) -> list[str]:
    """Return the names of the stack's resources of a CloudFormation type; empty if there is no stack."""
    try:
        found = account.client("cloudformation").describe_stack_resources(StackName=account.name)["StackResources"]
    except ClientError as error:
        if code_of(error) == "ValidationError" and "does not exist" in message_of(error):
            return []
        raise
    return [item["PhysicalResourceId"] for item in found if item.get("ResourceType") == kind]


def _newest_event(account: Account, found: StackState | None) -> str | None:
    if found is None:
        return None
    events = account.client("cloudformation").describe_stack_events(StackName=found.id)["StackEvents"]
    return events[0]["EventId"] if events else None


def _events_since(account: Account, stack: str, seen: str | None) -> Iterator[StackEvent]:
    """Return the events after `seen`, or all events, oldest first."""
    fresh = []
    pages = account.client("cloudformation").get_paginator("describe_stack_events").paginate(StackName=stack)
    for event in (event for page in pages for event in page["StackEvents"]):
        if event["EventId"] == seen:
            break
        fresh.append(
            StackEvent(
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
    """YAML with CloudFormation's short functions (`!Ref`), which are read as None."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
