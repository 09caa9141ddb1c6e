"""SageMaker's wire contract: header names, forms of IDs, limits, and its undocumented corners.

Source: botocore's model of sagemaker-runtime 2017-05-13, and AWS's developer guide ("Stateful sessions").
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
PREFIX_AWARE_HEADER = "X-Amzn-SageMaker-Prefix-Aware-Id"
STREAM_ACCEPT_HEADER = "X-Amzn-SageMaker-Accept"
STREAM_TYPE_HEADER = "X-Amzn-SageMaker-Content-Type"
VARIANT_HEADER = "x-Amzn-Invoked-Production-Variant"
REQUEST_ID_HEADER = "x-amzn-RequestId"
ERROR_TYPE_HEADER = "x-amzn-ErrorType"
# In the container HAProxy sends each body to TorchServe as JSON, and its content type in this header.
CONTENT_TYPE_HEADER = "X-Llava-Content-Type"
JSON_TYPE = "application/json"
EVENT_STREAM_TYPE = "text/event-stream"
SIGV4 = "AWS4-HMAC-SHA256"

NEW_SESSION = "NEW_SESSION"
VARIANT = "AllTraffic"
REGION = "us-west-2"
ACCOUNT = "000000000000"

INVOKE = "InvokeEndpoint"
INVOKE_STREAM = "InvokeEndpointWithResponseStream"
OPENAI = "OpenAI"  # a name of ours; AWS documents no name for this path

# The headers that a container receives; SageMaker removes every other header. The case matters: TorchServe compares the
# name of the session header with its case.
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
PREFIX_AWARE_ID_MAX_CHARS = 64
ATTRIBUTES_MAX_CHARS = 1_024
MESSAGE_MAX_CHARS = 2_048

NewSessionCorner = Literal["absent", "empty", "literal"]
LostInstanceCorner = Literal["400", "503", "reroute"]
CreateHeaderCorner = Literal["session", "new-session"]


@dataclass(frozen=True)
class Corners:
    """Undocumented behaviour of the platform. The defaults are the most likely behaviour.

    `new_session`: the session header that the container receives for an open. `lost_instance`: the reply for a session
    whose instance is lost: 400 as for an unknown ID, 503, or the reply of another instance, which receives the session
    ID and can know the session from a shared journal only. `create_header`: the header in which the container announces
    a session: `X-Amzn-SageMaker-Session-Id` (documented) or `X-Amzn-SageMaker-New-Session-Id` (AWS's own container
    library).
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
class PlatformLimits:
    """Limits of the platform: 6 MiB by the API (25 MB in newer pages of the guide), 60 s, and 8 min for a stream."""

    body_bytes: int = 6_291_456
    answer_s: float = 60.0
    stream_s: float = 480.0


def expires_at(value: str) -> float:
    """Return an `Expires` time in seconds since the epoch."""
    return datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
