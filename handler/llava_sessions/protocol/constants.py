"""Header names, content types, and the forms of IDs and tokens."""

from __future__ import annotations

import re

# SageMaker's contract (botocore sagemaker-runtime 2017-05-13, SessionIdHeader, NewSessionResponseHeader).
SESSION_HEADER = "X-Amzn-SageMaker-Session-Id"
NEW_SESSION_HEADER = "X-Amzn-SageMaker-New-Session-Id"
CLOSED_SESSION_HEADER = "X-Amzn-SageMaker-Closed-Session-Id"
INFERENCE_HEADER = "X-Amzn-SageMaker-Inference-Id"
# The operation that a client called, as SageMaker names it to the container, and the one that streams.
FORWARDED_API_HEADER = "X-Amzn-SageMaker-Forwarded-Api"
STREAMING_API = "InvokeEndpointWithResponseStream"
# TorchServe's header, in lower case, with the rest of a path behind /predictions/NAME/VERSION/.
PATH_HEADER = "url_path"
NEW_SESSION = "NEW_SESSION"
SESSION_ID_PATTERN = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*")
SESSION_ID_MAX_CHARS = 226
# The value with which a session is announced, sent back as its ID.
ANNOUNCED_ID_PATTERN = re.compile(rf"({SESSION_ID_PATTERN.pattern}); *Expires=[0-9TZ:-]*")
# A longer value is not compared with the pattern: Python's `re` takes 180 bytes and 0.5 us for each of its characters.
ANNOUNCED_ID_MAX_CHARS = 2 * SESSION_ID_MAX_CHARS
# The fronts send each body as JSON, and its content type in this header.
CONTENT_TYPE_HEADER = "X-Llava-Content-Type"

# At least 16 characters, so that a token can't be guessed.
SESSION_TOKEN_PATTERN = re.compile(r"[!-~]{16,256}")
# At least 16 characters, so that two clients don't choose the same ID.
REQUEST_ID_PATTERN = re.compile(r"[!-~]{16,64}")

JSON_TYPE = "application/json"
STREAM_TYPE = "application/x-ndjson"
EVENT_STREAM_TYPE = "text/event-stream"
