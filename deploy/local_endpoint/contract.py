"""Owns the words of SageMaker's wire contract: header names, the forms of ids, limits, and the corners of the contract
that nobody has confirmed.

Source: botocore's model of sagemaker-runtime 2017-05-13, and AWS's developer guide ("Stateful sessions"). Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
NEW_SESSION_HEADER = "X-Amzn-SageMaker-New-Session-Id"
CLOSED_SESSION_HEADER = "X-Amzn-SageMaker-Closed-Session-Id"
INFERENCE_HEADER = "X-Amzn-SageMaker-Inference-Id"
ATTRIBUTES_HEADER = "X-Amzn-SageMaker-Custom-Attributes"
FORWARDED_API_HEADER = "X-Amzn-SageMaker-Forwarded-Api"
STREAM_ACCEPT_HEADER = "X-Amzn-SageMaker-Accept"
STREAM_TYPE_HEADER = "X-Amzn-SageMaker-Content-Type"
VARIANT_HEADER = "x-Amzn-Invoked-Production-Variant"
REQUEST_ID_HEADER = "x-amzn-RequestId"
ERROR_TYPE_HEADER = "x-amzn-ErrorType"

NEW_SESSION = "NEW_SESSION"
VARIANT = "AllTraffic"
REGION = "us-west-2"
ACCOUNT = "000000000000"

INVOKE = "InvokeEndpoint"
INVOKE_STREAM = "InvokeEndpointWithResponseStream"

# What a container sees of a request; SageMaker strips every other header. Spelled so: TorchServe looks for the
# session's header by its exact name.
TO_CONTAINER = (
    "Content-Type",
    "Accept",
    ATTRIBUTES_HEADER,
    "X-Amzn-SageMaker-Target-Model",
    "X-Amzn-SageMaker-Target-Variant",
    "X-Amzn-SageMaker-Target-Container-Hostname",
    INFERENCE_HEADER,
    "X-Amzn-SageMaker-Enable-Explanations",
    "X-Amzn-SageMaker-Inference-Component",
)

_SESSION_ID = r"[a-zA-Z0-9](-*[a-zA-Z0-9])*"
SESSION_ID = re.compile(_SESSION_ID)
NEW_SESSION_VALUE = re.compile(rf"({_SESSION_ID});\sExpires=(\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ)")
ID_MAX_CHARS = 256
INFERENCE_ID_MAX_CHARS = 64
ATTRIBUTES_MAX_CHARS = 1_024
MESSAGE_MAX_CHARS = 2_048

NewSessionCorner = Literal["absent", "empty", "literal"]
LostInstanceCorner = Literal["400", "503", "reroute"]
CreateHeaderCorner = Literal["session", "new-session"]


@dataclass(frozen=True)
class Corners:
    """What the real platform does where nobody has confirmed it; the defaults are what is most likely.

    `new_session`: what the container gets for the session header of an open. `lost_instance`: what a session whose
    instance is gone is answered with: 400 as for an unknown id, 503, or by another instance, which has never heard of
    it. `create_header`: in which header the container announces a session: `X-Amzn-SageMaker-Session-Id` (documented)
    or `X-Amzn-SageMaker-New-Session-Id` (AWS's own container library).
    """

    new_session: NewSessionCorner = "absent"
    lost_instance: LostInstanceCorner = "400"
    create_header: CreateHeaderCorner = "session"

    @property
    def announced_in(self) -> str:
        """The header of a container's reply that announces a session."""
        return SESSION_HEADER if self.create_header == "session" else NEW_SESSION_HEADER


NEW_SESSION_CORNERS = get_args(NewSessionCorner)
LOST_INSTANCE_CORNERS = get_args(LostInstanceCorner)
CREATE_HEADER_CORNERS = get_args(CreateHeaderCorner)


@dataclass(frozen=True)
class Limits:
    """What the platform allows. The API says 6 MiB (25 MB in newer pages of the guide), 60 s, and 8 min of stream."""

    body_bytes: int = 6_291_456
    answer_s: float = 60.0
    stream_s: float = 480.0


def expires_at(value: str) -> float:
    """Seconds since the epoch of an `Expires`."""
    return datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
