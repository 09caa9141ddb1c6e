"""Read the state, metrics, alarms and logs of an endpoint. Changes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from botocore.exceptions import ClientError

from . import stacks
from .account import Account
from .problems import DeployError, code_of

POLL_S = 3.0


@dataclass(frozen=True)
class EndpointState:
    """The endpoint as SageMaker describes it."""

    status: str
    reason: str
    instance_type: str
    instances: int
    desired: int
    image: str
    model: str


@dataclass(frozen=True)
class LogLine:
    """One line of a container's log; `stream` names variant and instance."""

    at: datetime
    stream: str
    text: str


def endpoint(account: Account) -> EndpointState | None:
    """Return the state of the endpoint, or None if there is none."""
    sagemaker = account.client("sagemaker")
    try:
        found = sagemaker.describe_endpoint(EndpointName=account.name)
    except ClientError as error:
        if code_of(error) in ("ValidationException", "ResourceNotFound"):
            return None
        raise
    config = sagemaker.describe_endpoint_config(EndpointConfigName=found["EndpointConfigName"])
    planned = config["ProductionVariants"][0]
    container = sagemaker.describe_model(ModelName=planned["ModelName"])["PrimaryContainer"]
    running = (found.get("ProductionVariants") or [{}])[0]
    return EndpointState(
        found["EndpointStatus"],
        found.get("FailureReason", ""),
        planned["InstanceType"],
        running.get("CurrentInstanceCount", 0),
        running.get("DesiredInstanceCount", planned["InitialInstanceCount"]),
        container["Image"],
        container.get("ModelDataSource", {}).get("S3DataSource", {}).get("S3Uri", ""),
    )


def open_sessions(account: Account) -> float | None:
    """Return the open sessions per instance in the latest minute; None without a metric in the last five minutes."""
    now = datetime.now(UTC)
    points = account.client("cloudwatch").get_metric_statistics(
        Namespace=account.metrics_namespace,
        MetricName="OpenSessions",
        StartTime=now - timedelta(minutes=5),
        EndTime=now + timedelta(minutes=1),  # the API takes whole seconds, and this second counts too
        Period=60,
        Statistics=["Average"],
    )["Datapoints"]
    return max(points, key=lambda point: point["Timestamp"])["Average"] if points else None


def alarms(account: Account) -> list[str]:
    """Return the names of the stack's active alarms."""
    names = stacks.resource_names(account, "AWS::CloudWatch::Alarm")
    if not names:
        return []
    pages = account.client("cloudwatch").get_paginator("describe_alarms")
    found = [alarm for page in pages.paginate(AlarmNames=names) for alarm in page["MetricAlarms"]]
    return [alarm["AlarmName"] for alarm in found if alarm["StateValue"] == "ALARM"]


def log_lines(account: Account, since: timedelta, pattern: str, follow: bool) -> Iterator[LogLine]:
    """Yield the log lines of the containers since that time ago; with `follow` also later ones, until Ctrl-C.

    `pattern` is a CloudWatch filter pattern, such as `"startup_error"`. An empty pattern matches every line.
    """
    start = _millis(datetime.now(UTC) - since)
    seen: set[str] = set()
    while True:
        newest = start
        for event in _events(account, start, pattern):
            newest = max(newest, event["timestamp"])
            if event["eventId"] not in seen:
                seen.add(event["eventId"])
                at = datetime.fromtimestamp(event["timestamp"] / 1000, UTC)
                yield LogLine(at, event["logStreamName"], event["message"].rstrip("\n"))
        if not follow:
            return
        start = newest  # again from the latest: more lines of the same millisecond may follow
        time.sleep(POLL_S)


def _events(account: Account, start: int, pattern: str) -> Iterator[dict[str, Any]]:
    options: dict[str, Any] = {"logGroupName": account.log_group, "startTime": start}
    options |= {"filterPattern": pattern} if pattern else {}
    try:
        for page in account.client("logs").get_paginator("filter_log_events").paginate(**options):
            yield from page["events"]
    except ClientError as error:
        if code_of(error) == "ResourceNotFoundException":
            raise DeployError(f"no log group {account.log_group}: is the endpoint up? `llava-deploy status`") from None
        raise


def _millis(at: datetime) -> int:
    return int(at.timestamp() * 1000)
