"""`llava-deploy` from the first upload to nothing left, against moto; and every failure as one line and an exit code.

What a command made is looked at with clients of our own. What moto can't answer (streams, failing stacks) is answered
here in AWS's format, and botocore validates and parses it as it would the real thing.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ConnectionClosedError
from moto.cloudformation.models import Stack

from deploy.sagemaker import command as llava_deploy
from deploy.sagemaker import stacks, watching
from tests.support.cloud import ACCOUNT, REGION, answer, contents, frame, part, refusal
from tests.support.metric_filters import filters

from .conftest import TYPE, Cloud, Run

BUCKET = f"llava-sessions-{ACCOUNT}-{REGION}"


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_up_makes_what_the_template_says(cloud: Cloud, run: Run, uploaded: str, pushed: str) -> None:
    done = run("up", "--instance-type", TYPE, "--max-instances", 3)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].strip() == 'llava-deploy invoke picture.png "What is in the picture?"'

    model = check_variant(cloud)
    container = model["PrimaryContainer"]
    assert container["Image"].startswith(f"{pushed}@sha256:"), "pinned: a later push changes nothing that runs"
    source = container["ModelDataSource"]["S3DataSource"]
    assert source == {"S3Uri": uploaded, "S3DataType": "S3Prefix", "CompressionType": "None"}
    check_rights(cloud, model["ExecutionRoleArn"].rpartition("/")[2], uploaded)
    tracking = check_scaling(cloud)
    log_group = cloud.client("logs").describe_metric_filters(logGroupName="/aws/sagemaker/Endpoints/llava")
    changes = [item["metricTransformations"][0] for item in log_group["metricFilters"]]
    metrics = {change["metricName"]: change for change in changes}
    assert metrics["OpenSessions"]["metricNamespace"] == tracking["CustomizedMetricSpecification"]["Namespace"]
    alarms = cloud.client("cloudwatch").describe_alarms()["MetricAlarms"]
    ours = {alarm["AlarmName"].split("-")[1] for alarm in alarms if alarm["AlarmName"].startswith("llava-")}
    assert {"Full", "Silent", "ServerErrors", "SlowAnswers"} <= ours
    check_dashboard(cloud, {alarm["AlarmArn"] for alarm in alarms})


def check_variant(cloud: Cloud) -> dict[str, Any]:
    """Check the endpoint's one variant. Return its model."""
    sagemaker = cloud.client("sagemaker")
    endpoint = sagemaker.describe_endpoint(EndpointName="llava")
    config = sagemaker.describe_endpoint_config(EndpointConfigName=endpoint["EndpointConfigName"])
    assert "DataCaptureConfig" not in config or not config["DataCaptureConfig"]
    (variant,) = config["ProductionVariants"]
    assert variant["InstanceType"] == TYPE
    assert int(variant["InitialInstanceCount"]) == 1
    return sagemaker.describe_model(ModelName=variant["ModelName"])


def check_rights(cloud: Cloud, role: str, uploaded: str) -> None:
    """Check that the role may do what the endpoint needs, and nothing else."""
    policy = cloud.client("iam").get_role_policy(RoleName=role, PolicyName="endpoint")["PolicyDocument"]
    policy = ast.literal_eval(policy)  # moto keeps it as Python writes it, and what is absent as None
    statements = [statement for statement in policy["Statement"] if statement]
    rights = {statement["Sid"]: statement for statement in statements}
    assert rights["ReadModel"]["Resource"] == f"arn:aws:s3:::{uploaded.removeprefix('s3://')}*"
    assert rights["PullImage"]["Resource"] == f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/llava-sessions"
    assert rights["WriteLogs"]["Resource"].endswith(":log-group:/aws/sagemaker/Endpoints/llava:*")
    actions = json.dumps(statements)
    assert '"*"' not in actions.replace('"Resource": "*"', "")
    assert {sid for sid, statement in rights.items() if statement["Resource"] == "*"} == {
        "LogInToRegistry",
        "PublishMetrics",
    }


def check_scaling(cloud: Cloud) -> dict[str, Any]:
    """Check the limits and the target of the scaling. Return the target's configuration."""
    scaling = cloud.client("application-autoscaling")
    (target,) = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert (target["MinCapacity"], target["MaxCapacity"]) == (1, 3)
    (scaler,) = scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    tracking = scaler["TargetTrackingScalingPolicyConfiguration"]
    assert tracking["TargetValue"] == 14, "70 % of the 20 that were packed"
    assert tracking["ScaleInCooldown"] == 1800
    assert tracking["CustomizedMetricSpecification"]["MetricName"] == "OpenSessions"
    return tracking


def check_dashboard(cloud: Cloud, alarms: set[str]) -> None:
    """Check that the stack's dashboard has all alarms and metrics, of this endpoint alone, in widgets side by side."""
    body = cloud.client("cloudwatch").get_dashboard(DashboardName="LLaVASessions-llava")["DashboardBody"]
    widgets = json.loads(body)["widgets"]
    assert {arn for widget in widgets for arn in widget["properties"].get("alarms", [])} == alarms
    graphs = [widget["properties"] for widget in widgets if widget["type"] == "metric"]
    assert {graph["region"] for graph in graphs} == {REGION}
    shown = {tuple(metric) for graph in graphs for metric in written_out(graph["metrics"])}
    variant = ("EndpointName", "llava", "VariantName", "all")
    calls = ("Invocations", "InvocationsPerInstance", "Invocation4XXErrors", "Invocation5XXErrors")
    use = ("CPUUtilization", "MemoryUtilization", "GPUUtilization", "GPUMemoryUtilization")
    assert shown == (
        {("AWS/SageMaker", name, *variant) for name in (*calls, "ModelLatency", "OverheadLatency")}
        | {("/aws/sagemaker/Endpoints", name, *variant) for name in use}
        | {("LLaVASessions/llava", name) for name in filters()}
    )
    (limit,) = [graph["annotations"] for graph in graphs if graph["title"] == "Open sessions of an instance"]
    assert limit["horizontal"][0]["value"] == 20, "as packed"
    cells = [
        (x, y)
        for widget in widgets
        for x in range(widget["x"], widget["x"] + widget["width"])
        for y in range(widget["y"], widget["y"] + widget["height"])
    ]
    assert len(cells) == len(set(cells)) == 24 * (1 + max(y for _, y in cells))


def written_out(metrics: list[list[Any]]) -> Iterator[list[str]]:
    """Yield namespace, name and dimensions of each metric of a graph. A dot repeats the field of the metric above."""
    above: list[str] = []
    for *fields, _options in metrics:
        above = [above[index] if field == "." else field for index, field in enumerate(fields)]
        yield above


def test_up_and_down_leave_nothing_behind(cloud: Cloud, run: Run, uploaded: str) -> None:
    assert run("up", "--instance-type", TYPE, "--max-instances", 2).code == 0
    done = run("down", "--yes", "--objects", "--images")
    assert done.code == 0, done.err
    assert contents(cloud.client) == {}
    again = run("down", "--yes", "--objects", "--images")
    assert again.code == 0, "nothing is left to delete, and that is no failure"


def test_up_again_changes_only_what_is_asked_for(cloud: Cloud, run: Run, uploaded: str) -> None:
    assert run("up", "--instance-type", TYPE, "--set", "LogRetentionDays=30").code == 0
    again = run("up")
    assert again.code == 0
    assert "the stack is unchanged" in again.err

    assert run("up", "--sessions", 40, "--max-instances", 2).code == 0
    (stack,) = cloud.client("cloudformation").describe_stacks(StackName="llava")["Stacks"]
    kept = {item["ParameterKey"]: item["ParameterValue"] for item in stack["Parameters"]}
    assert kept["InstanceType"] == TYPE
    assert kept["LogRetentionDays"] == "30"
    assert (kept["SessionsPerInstance"], kept["SessionsTarget"], kept["MaxInstanceCount"]) == ("40", "28", "2")


def test_up_in_a_vpc_with_a_role_and_a_journal(cloud: Cloud, run: Run, uploaded: str) -> None:
    trust = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole"}]}
    trust["Statement"][0]["Principal"] = {"Service": "sagemaker.amazonaws.com"}
    iam = cloud.client("iam")
    role = iam.create_role(RoleName="ours", AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
    vpc = ("--subnets", "subnet-1,subnet-2", "--security-groups", "sg-1")
    done = run("up", "--instance-type", TYPE, "--role", role, *vpc, "--journal", "llava/journal/")
    assert done.code == 0, done.err
    assert [found["RoleName"] for found in iam.list_roles()["Roles"]] == ["ours"], "no other was made"
    (model,) = cloud.client("sagemaker").list_models()["Models"]
    model = cloud.client("sagemaker").describe_model(ModelName=model["ModelName"])
    assert model["ExecutionRoleArn"] == role
    assert model["VpcConfig"] == {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]}


def test_a_tarball_is_named_as_one(cloud: Cloud, run: Run, tmp_path: Path, pushed: str) -> None:
    folder = tmp_path / "llava.sagemaker"
    folder.mkdir()
    (folder / "model.tar.gz").write_bytes(b"not looked into")
    address = run("upload", folder).out.strip()
    assert address.endswith("/model.tar.gz")
    assert run("up", "--instance-type", TYPE).code == 0
    (model,) = cloud.client("sagemaker").list_models()["Models"]
    container = cloud.client("sagemaker").describe_model(ModelName=model["ModelName"])["PrimaryContainer"]
    source = container["ModelDataSource"]["S3DataSource"]
    assert source == {"S3Uri": address, "S3DataType": "S3Object", "CompressionType": "Gzip"}


def test_a_dry_run_changes_nothing(cloud: Cloud, run: Run, packed: Path, uploaded: str) -> None:
    before = [item["Key"] for item in cloud.client("s3").list_objects_v2(Bucket=BUCKET)["Contents"]]
    changes: list[str] = []
    cloud.on("before-call", lambda model, **_: changes.append(model.name))
    (packed / "llava_handler.py").write_text("changed")
    for command in (["upload", packed], ["up"], ["down", "--objects", "--images"], ["invoke", "x.png", "What?"]):
        done = run(*command, "--dry-run")
        assert done.code == 0, done.err
        assert "would" in done.err or "this deletes" in done.err or "nothing to delete" in done.err
    asked = ("Get", "List", "Describe", "Head")
    assert [name for name in changes if not name.startswith(asked)] == []
    assert [item["Key"] for item in cloud.client("s3").list_objects_v2(Bucket=BUCKET)["Contents"]] == before


# --- upload -----------------------------------------------------------------------------------------------------------


def test_upload_sends_all_files_and_the_second_time_none(cloud: Cloud, run: Run, packed: Path) -> None:
    first = run("upload", packed)
    assert first.code == 0, first.err
    address = first.out.strip()
    prefix = address.removeprefix(f"s3://{BUCKET}/")
    s3 = cloud.client("s3")
    for path in (path for path in packed.rglob("*") if path.is_file()):
        body = s3.get_object(Bucket=BUCKET, Key=prefix + path.relative_to(packed).as_posix())["Body"].read()
        assert body == path.read_bytes()
    closed = s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"]
    assert all(closed.values())

    sent = cloud.count("before-send.s3.PutObject")
    parts = cloud.count("before-send.s3.UploadPart")
    again = run("upload", packed)
    assert again.out == first.out
    assert "all files were already in S3" in again.err
    assert len(parts) == 0
    assert len(sent) == 1, "but for the note which model is the current one"

    (packed / "llava_handler.py").write_text("another version")
    other = run("upload", packed)
    assert other.out != first.out, "an endpoint may still read the first one"


def test_an_interrupted_upload_goes_on_in_the_middle_of_a_file(cloud: Cloud, run: Run, packed: Path) -> None:
    one_at_a_time = threading.Lock()
    seen: list[str] = []
    arrived = threading.Semaphore(0)

    def interrupt_the_third(request: Any, **_: Any) -> None:
        with one_at_a_time:
            seen.append(request.url)
            if len(seen) == 3:
                assert all(arrived.acquire(timeout=60) for _ in range(2))
                os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C
                raise ConnectionResetError("the third part does not arrive")

    cloud.on("before-send.s3.UploadPart", interrupt_the_third)
    cloud.on("response-received.s3.UploadPart", lambda **_: arrived.release())
    first = run("upload", packed)
    assert first.code == 130
    assert "again to resume" in first.err
    assert "Traceback" not in first.err
    keys = [item["Key"] for item in cloud.client("s3").list_objects_v2(Bucket=BUCKET).get("Contents", [])]
    assert not [key for key in keys if key.endswith(("MANIFEST.json", "current.json"))], "it does not look complete"

    cloud.hooks.clear()
    parts = cloud.count("before-send.s3.UploadPart")
    second = run("upload", packed)
    assert second.code == 0, second.err
    assert len(parts) == 1, "the two that arrived are not sent again"
    key = second.out.strip().removeprefix(f"s3://{BUCKET}/") + "checkpoint/model.safetensors"
    body = cloud.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read()
    assert body == (packed / "checkpoint/model.safetensors").read_bytes()
    assert not cloud.client("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_an_upload_that_loses_its_line_says_so(cloud: Cloud, run: Run, packed: Path) -> None:
    def cut(request: Any, **_: Any) -> None:
        raise ConnectionClosedError(endpoint_url=request.url)

    cloud.on("before-send.s3.UploadPart", cut)
    done = run("upload", packed)
    assert done.code == 1
    assert "again to resume" in done.error


def test_only_packed_models_are_uploaded(cloud: Cloud, run: Run, tmp_path: Path) -> None:
    done = run("upload", tmp_path)
    assert done.code == 1
    assert "build_mar.sh --sagemaker" in done.error
    assert cloud.client("s3").list_buckets()["Buckets"] == []


# --- failures ---------------------------------------------------------------------------------------------------------


def test_no_credentials(cloud: Cloud, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for command in (["status"], ["up"], ["logs"], ["down", "--yes"]):
        done = run(*command)
        assert done.code == 1
        assert "no AWS credentials" in done.error


def test_an_unknown_profile_and_no_region(cloud: Cloud, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("status", "--profile", "nobody")
    assert (done.code, "nobody" in done.error) == (1, True)
    monkeypatch.delenv("AWS_REGION")
    done = run("status")
    assert (done.code, "no AWS region" in done.error) == (1, True)


def test_an_expired_token(cloud: Cloud, run: Run) -> None:
    cloud.on("before-send.sts.GetCallerIdentity", refusal("ExpiredToken", "The security token is expired", 403))
    done = run("status")
    assert (done.code, "have expired" in done.error) == (1, True)


def test_a_missing_role(cloud: Cloud, run: Run, uploaded: str) -> None:
    done = run("up", "--role", f"arn:aws:iam::{ACCOUNT}:role/nobody")
    assert (done.code, "there is no role 'nobody'" in done.error) == (1, True)
    assert cloud.client("cloudformation").describe_stacks()["Stacks"] == []


def test_a_role_that_sagemaker_may_not_assume(cloud: Cloud, run: Run, uploaded: str) -> None:
    trust = {
        "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"Service": "ec2.amazonaws.com"}}]
    }
    arn = cloud.client("iam").create_role(RoleName="other", AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
    done = run("up", "--role", arn)
    assert (done.code, "trust policy" in done.error) == (1, True)


def test_throttled(cloud: Cloud, run: Run, uploaded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    tries = cloud.count("before-send.cloudformation.CreateStack")
    cloud.on("before-send.cloudformation.CreateStack", refusal("Throttling", "Rate exceeded"))
    done = run("up", "--instance-type", TYPE)
    assert (done.code, "AWS throttles CreateStack" in done.error) == (1, True)
    assert len(tries) == 2, "boto3 tried again first"
    assert cloud.client("cloudformation").describe_stacks()["Stacks"] == []


def test_a_denied_call_names_the_action(cloud: Cloud, run: Run, uploaded: str) -> None:
    message = "User: arn:aws:iam::1:user/x is not authorized to perform: cloudformation:CreateStack"
    cloud.on("before-send.cloudformation.CreateStack", refusal("AccessDenied", message, 403))
    done = run("up", "--instance-type", TYPE)
    assert (done.code, "cloudformation:CreateStack" in done.error) == (1, True)


def test_an_endpoint_of_that_name_that_is_not_ours(cloud: Cloud, run: Run, uploaded: str) -> None:
    sagemaker = cloud.client("sagemaker")
    role = f"arn:aws:iam::{ACCOUNT}:role/x"
    sagemaker.create_model(ModelName="m", ExecutionRoleArn=role, PrimaryContainer={"Image": "i"})
    variant = {"VariantName": "v", "ModelName": "m", "InstanceType": TYPE, "InitialInstanceCount": 1}
    sagemaker.create_endpoint_config(EndpointConfigName="c", ProductionVariants=[variant])
    sagemaker.create_endpoint(EndpointName="llava", EndpointConfigName="c")
    done = run("up", "--instance-type", TYPE)
    assert (done.code, "choose another --name" in done.error) == (1, True)


def test_a_stack_of_that_name_that_is_not_ours(cloud: Cloud, run: Run, uploaded: str) -> None:
    template = {"Resources": {"T": {"Type": "AWS::SNS::Topic"}}}
    cloud.client("cloudformation").create_stack(StackName="llava", TemplateBody=json.dumps(template))
    done = run("up", "--instance-type", TYPE)
    assert (done.code, "choose another --name" in done.error) == (1, True)
    done = run("down", "--yes")
    assert (done.code, "not made by llava-deploy" in done.error) == (1, True)
    assert len(cloud.client("cloudformation").describe_stacks()["Stacks"]) == 1


def test_a_rollback_gives_its_reason_and_the_next_up_begins_anew(
    cloud: Cloud, run: Run, uploaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "The primary container did not pass the ping health check."

    def roll_back(stack: Stack) -> None:
        for status, why in (("CREATE_FAILED", reason), ("ROLLBACK_IN_PROGRESS", ""), ("ROLLBACK_COMPLETE", "")):
            stack._add_stack_event(status, resource_status_reason=why)
        stack.status = "ROLLBACK_COMPLETE"

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "create_resources", roll_back)
        done = run("up", "--instance-type", TYPE)
    assert done.code == 1
    assert "ROLLBACK_COMPLETE" in done.error
    assert reason in done.error

    done = run("up", "--instance-type", TYPE)
    assert done.code == 0, done.err
    assert (
        cloud.client("cloudformation").describe_stacks(StackName="llava")["Stacks"][0]["StackStatus"]
        == "CREATE_COMPLETE"
    )


def test_ctrl_c_leaves_the_stack_to_itself_and_up_again_follows_it(
    cloud: Cloud, run: Run, uploaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Stack] = []

    def create_slowly(stack: Stack) -> None:
        stack.status = "CREATE_IN_PROGRESS"
        made.append(stack)

    finish = Stack.create_resources
    monkeypatch.setattr(Stack, "create_resources", create_slowly)
    # Only the module's own pauses: other threads of this process sleep too.
    monkeypatch.setattr(stacks, "time", SimpleNamespace(sleep=lambda _: os.kill(os.getpid(), signal.SIGINT)))
    first = run("up", "--instance-type", TYPE)
    assert first.code == 130

    monkeypatch.setattr(stacks, "time", SimpleNamespace(sleep=lambda _: finish(made[0])))
    second = run("up", "--instance-type", TYPE)
    assert second.code == 0, second.err
    assert "the stack is unchanged" in second.err
    assert len(made) == 1


def test_up_without_an_image_or_a_model_says_what_comes_first(cloud: Cloud, run: Run, packed: Path) -> None:
    assert "run `llava-deploy upload` first" in run("up").error
    run("upload", packed)
    assert "run `llava-deploy push` first" in run("up").error
    image = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/llava-sessions:none"
    assert "run `llava-deploy push` first" in run("up", "--image", image).error
    assert "must be an image in ECR" in run("up", "--image", "docker.io/library/python").error
    assert "no MAR-INF/MANIFEST.json under" in run("up", "--model", f"s3://{BUCKET}/elsewhere").error
    assert "`--model` must be s3://" in run("up", "--model", "/tmp/model").error


def test_a_bucket_that_is_not_there_is_made_only_when_it_is_ours(cloud: Cloud, run: Run, packed: Path) -> None:
    done = run("upload", packed, "--bucket", "someones")
    assert (done.code, "there is no bucket 'someones'" in done.error) == (1, True)


def test_down_asks_first(cloud: Cloud, run: Run, uploaded: str) -> None:
    assert run("up", "--instance-type", TYPE).code == 0
    done = run("down")
    assert (done.code, "--yes" in done.error) == (1, True)
    assert "the stack 'llava' with its endpoint" in done.err
    assert cloud.client("sagemaker").list_endpoints()["Endpoints"]


def test_down_leaves_what_it_did_not_make(cloud: Cloud, run: Run, packed: Path) -> None:
    cloud.client("s3").create_bucket(Bucket="ours", CreateBucketConfiguration={"LocationConstraint": REGION})
    cloud.client("s3").put_object(Bucket="ours", Key="precious", Body=b"x")
    cloud.client("ecr").create_repository(repositoryName="llava-sessions")
    assert run("upload", packed, "--bucket", "ours").code == 0
    assert run("down", "--yes", "--objects", "--bucket", "ours").code == 0
    assert [item["Key"] for item in cloud.client("s3").list_objects_v2(Bucket="ours")["Contents"]] == ["precious"]
    done = run("down", "--yes", "--images")
    assert (done.code, "not made by llava-deploy" in done.error) == (1, True)
    assert cloud.client("ecr").describe_repositories()["repositories"]


# --- watching ---------------------------------------------------------------------------------------------------------


def test_status_tells_what_runs(cloud: Cloud, run: Run, uploaded: str) -> None:
    done = run("status")
    assert (done.code, "no stack and no endpoint named 'llava'" in done.error) == (1, True)
    run("up", "--instance-type", TYPE)
    done = run("status")
    assert done.code == 0
    for words in ("CREATE_COMPLETE", "InService", f"1 of 1 {TYPE}", uploaded, "no metric yet", "alarms     "):
        assert words in done.out
    metric = {"MetricName": "OpenSessions", "Unit": "Count"}
    told = [{**metric, "Value": 3}, {**metric, "Value": 4}]
    cloud.client("cloudwatch").put_metric_data(Namespace="LLaVASessions/llava", MetricData=told)
    assert "3.5 open per instance" in run("status").out


def test_logs_come_with_their_instance(cloud: Cloud, run: Run, uploaded: str) -> None:
    assert "is the endpoint up?" in run("logs").error
    run("up", "--instance-type", TYPE)
    logs = cloud.client("logs")
    group, stream = "/aws/sagemaker/Endpoints/llava", "all/i-0123"
    logs.create_log_stream(logGroupName=group, logStreamName=stream)
    now = int(time.time() * 1000)
    events = [{"timestamp": now - 5000, "message": "ready device=cuda"}, {"timestamp": now, "message": "turn_done"}]
    logs.put_log_events(logGroupName=group, logStreamName=stream, logEvents=events)
    done = run("logs")
    assert done.code == 0
    assert [line.split(" ", 1)[1] for line in done.out.splitlines()] == [
        "all/i-0123 ready device=cuda",
        "all/i-0123 turn_done",
    ]
    assert "turn_done" not in run("logs", "--filter", "ready").out
    assert run("logs", "--since", "1s", "--filter", "ready").out == ""


def test_logs_follow_until_ctrl_c(cloud: Cloud, run: Run, uploaded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run("up", "--instance-type", TYPE)
    logs, group = cloud.client("logs"), "/aws/sagemaker/Endpoints/llava"
    logs.create_log_stream(logGroupName=group, logStreamName="all/i-0123")
    lines = iter(["first", "second"])

    def next_line(_: float) -> None:
        line = next(lines, None)
        if line is None:
            os.kill(os.getpid(), signal.SIGINT)
            return
        event = {"timestamp": int(time.time() * 1000), "message": line}
        logs.put_log_events(logGroupName=group, logStreamName="all/i-0123", logEvents=[event])

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=next_line))
    done = run("logs", "--follow")
    assert done.code == 130
    assert [line.rpartition(" ")[2] for line in done.out.splitlines()] == ["first", "second"], "each once"


# --- a chat -----------------------------------------------------------------------------------------------------------

OPENED = {
    "X-Amzn-SageMaker-New-Session-Id": "abc-123; Expires=2030-01-01T00:00:00Z",
    "Content-Type": "application/json",
}
STREAM = {"Content-Type": "application/vnd.amazon.eventstream"}


def chat(cloud: Cloud, stream: bytes) -> list[Any]:
    """SageMaker Runtime as the wire contract has it: an open, a streamed answer, a close. The requests that came."""
    calls: list[Any] = []

    def plain(request: Any, **_: Any) -> Any:
        calls.append(request)
        return answer(b"{}", OPENED if request.headers["X-Amzn-SageMaker-Session-Id"] == b"NEW_SESSION" else {})(
            request
        )

    def streamed(request: Any, **_: Any) -> Any:
        calls.append(request)
        return answer(stream, STREAM)(request)

    cloud.on("before-send.sagemaker-runtime.InvokeEndpoint", plain)
    cloud.on("before-send.sagemaker-runtime.InvokeEndpointWithResponseStream", streamed)
    return calls


def test_invoke_opens_asks_and_closes(cloud: Cloud, run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    # SageMaker cuts and joins the container's lines as it likes.
    calls = chat(
        cloud,
        part(b'{"delta": "A r')
        + part(b'ed"}\n{"delta": " square."}\n{"delta": "", "finish')
        + part(b'_reason": "stop"}\n'),
    )
    done = run("invoke", picture, "What is it?", "And where?")
    assert done.code == 0, done.err
    assert done.out == "A red square.\nA red square.\n"
    sent = [(call.headers["X-Amzn-SageMaker-Session-Id"], json.loads(call.body)["type"]) for call in calls]
    assert sent == [
        (b"NEW_SESSION", "start_session"),
        (b"abc-123", "send_text_prompt"),
        (b"abc-123", "send_text_prompt"),
        (b"abc-123", "close_session"),
    ]
    assert [call.url.rpartition("/")[2] for call in calls] == [
        "invocations",
        "invocations-response-stream",
        "invocations-response-stream",
        "invocations",
    ]


@pytest.mark.parametrize(
    "stream",
    [
        part(b'{"delta": "A"}\n{"error": {"code": "engine_restarting", "message": "ask again"}}\n'),
        part(b'{"delta": "A"}\n')
        + frame(b'{"Message": "ask again"}', message_type="exception", exception_type="ModelStreamError"),
    ],
)
def test_an_answer_that_breaks_off_still_closes_the_session(
    cloud: Cloud, run: Run, tmp_path: Path, stream: bytes
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    calls = chat(cloud, stream)
    done = run("invoke", picture, "What?")
    assert (done.code, "broke off" in done.error, "ask again" in done.error) == (1, True, True)
    assert json.loads(calls[-1].body)["type"] == "close_session"


def test_a_refusal_of_the_container_comes_in_its_own_words(cloud: Cloud, run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    said = json.dumps({"error": {"code": "capacity", "message": "all sessions are taken"}})
    body = json.dumps({"Message": "Received client error (429)", "OriginalStatusCode": 429, "OriginalMessage": said})
    headers = {"x-amzn-ErrorType": "ModelError", "Content-Type": "application/json"}
    tries = cloud.count("before-send.sagemaker-runtime.InvokeEndpoint")
    cloud.on("before-send.sagemaker-runtime.InvokeEndpoint", answer(body.encode(), headers, 424))
    done = run("invoke", picture, "What?")
    assert (done.code, "429" in done.error, "all sessions are taken" in done.error) == (1, True, True)
    assert len(tries) == 1, "an open is not tried twice: the first might have made a session"


def test_an_endpoint_that_is_not_there(cloud: Cloud, run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    headers = {"x-amzn-ErrorType": "ValidationError", "Content-Type": "application/json"}
    body = json.dumps({"Message": "Endpoint llava of account 1 not found."}).encode()
    cloud.on("before-send.sagemaker-runtime.InvokeEndpoint", answer(body, headers, 400))
    done = run("invoke", picture, "What?")
    assert (done.code, "is 'llava' up?" in done.error) == (1, True)
    assert "can't be read" in run("invoke", tmp_path / "none.png", "What?").error


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["push", "upload", "up", "status", "invoke", "logs", "down", "capacity", "doctor"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        llava_deploy.main([command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "usage: llava-deploy" in said
    if command in ("push", "upload", "up", "invoke", "down"):
        assert "--dry-run" in said
    for secret in ("password", "secret", "token", "key-id"):
        assert f"--{secret}" not in said


@pytest.mark.parametrize("argv", [["up", "--set", "x"], ["up", "--instances", "0"], ["status", "--name", "a_b"], []])
def test_nonsense_is_refused_before_anything_is_done(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        llava_deploy.main(argv)
    assert stopped.value.code == 2
