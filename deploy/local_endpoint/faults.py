"""Owns SageMaker Runtime's errors: their classes, statuses and bodies, as botocore reads them.

Must not know what caused one, nor how a reply is sent.
"""

from __future__ import annotations

from .contract import ACCOUNT, MESSAGE_MAX_CHARS, REGION


class Fault(Exception):
    """A call that is answered with an error. `kind` is the class that botocore raises; `fields` are its members."""

    def __init__(self, status: int, kind: str, message: str, **fields: str | int) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.body = {"Message": message[:MESSAGE_MAX_CHARS], **fields}


class StreamFault(Exception):
    """A streamed answer that breaks off; `code` is what the ModelStreamError says of it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.body = {"ErrorCode": code, "Message": message}


def invalid(message: str) -> Fault:
    """The call is not as it must be."""
    return Fault(400, "ValidationError", message)


def unavailable(message: str) -> Fault:
    """Nobody is there to answer."""
    return Fault(503, "ServiceUnavailable", message)


def too_large(most: int) -> Fault:
    """A body over the limit. The real service names no class here, so botocore raises a ClientError with code 413."""
    return Fault(413, "413", f"HTTP content length exceeded {most} bytes.")


def unknown_session(session_id: str) -> Fault:
    """A session that is pinned to no instance. The status is AWS's; the words are ours."""
    return invalid(f"Session {session_id[:8]}... is not known to this endpoint: never opened, closed, or expired.")


def model_error(endpoint: str, logs: str, status: int, said: str) -> Fault:
    """The container answered with 4xx or 5xx; `logs` is where its log is."""
    whose, code = ("client", "CLIENT_ERROR_FROM_MODEL") if status < 500 else ("server", "INTERNAL_FAILURE_FROM_MODEL")
    where = f"See {logs} for more information."
    said = said[: MESSAGE_MAX_CHARS - 500]  # leaves the rest of the message, and its end, readable
    message = f'Received {whose} error ({status}) from primary with message "{said}". {where}'
    return _model_error(endpoint, code, message, status, said)


def no_answer(endpoint: str, logs: str, message: str) -> Fault:
    """The container did not answer at all."""
    return _model_error(endpoint, "INTERNAL_FAILURE_FROM_MODEL", f"{message} See {logs}.", 0, message)


def _model_error(endpoint: str, code: str, message: str, status: int, said: str) -> Fault:
    arn = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/sagemaker/Endpoints/{endpoint}"
    return Fault(
        424, "ModelError", message, ErrorCode=code, LogStreamArn=arn, OriginalStatusCode=status, OriginalMessage=said
    )
