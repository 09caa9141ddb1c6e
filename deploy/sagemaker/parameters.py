"""Parameters of the CloudFormation template, from the options of `llava-deploy up`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping

from . import images, models, roles, stacks
from .account import Account
from .problems import DeployError

GPU_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"  # NVIDIA driver 580, which the image's CUDA 13 needs
NEEDS_AMI = re.compile(r"ml\.(g[456]|p[45])[a-z]*\.")  # newer instance types have such a driver by default
TARGET_SHARE = 0.7  # of the sessions that an instance admits; autoscaling adds an instance above it

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


def template_parameters(args: argparse.Namespace, account: Account, before: stacks.StackState | None) -> dict[str, str]:
    """Return the parameters that change. `before` is the present stack, if any; its other parameters stay.

    Raise `DeployError` if the model, the image or the role does not exist.
    """
    if account.is_offline:
        parameters = _placeholders(args, account)
    else:
        parameters = _model(args, account, before) | _image(args, account)
        if args.role:
            roles.check_role(account, args.role)
    given = {name: getattr(args, option) for option, name in PARAMETERS.items() if getattr(args, option) is not None}
    parameters |= {name: str(value) for name, value in given.items()}
    for name, value in args.set:
        if name not in stacks.template_parameters():
            raise DeployError(f"--set {name}: deploy/sagemaker/endpoint.yaml has no such parameter")
        parameters[name] = value
    return _derived(parameters, before.parameters if before else {}) | parameters


def _model(args: argparse.Namespace, account: Account, before: stacks.StackState | None) -> dict[str, str]:
    """Return the model's parameters: the given model, or the latest upload.

    The packed number of sessions counts for a model that is new to the stack. Later it may have been changed.
    """
    uploaded = None if args.model else models.current(account, args.bucket)
    address = uploaded.address if uploaded else models.ModelAddress.parse(args.model)
    models.check_exists(account, address)
    parameters = {
        "EndpointName": account.name,
        "ModelBucket": address.bucket,
        "ModelKey": address.key,
        "ModelFormat": "tarball" if address.is_tarball else "folder",
    }
    is_new = before is None or before.parameters.get("ModelKey") != address.key
    if uploaded and uploaded.sessions and is_new:
        parameters["SessionsPerInstance"] = str(uploaded.sessions)
    return parameters


def _image(args: argparse.Namespace, account: Account) -> dict[str, str]:
    """Return the image's parameters: the given image, or the newest."""
    uri = args.image or images.newest(account, args.repository)
    image = images.EcrImage.parse(uri)
    pinned = images.by_digest(account, image)
    if pinned is None:
        raise DeployError(f"ECR has no image {uri}: run `llava-deploy push` first")
    partition = account.session.get_partition_for_region(account.region)
    return {"ImageUri": pinned, "ImageRepositoryArn": image.repository_arn(partition)}


def _placeholders(args: argparse.Namespace, account: Account) -> dict[str, str]:
    """Return the parameters of model and image for a dry run without credentials."""
    repository = images.repository_uri(account, args.repository)
    return {
        "EndpointName": account.name,
        "ImageUri": args.image or f"<the newest image of {repository}>",
        "ModelBucket": args.bucket or account.bucket,
        "ModelKey": args.model or f"<the latest upload of {account.name!r}>",
    }


def _derived(given: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
    """Return parameters that follow from others.

    A value in `before` that does not follow from the others there was chosen by an earlier `--set`, and stays.
    """
    derived = {}
    if "InstanceCount" in given and "MaxInstanceCount" not in given:
        most = int(before.get("MaxInstanceCount", 0))
        derived["MaxInstanceCount"] = str(max(int(given["InstanceCount"]), most))
    if "SessionsPerInstance" in given and _follows(before, "SessionsTarget", "SessionsPerInstance", _target):
        derived["SessionsTarget"] = _target(given["SessionsPerInstance"])
    default = stacks.template_parameters()["InstanceType"]["Default"]
    instance_type = given.get("InstanceType", "" if before else default)
    if instance_type and _follows(before, "InferenceAmiVersion", "InstanceType", _ami):
        derived["InferenceAmiVersion"] = _ami(instance_type)
    return derived


def _follows(before: Mapping[str, str], name: str, source: str, rule: Callable[[str], str]) -> bool:
    """Return whether the present value of a parameter follows from its source, or there is none."""
    return name not in before or source not in before or before[name] == rule(before[source])


def _target(sessions: str) -> str:
    return str(max(int(TARGET_SHARE * int(sessions)), 1))


def _ami(instance_type: str) -> str:
    return GPU_AMI if NEEDS_AMI.match(instance_type) else ""
