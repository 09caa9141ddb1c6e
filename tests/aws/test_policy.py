"""The policy in docs/sagemaker.md allows what CloudFormation and the command do, under the names that AWS gives."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from tests.support.cloud import ACCOUNT, REGION
from tests.support.metric_filters import template

from .conftest import TYPE, Cloud, Run

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sagemaker.md").read_text(encoding="utf-8")
STACK = "llava"
RANDOM = "AbCd1234EfGh"  # CloudFormation's end of a name
LOG_GROUP = f"logs:{REGION}:{ACCOUNT}:log-group:/aws/sagemaker/Endpoints/{STACK}"
# For each type of resource: the actions of its handler in CloudFormation, and the resource that they need. The name
# from CloudFormation is <stack>-<logical ID>-<random>, but <logical ID>-<random> for SageMaker's resources.
HANDLERS: dict[str, tuple[str, str]] = {
    "AWS::IAM::Role": (
        (
            "iam: CreateRole DeleteRole GetRole UpdateRole UpdateRoleDescription UpdateAssumeRolePolicy PutRolePolicy "
            "GetRolePolicy DeleteRolePolicy ListRolePolicies ListAttachedRolePolicies TagRole UntagRole PassRole"
        ),
        f"iam::{ACCOUNT}:role/{STACK}-{{id}}-{RANDOM}",
    ),
    "AWS::SageMaker::Model": (
        "sagemaker: CreateModel DescribeModel DeleteModel AddTags ListTags DeleteTags",
        f"sagemaker:{REGION}:{ACCOUNT}:model/{{id}}-{RANDOM}",
    ),
    "AWS::SageMaker::EndpointConfig": (
        (
            "sagemaker: CreateEndpointConfig DescribeEndpointConfig DeleteEndpointConfig AddTags ListTags DeleteTags "
            "CreateEndpoint UpdateEndpoint"
        ),
        f"sagemaker:{REGION}:{ACCOUNT}:endpoint-config/{{id}}-{RANDOM}",
    ),
    "AWS::SageMaker::Endpoint": (
        (
            "sagemaker: CreateEndpoint DescribeEndpoint UpdateEndpoint DeleteEndpoint AddTags ListTags DeleteTags "
            "UpdateEndpointWeightsAndCapacities"
        ),
        f"sagemaker:{REGION}:{ACCOUNT}:endpoint/{STACK}",
    ),
    "AWS::Logs::LogGroup": (
        (
            "logs: CreateLogGroup DescribeLogGroups DeleteLogGroup PutRetentionPolicy DeleteRetentionPolicy "
            "TagResource UntagResource ListTagsForResource"
        ),
        LOG_GROUP,
    ),
    "AWS::Logs::MetricFilter": ("logs: PutMetricFilter DescribeMetricFilters DeleteMetricFilter", LOG_GROUP),
    "AWS::ApplicationAutoScaling::ScalableTarget": (
        "application-autoscaling: RegisterScalableTarget DescribeScalableTargets DeregisterScalableTarget",
        f"application-autoscaling:{REGION}:{ACCOUNT}:scalable-target/1234",
    ),
    "AWS::ApplicationAutoScaling::ScalingPolicy": (
        "application-autoscaling: PutScalingPolicy DescribeScalingPolicies DeleteScalingPolicy",
        f"application-autoscaling:{REGION}:{ACCOUNT}:scalable-target/1234",
    ),
    "AWS::CloudWatch::Alarm": (
        "cloudwatch: PutMetricAlarm DescribeAlarms DeleteAlarms TagResource UntagResource ListTagsForResource",
        f"cloudwatch:{REGION}:{ACCOUNT}:alarm:{STACK}-{{id}}-{RANDOM}",
    ),
    "AWS::CloudWatch::Dashboard": (
        "cloudwatch: PutDashboard GetDashboard DeleteDashboards ListDashboards",
        f"cloudwatch::{ACCOUNT}:dashboard/LLaVASessions-{STACK}",
    ),
}
# Operations of S3 whose action has another name.
S3_ACTIONS = {
    "HeadBucket": "ListBucket",
    "HeadObject": "GetObject",
    "ListObjectsV2": "ListBucket",
    "ListMultipartUploads": "ListBucketMultipartUploads",
    "ListParts": "ListMultipartUploadParts",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
    "DeleteObjects": "DeleteObject",
    "PutPublicAccessBlock": "PutBucketPublicAccessBlock",
}


def statements() -> list[dict[str, Any]]:
    """Return the statements of the policy for a user of `llava-deploy`."""
    text = PAGE.partition("A user of `llava-deploy` needs this policy")[2]
    return json.loads(re.search(r"^```json\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1])["Statement"]


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def allows(action: str, arn: str | None = None) -> bool:
    """Return whether a statement allows the action, on the resource if it is given."""
    return any(
        any(fnmatchcase(action, pattern) for pattern in listed(statement["Action"]))
        and (arn is None or any(fnmatchcase(arn, pattern) for pattern in listed(statement["Resource"])))
        for statement in statements()
    )


@pytest.mark.parametrize("logical_id", template()["Resources"])
def test_the_policy_covers_a_resource_under_the_name_that_cloudformation_gives(logical_id: str) -> None:
    service_and_actions, resource = HANDLERS[template()["Resources"][logical_id]["Type"]]
    service, actions = service_and_actions.split(": ")
    arn = f"arn:aws:{resource.format(id=logical_id)}"
    assert [action for action in actions.split() if not allows(f"{service}:{action}", arn)] == []
    if service == "sagemaker":  # ARNs of earlier years are in lower case
        lower = arn.replace(f"{logical_id}-{RANDOM}", f"{logical_id}-{RANDOM}".lower())
        assert [action for action in actions.split() if not allows(f"{service}:{action}", lower)] == []


def test_the_policy_covers_no_other_model_or_role() -> None:
    for resource in (f"sagemaker:{REGION}:{ACCOUNT}:model/theirs", f"iam::{ACCOUNT}:role/theirs"):
        for action in ("sagemaker:DeleteModel", "iam:PassRole"):
            assert not allows(action, f"arn:aws:{resource}")


def test_the_policy_allows_each_call_of_the_command(cloud: Cloud, run: Run, packed: Path, pushed: str) -> None:
    made: set[str] = set()
    cloud.on("before-call", lambda model, **_: made.add(f"{model.service_model.signing_name}:{model.name}"))
    for command in (["upload", packed], ["up", "--instance-type", TYPE], ["status"], ["logs"], ["down", "--yes"]):
        more = ["--objects", "--images"] if command[0] == "down" else []
        assert run(*command, *more).code == 0
    names = {"monitoring": "cloudwatch"}  # signing name -> prefix of actions
    actions = set()
    for call in made:
        service, operation = call.split(":")
        operation = S3_ACTIONS.get(operation, operation) if service == "s3" else operation
        actions.add(f"{names.get(service, service)}:{operation}")
    assert len(actions) > 20
    assert sorted(action for action in actions if not allows(action)) == []
