"""SageMaker Runtime's errors: their classes, statuses and bodies, as botocore reads them."""

from __future__ import annotations

from typing import Any

from .contract import ACCOUNT, MESSAGE_MAX_CHARS, REGION


class Fault(Exception):
    """An error reply to a call. `kind` is the class that botocore raises; `fields` are its members."""

    def __init__(self, status: int, kind: str, message: str, **fields: str | int) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.body: dict[str, Any] = {"Message": message[:MESSAGE_MAX_CHARS], **fields}


class StreamFault(Exception):
    """The error of a streamed reply that breaks off. `code` is the ErrorCode of its ModelStreamError."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.body = {"ErrorCode": code, "Message": message}


def invalid(message: str) -> Fault:
    """Return the error of an invalid call."""
    return Fault(400, "ValidationError", message)


def unavailable(message: str) -> Fault:
    """Return the error for a call without an instance."""
    return Fault(503, "ServiceUnavailable", message)


def none_healthy() -> Fault:
    """Return the error for a call while no instance is available."""
    return unavailable("No instance of the endpoint is healthy.")


def too_large(most: int) -> Fault:
    """Return the error for a body above the limit. AWS names no class: botocore raises ClientError with code 413."""
    return Fault(413, "413", f"HTTP content length exceeded {most} bytes.")


def unknown_session(session_id: str) -> Fault:
    """Return the error for a session without an instance. The status is AWS's; the message is ours."""
    return invalid(f"Session {session_id[:8]}... is not known to this endpoint: never opened, closed, or expired.")


def model_error(endpoint: str, logs: str, status: int, text: str) -> Fault:
    """Return the error for a container that answered 4xx or 5xx. `logs` is the path of its log."""
    side = "client" if status < 500 else "server"
    code = "CLIENT_ERROR_FROM_MODEL" if status < 500 else "INTERNAL_FAILURE_FROM_MODEL"
    where = f"See {logs} for more information."
    text = text[: MESSAGE_MAX_CHARS - 500]  # leaves room for the rest of the message
    message = f'Received {side} error ({status}) from primary with message "{text}". {where}'
    return _model_error(endpoint, code, message, status, text)


def no_answer(endpoint: str, logs: str, message: str) -> Fault:
    """Return the error for a container that did not answer."""
    return _model_error(endpoint, "INTERNAL_FAILURE_FROM_MODEL", f"{message} See {logs}.", 0, message)


def no_answer_in_time(endpoint: str, logs: str) -> Fault:
    """Return the error for a container that did not answer within the time limit."""
    return no_answer(endpoint, logs, "Your invocation timed out while waiting for a response from container primary.")


def _model_error(endpoint: str, code: str, message: str, status: int, text: str) -> Fault:
    arn = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/sagemaker/Endpoints/{endpoint}"
    return Fault(
        424, "ModelError", message, ErrorCode=code, LogStreamArn=arn, OriginalStatusCode=status, OriginalMessage=text
    )
