"""A small AWS for the tests: moto's server, and the CloudFormation resources that moto's stacks leave out.

Those are made by calls of the API, with botocore's validation of every parameter, so what the template says must be
what AWS takes. Nothing here knows what the template is for.
"""

from __future__ import annotations

import json
import logging
import struct
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import boto3
from botocore.awsrequest import AWSResponse
from botocore.model import Shape, StructureShape
from moto.cloudformation.exceptions import ValidationError
from moto.cloudformation.responses import CloudFormationResponse
from moto.core.common_models import CloudFormationModel
from moto.sagemaker.models import FakeEndpoint, FakeEndpointConfig
from moto.server import ThreadedMotoServer
from urllib3 import HTTPResponse

ACCOUNT = "123456789012"  # moto's
REGION = "eu-west-1"


@contextmanager
def serving() -> Iterator[str]:
    """moto on a free port of loopback while this lasts; its URL."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def settings(url: str, home: Path) -> dict[str, str]:
    """Environment variables by which AWS's clients find moto and nothing else; moto's own calls need them as well."""
    return {
        "HOME": str(home),  # whose ~/.aws is empty
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "NO_PROXY": "127.0.0.1",
    }


def empty(url: str) -> None:
    """Forget everything that is in any account. All servers of a process share what they know."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    direct.open(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()


def put_image(ecr: Any, repository: str) -> None:
    """An image without layers, as a push leaves one."""
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    config = {"mediaType": "application/vnd.docker.container.image.v1+json", "size": 2, "digest": "sha256:" + "a" * 64}
    manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": []})
    ecr.put_image(repositoryName=repository, imageManifest=manifest, imageTag="one")


def contents(client: Callable[[str], Any]) -> dict[str, list[Any]]:
    """What is in the account, by kind; kinds of which there is nothing are left out. `client` makes boto3's clients."""
    sagemaker, scaling = client("sagemaker"), client("application-autoscaling")
    found = {
        "stacks": client("cloudformation").describe_stacks()["Stacks"],
        "endpoints": sagemaker.list_endpoints()["Endpoints"],
        "configs": sagemaker.list_endpoint_configs()["EndpointConfigs"],
        "models": sagemaker.list_models()["Models"],
        "roles": client("iam").list_roles()["Roles"],
        "log groups": client("logs").describe_log_groups()["logGroups"],
        "targets": scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"],
        "alarms": client("cloudwatch").describe_alarms()["MetricAlarms"],
        "dashboards": client("cloudwatch").list_dashboards()["DashboardEntries"],
        "buckets": client("s3").list_buckets()["Buckets"],
        "repositories": client("ecr").describe_repositories()["repositories"],
    }
    return {kind: things for kind, things in found.items() if things}


# --- what moto's stacks leave out -------------------------------------------------------------------------------------


def as_request(shape: Shape, value: Any) -> Any:
    """A template's value as the API takes it: its members' spelling, and numbers that a parameter made strings of."""
    if isinstance(shape, StructureShape):
        members = {name.lower(): name for name in shape.members}
        return {
            members[key.lower()]: as_request(shape.members[members[key.lower()]], inner) for key, inner in value.items()
        }
    if shape.type_name == "list":
        return [as_request(shape.member, inner) for inner in value]
    convert = {"integer": int, "long": int, "float": float, "double": float}.get(shape.type_name)
    return convert(value) if convert else value


def call(region: str, service: str, operation: str, properties: dict[str, Any]) -> None:
    client = boto3.client(service, region_name=region)
    shape = client.meta.service_model.operation_model(client.meta.method_to_api_mapping[operation]).input_shape
    getattr(client, operation)(**as_request(shape, properties))


class _ByApi:
    """A resource that is made and deleted by one call each."""

    def __init__(self, physical_id: str) -> None:
        self.physical_resource_id = physical_id
        self.type = self.cloudformation_type()

    @staticmethod
    def cloudformation_name_type() -> str:
        return ""

    @classmethod
    def update_from_cloudformation_json(cls, original_resource, new_resource_name, cloudformation_json, **where):
        cls.delete_from_cloudformation_json(original_resource.physical_resource_id, cloudformation_json, **where)
        return cls.create_from_cloudformation_json(new_resource_name, cloudformation_json, **where)

    def is_created(self) -> bool:
        return True


class MetricFilter(_ByApi, CloudFormationModel):
    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::Logs::MetricFilter"

    @classmethod
    def create_from_cloudformation_json(cls, resource_name, cloudformation_json, account_id, region_name, **_):
        properties = cloudformation_json["Properties"]
        call(region_name, "logs", "put_metric_filter", {"filterName": resource_name, **properties})
        return cls(f"{properties['LogGroupName']}|{resource_name}")

    @classmethod
    def delete_from_cloudformation_json(cls, resource_name, cloudformation_json, account_id, region_name):
        group, _, name = resource_name.partition("|")
        call(region_name, "logs", "delete_metric_filter", {"logGroupName": group, "filterName": name})


class ScalableTarget(_ByApi, CloudFormationModel):
    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::ApplicationAutoScaling::ScalableTarget"

    @classmethod
    def create_from_cloudformation_json(cls, resource_name, cloudformation_json, account_id, region_name, **_):
        properties = cloudformation_json["Properties"]
        call(region_name, "application-autoscaling", "register_scalable_target", properties)
        return cls("|".join(properties[key] for key in ("ResourceId", "ScalableDimension", "ServiceNamespace")))

    @classmethod
    def delete_from_cloudformation_json(cls, resource_name, cloudformation_json, account_id, region_name):
        call(region_name, "application-autoscaling", "deregister_scalable_target", target_of(resource_name))


class ScalingPolicy(_ByApi, CloudFormationModel):
    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::ApplicationAutoScaling::ScalingPolicy"

    @classmethod
    def create_from_cloudformation_json(cls, resource_name, cloudformation_json, account_id, region_name, **_):
        properties = dict(cloudformation_json["Properties"])
        target = properties.pop("ScalingTargetId")
        call(region_name, "application-autoscaling", "put_scaling_policy", {**properties, **target_of(target)})
        return cls(f"{properties['PolicyName']}/{target}")

    @classmethod
    def delete_from_cloudformation_json(cls, resource_name, cloudformation_json, account_id, region_name):
        name, _, target = resource_name.partition("/")
        request = {"PolicyName": name, **target_of(target)}
        call(region_name, "application-autoscaling", "delete_scaling_policy", request)


class Alarm(_ByApi, CloudFormationModel):
    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::CloudWatch::Alarm"

    @classmethod
    def create_from_cloudformation_json(cls, resource_name, cloudformation_json, account_id, region_name, **_):
        request = {"AlarmName": resource_name, **cloudformation_json["Properties"]}
        call(region_name, "cloudwatch", "put_metric_alarm", request)
        alarm = cls(resource_name)
        alarm.arn = f"arn:aws:cloudwatch:{region_name}:{account_id}:alarm:{resource_name}"
        return alarm

    @classmethod
    def has_cfn_attr(cls, attr: str) -> bool:
        return attr == "Arn"

    def get_cfn_attribute(self, attribute_name: str) -> str:
        return {"Arn": self.arn}[attribute_name]

    @classmethod
    def delete_from_cloudformation_json(cls, resource_name, cloudformation_json, account_id, region_name):
        call(region_name, "cloudwatch", "delete_alarms", {"AlarmNames": [resource_name]})


class Dashboard(_ByApi, CloudFormationModel):
    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::CloudWatch::Dashboard"

    @classmethod
    def create_from_cloudformation_json(cls, resource_name, cloudformation_json, account_id, region_name, **_):
        properties = cloudformation_json["Properties"]
        call(region_name, "cloudwatch", "put_dashboard", properties)
        return cls(properties["DashboardName"])

    @classmethod
    def delete_from_cloudformation_json(cls, resource_name, cloudformation_json, account_id, region_name):
        call(region_name, "cloudwatch", "delete_dashboards", {"DashboardNames": [resource_name]})


def target_of(physical_id: str) -> dict[str, str]:
    """A scalable target's id as AWS makes it, taken apart."""
    return dict(zip(("ResourceId", "ScalableDimension", "ServiceNamespace"), physical_id.split("|"), strict=True))


# moto knows no instance type of the last years.
FakeEndpointConfig.validate_instance_type = lambda self, instance_type: None


# moto's stacks give endpoints a name of their own; AWS's take the one in the template.
FakeEndpoint.cloudformation_name_type = staticmethod(lambda: "EndpointName")


def _refuse_same_update(self, incoming, body, stack) -> None:
    """moto stumbles where an update changes nothing; AWS says so."""
    present = {name: str(value) for name, value in stack.stack_parameters.items()}
    wanted = {item["ParameterKey"]: item.get("ParameterValue", present.get(item["ParameterKey"])) for item in incoming}
    if body == stack.template and wanted == present:
        raise ValidationError(message="No updates are to be performed.")


CloudFormationResponse._validate_different_update = _refuse_same_update


# --- answers that moto does not give ----------------------------------------------------------------------------------


def answer(body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> Callable[..., AWSResponse]:
    """A handler of botocore's `before-send` event: this answer instead of a request."""

    def send(request: Any, **_: Any) -> AWSResponse:
        raw = HTTPResponse(BytesIO(body), headers=headers, status=status, preload_content=False)
        return AWSResponse(request.url, status, headers or {}, raw)

    return send


def refusal(code: str, message: str, status: int = 400) -> Callable[..., AWSResponse]:
    """The same, with an error as the query protocol spells it (CloudFormation, IAM, STS)."""
    error = f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
    text = f"<ErrorResponse>{error}</ErrorResponse>"
    return answer(text.encode(), {"Content-Type": "text/xml"}, status)


def frame(payload: bytes, **headers: str) -> bytes:
    """One message of AWS's event stream."""
    head = b""
    for name, value in headers.items():
        name = ":" + name.replace("_", "-")
        head += bytes([len(name)]) + name.encode() + b"\x07" + struct.pack(">H", len(value)) + value.encode()
    prelude = struct.pack(">II", 16 + len(head) + len(payload), len(head))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + head + payload
    return message + struct.pack(">I", zlib.crc32(message))


def part(payload: bytes) -> bytes:
    """A piece of a streamed answer."""
    return frame(payload, message_type="event", event_type="PayloadPart", content_type="application/octet-stream")
