"""Parameters of the CloudFormation template, from the options of `llava-deploy up`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

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
    """Return the parameters that the options set. `before` is the present stack, if any.

    Raise `DeployError` if the model, the image or the role does not exist.
    """
    uploaded = None if args.model else models.current(account, args.bucket)
    address = uploaded.address if uploaded else models.ModelAddress.parse(args.model)
    models.check_exists(account, address)
    uri = args.image or images.newest(account, args.repository)
    image = images.EcrImage.parse(uri)
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
    if uploaded and uploaded.sessions:
        parameters["SessionsPerInstance"] = str(uploaded.sessions)
    given = {name: getattr(args, option) for option, name in PARAMETERS.items() if getattr(args, option) is not None}
    parameters |= {name: str(value) for name, value in given.items()}
    parameters |= _derived(parameters, before)
    for name, value in args.set:
        if name not in stacks.template_parameters():
            raise DeployError(f"--set {name}: deploy/sagemaker/endpoint.yaml has no such parameter")
        parameters[name] = value
    return parameters


def _derived(given: Mapping[str, str], before: stacks.StackState | None) -> dict[str, str]:
    """Return parameters that follow from others and are not given."""
    derived = {}
    if "InstanceCount" in given and "MaxInstanceCount" not in given:
        most = int(before.parameters.get("MaxInstanceCount", 0)) if before else 0
        derived["MaxInstanceCount"] = str(max(int(given["InstanceCount"]), most))
    if "SessionsPerInstance" in given:
        derived["SessionsTarget"] = str(max(int(TARGET_SHARE * int(given["SessionsPerInstance"])), 1))
    default = stacks.template_parameters()["InstanceType"]["Default"]
    instance_type = given.get("InstanceType", "" if before else default)
    if instance_type and "InferenceAmiVersion" not in given:
        derived["InferenceAmiVersion"] = GPU_AMI if NEEDS_AMI.match(instance_type) else ""
    return derived
