"""What `up` keeps, refuses and shows: earlier choices, models that do not fit, dry runs without credentials, alarms."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from deploy.sagemaker import capacity, fitting

from .conftest import TYPE, Cloud, Run

REPO = Path(__file__).resolve().parents[2]
SMALL_GPU = "ml.g4dn.2xlarge"
LLAVA_7B = {"model_type": "llava", "text_config": {"model_type": "llama"}, "torch_dtype": "float16"}
TEXT_13B = {"model_type": "llama", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}
DEMO = {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}}


def parameters(cloud: Cloud) -> dict[str, str]:
    """Return the parameters of the stack."""
    (stack,) = cloud.client("cloudformation").describe_stacks(StackName="llava")["Stacks"]
    return {item["ParameterKey"]: item["ParameterValue"] for item in stack["Parameters"]}


def routing(cloud: Cloud) -> dict[str, Any]:
    """Return the routing of the endpoint's variant, without what the template leaves out."""
    sagemaker = cloud.client("sagemaker")
    (config,) = sagemaker.list_endpoint_configs()["EndpointConfigs"]
    name = config["EndpointConfigName"]
    (variant,) = sagemaker.describe_endpoint_config(EndpointConfigName=name)["ProductionVariants"]
    return {key: value for key, value in variant["RoutingConfig"].items() if value}


def sent(cloud: Cloud) -> list[dict[str, Any]]:
    """Return the list to which each UpdateStack's body is appended."""
    seen: list[dict[str, Any]] = []
    cloud.on("before-call.cloudformation.UpdateStack", lambda params, **_: seen.append(params["body"]))
    return seen


# --- earlier choices --------------------------------------------------------------------------------------------------


def test_up_keeps_what_an_earlier_set_chose(cloud: Cloud, run: Run, uploaded: str, packed: Path) -> None:
    chosen = {
        "SessionsPerInstance": "30",
        "SessionsTarget": "9",
        "InferenceAmiVersion": "al2-ami-sagemaker-inference-gpu-3-1",
        "RoutingStrategy": "RANDOM",
        "MaxInstanceCount": "4",
    }
    options = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    assert run("up", "--instance-type", TYPE, *options).code == 0
    for again in (["--set", "LogRetentionDays=30"], ["--instance-type", "ml.g6.4xlarge", "--instances", 2]):
        assert run("up", *again).code == 0
        kept = parameters(cloud)
        assert {name: kept[name] for name in chosen} == chosen, again


def test_up_sends_what_it_keeps_as_the_previous_value(cloud: Cloud, run: Run, uploaded: str) -> None:
    assert run("up", "--instance-type", TYPE).code == 0
    bodies = sent(cloud)
    assert "PrefixAwareRoutingConfig" not in routing(cloud)
    assert run("up", "--set", "RoutingStrategy=PREFIX_AWARE", "--set", "PrefixLength=2048").code == 0
    prefix = routing(cloud)["PrefixAwareRoutingConfig"]
    assert {name: int(value) for name, value in prefix.items()} == {"PrefixLength": 2048, "ConcurrencyThreshold": 16}
    (body,) = bodies
    fields = {
        body[f"Parameters.member.{number}.ParameterKey"]: number for number in range(1, len(parameters(cloud)) + 1)
    }
    for name in ("InstanceType", "LogRetentionDays", "SessionsTarget"):
        start = f"Parameters.member.{fields[name]}"
        assert (body.get(f"{start}.UsePreviousValue"), f"{start}.ParameterValue" in body) == ("true", False)
    assert body[f"Parameters.member.{fields['RoutingStrategy']}.ParameterValue"] == "PREFIX_AWARE"


def test_what_follows_from_a_change_still_follows(cloud: Cloud, run: Run, uploaded: str) -> None:
    assert run("up", "--instance-type", TYPE).code == 0
    assert parameters(cloud)["SessionsTarget"] == "14"
    assert "SessionsTarget=28" in run("up", "--sessions", 40, "--dry-run").out.splitlines()
    planned = run("up", "--instance-type", "ml.m5.2xlarge", "--dry-run").out.splitlines()
    assert "InferenceAmiVersion=" in planned, "no driver for a type without a GPU"


# --- models that do not fit -------------------------------------------------------------------------------------------


def upload_with(run: Run, packed: Path, config: dict[str, Any]) -> None:
    (packed / "checkpoint/config.json").write_text(json.dumps(config))
    assert run("upload", packed).code == 0


def test_up_refuses_a_model_that_does_not_fit(cloud: Cloud, run: Run, packed: Path, pushed: str) -> None:
    upload_with(run, packed, LLAVA_7B)
    for dry in ([], ["--dry-run"]):
        done = run("up", "--instance-type", SMALL_GPU, *dry)
        assert done.code == 1
        assert f"LLaVA-1.5-7B does not fit {SMALL_GPU}" in done.error
        assert "--force" in done.error
    assert cloud.client("cloudformation").describe_stacks()["Stacks"] == []

    assert run("up", "--instance-type", TYPE).code == 0
    done = run("up", "--instance-type", SMALL_GPU)
    assert (done.code, "does not fit" in done.error) == (1, True)
    done = run("up", "--instance-type", SMALL_GPU, "--force")
    assert (done.code, "warning: LLaVA-1.5-7B does not fit" in done.err) == (0, True)
    assert parameters(cloud)["InstanceType"] == SMALL_GPU
    done = run("up", "--sessions", 3)
    assert (done.code, "does not fit" in done.error) == (1, True), "the present instance type counts too"


def test_up_names_what_serves_a_model_that_does_not_fit(cloud: Cloud, run: Run, packed: Path, pushed: str) -> None:
    config = {"model_type": "llava", "text_config": TEXT_13B}
    upload_with(run, packed, config)
    done = run("up", "--instance-type", "ml.g5.xlarge")
    assert done.code == 1
    assert "pack it with `weights: int8` and `kv_dtype: int8`, with which it fits" in done.error
    assert "the smallest type that it fits is ml.g7.2xlarge" in done.error
    (packed / "model-config.yaml").write_text("llava:\n  max_sessions: 5\n  weights: int8\n")
    upload_with(run, packed, config)
    assert run("up", "--instance-type", "ml.g5.xlarge", "--dry-run").code == 0
    done = run("up", "--instance-type", "ml.g4dn.xlarge", "--dry-run")
    assert (done.code, "LLaVA-1.5-13B does not fit ml.g4dn.xlarge" in done.error) == (1, True)
    assert "the smallest type that it fits is ml.g5.xlarge" in done.error


def test_a_model_that_the_table_does_not_have_is_judged_by_its_weights(
    cloud: Cloud, run: Run, packed: Path, pushed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_with(run, packed, DEMO)
    assert "warning" not in run("up", "--instance-type", SMALL_GPU, "--dry-run").err
    few = capacity.InstanceType("ml.few.xlarge", "Few", 2048 + 5, 16)
    monkeypatch.setattr(capacity, "INSTANCES", (few,))
    done = run("up", "--instance-type", "ml.few.xlarge")
    assert (done.code, "weights of 10.0 MiB do not fit ml.few.xlarge" in done.error) == (1, True)
    done = run("up", "--instance-type", "ml.m5.2xlarge", "--dry-run")
    assert (done.code, "`capacity` does not list ml.m5.2xlarge" in done.err) == (0, True)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAVA_7B, "LLaVA-1.5-7B"),
        ({"model_type": "llava", "text_config": TEXT_13B}, "LLaVA-1.5-13B"),
        ({"model_type": "llava_next", "text_config": {"model_type": "llama"}}, "LLaVA-NeXT-7B (Vicuna)"),
        ({"model_type": "llava_next", "text_config": {"model_type": "mistral"}}, "LLaVA-NeXT-7B (Mistral)"),
        (DEMO, None),
        ({"model_type": "other"}, None),
    ],
)
def test_a_config_is_found_in_the_table(config: dict[str, Any], name: str | None) -> None:
    shape = fitting.known_shape(config)
    assert (shape and shape.name) == name


@pytest.mark.parametrize("page", ["docs/notebook.ipynb", "docs/sagemaker.md"])
def test_the_pairs_of_the_pages_fit(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    assert "llava-hf/llava-1.5-7b-hf" in text
    types = re.findall(r"(?:instance_type = |--instance-type )\W*(ml\.\w+\.\w+)", text)
    assert types
    shape = fitting.known_shape(LLAVA_7B)
    for instance in (item for item in capacity.INSTANCES if item.name in types):
        reserve = int(fitting.RESERVE_GIB * capacity.GIB)
        assert capacity.fit(shape, instance, fitting.TEXT_TOKENS, reserve).on_gpu > 0
    assert set(types) <= {item.name for item in capacity.INSTANCES}


# --- dry runs without credentials -------------------------------------------------------------------------------------


def test_a_dry_run_needs_no_credentials(cloud: Cloud, run: Run, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    calls: list[str] = []
    cloud.on("before-call", lambda model, **_: calls.append(model.name))
    done = run("upload", packed, "--dry-run")
    assert (done.code, "s3://llava-sessions-<account>-<region>/llava/models/" in done.err) == (0, True)
    done = run("up", "--dry-run", "--instance-type", TYPE, "--set", "RoutingStrategy=RANDOM", "--region", "eu-west-1")
    assert done.code == 0, done.err
    assert f"InstanceType={TYPE}" in done.out.splitlines()
    assert "RoutingStrategy=RANDOM" in done.out.splitlines()
    assert "<account>.dkr.ecr.eu-west-1.amazonaws.com/llava-sessions>" in done.out
    done = run("down", "--dry-run", "--objects", "--images")
    assert done.code == 0, done.err
    assert "the stack 'llava' with its endpoint, if llava-deploy made it" in done.err
    monkeypatch.setattr("deploy.sagemaker.images.builder", lambda: Built)
    done = run("push", "--dry-run")
    assert (done.code, "<account>.dkr.ecr.<region>.amazonaws.com/llava-sessions:0123456789ab" in done.err) == (0, True)
    assert calls == []
    done = run("upload", packed)
    assert (done.code, "no AWS credentials" in done.error or "no AWS region" in done.error) == (1, True)


class Built:
    """A builder with one image: docker and buildah are not on every machine."""

    name = "docker"

    @staticmethod
    def image_id(image: str) -> str:
        return "sha256:0123456789abcdef"


# --- status -----------------------------------------------------------------------------------------------------------


def test_status_shows_the_alarms_of_its_own_stack_only(cloud: Cloud, run: Run, uploaded: str) -> None:
    assert run("up", "--instance-type", TYPE).code == 0
    watch = cloud.client("cloudwatch")
    metric = {"Namespace": "n", "MetricName": "m", "Statistic": "Sum", "Period": 60, "EvaluationPeriods": 1}
    metric |= {"Threshold": 1.0, "ComparisonOperator": "LessThanThreshold"}
    other = "llava-2-Full-ABCDEFGHIJKL"
    watch.put_metric_alarm(AlarmName=other, **metric)
    names = [alarm["AlarmName"] for alarm in watch.describe_alarms()["MetricAlarms"]]
    own = [name for name in names if name != other]
    assert len(own) == 4
    for name in (own[0], other):
        watch.set_alarm_state(AlarmName=name, StateValue="ALARM", StateReason="a test")
    assert f"alarms     {own[0]}" in run("status").out.splitlines()
