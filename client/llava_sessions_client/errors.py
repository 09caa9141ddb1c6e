"""Errors of the client. `ClientError` is the base of all of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answers import Answer

UNEXPECTED = "unexpected_reply"
_SHOWN_CHARS = 200
# TorchServe's status for a request whose worker died. The server's own errors of this status have a code.
_TORCHSERVE_LOST = 500


class ClientError(Exception):
    """An error of this client."""


class NotConfigured(ClientError, ValueError):
    """The name or URL of the endpoint, the region or the credentials are missing or wrong."""


class ConnectionFailed(ClientError):
    """The connection could not be made, or broke before the reply was complete.

    `connected`: whether the request may have reached the server.
    """

    def __init__(self, message: str, *, connected: bool = True) -> None:
        super().__init__(message)
        self.connected = connected


class TimedOut(ClientError):
    """A reply, a part of it, or all attempts together took longer than the client's time-out."""


class InvalidPicture(ClientError, ValueError):
    """A picture or a clip cannot be read, fetched or encoded."""


class InvalidClip(InvalidPicture):
    """A clip is neither a file nor frames, or the clips do not fit into one request."""


class ChatClosed(ClientError):
    """The chat is closed, or one of its questions is still running in another thread or task."""


class AnswerChanged(ClientError):
    """A repeated question has another answer than the text that the caller has already received.

    The session has the new answer, and so has `Chat.turns`. `answer` is the whole new answer.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__("the repeated question must have the answer that was delivered in part, got another text")
        self.answer = answer


class ApiError(ClientError):
    """A rejected request.

    `status` is the HTTP status of the server, and `code` its stable error code. Through SageMaker both are those of the
    container. `code` is "unexpected_reply" for an error without a code, as from a proxy. For SageMaker's own errors,
    `code` is the name of AWS's error class. `retry_after_s`: seconds from the header `Retry-After`, or None.
    """

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidRequest(ApiError):
    """The request is malformed, or the server cannot read a picture or a clip of it."""


class TooLarge(ApiError):
    """A picture, a clip, a question, the history or the whole request is above a limit."""


class ContextLengthExceeded(ApiError):
    """The conversation would exceed the model's context. The session stays usable."""


class SessionLost(ApiError):
    """The server no longer has the session. `on_lost="replay"` opens it again with its history."""


class SessionExpired(SessionLost):
    """The session has expired."""


class Busy(ApiError):
    """The session is still answering another question."""


class OverCapacity(ApiError):
    """The server has no room for the session or the question, or AWS throttles the caller."""


class Unavailable(ApiError):
    """The server cannot answer at the moment, and all retries have failed."""


class SessionMoved(Unavailable):
    """Another instance has taken over the session, or is answering it."""


# The classes by the server's error code. docs/protocol.md, "Errors", has the codes.
_BY_CODE: dict[str, type[ApiError]] = {
    "invalid_request": InvalidRequest,
    "unsupported_media": InvalidRequest,
    "too_large": TooLarge,
    "context_length_exceeded": ContextLengthExceeded,
    "session_not_found": SessionLost,
    "session_expired": SessionExpired,
    "session_busy": Busy,
    "capacity": OverCapacity,
    "session_moved": SessionMoved,
    "engine_restarting": Unavailable,
    "shutting_down": Unavailable,
    "journal_unavailable": Unavailable,
    "request_dropped": Unavailable,
    "request_timeout": Unavailable,
    "timeout": Unavailable,
}
_BY_STATUS: dict[int, type[ApiError]] = {
    400: InvalidRequest,
    408: Unavailable,
    413: TooLarge,
    415: InvalidRequest,
    429: OverCapacity,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
    507: Unavailable,  # TorchServe without its worker
}


def api_error(status: int, code: str, message: str, retry_after_s: float | None = None) -> ApiError:
    """Return the error of the class that belongs to the code, or to the status of a code without a class."""
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status, ApiError)
    return kind(status, code, message, retry_after_s)


def error_of_body(status: int, body: bytes, retry_after_s: float | None = None) -> ApiError:
    """Return the error of a reply. Its body has the native form or OpenAI's; any other one is "unexpected_reply"."""
    try:
        error = json.loads(body)["error"]
        return api_error(status, str(error["code"]), str(error["message"]), retry_after_s)
    except (ValueError, KeyError, TypeError):
        if status == _TORCHSERVE_LOST:
            return Unavailable(status, UNEXPECTED, "TorchServe has lost its worker.", retry_after_s)
        text = body[:_SHOWN_CHARS].decode("utf-8", "replace")
        return api_error(status, UNEXPECTED, text or "the reply has no body", retry_after_s)


def is_transient(error: ClientError) -> bool:
    """Return whether the same request may succeed if it is sent again after a pause."""
    if isinstance(error, OverCapacity):
        return error.retry_after_s is not None
    return isinstance(error, ConnectionFailed | TimedOut | Unavailable)


# SageMaker rejects the call by itself. If that lasts, the session's instance is gone for ever.
_PLATFORM_CODES = ("ServiceUnavailable", "InternalFailure", "InternalDependencyException", "ModelError")


def is_from_platform(error: ClientError) -> bool:
    """Return whether SageMaker rejected a call because it has no answer of the container."""
    return isinstance(error, ApiError) and error.code in _PLATFORM_CODES


def is_lost(error: ClientError) -> bool:
    """Return whether the session of a question is lost, or if retries have failed, its instance."""
    return isinstance(error, SessionLost) or is_from_platform(error)
