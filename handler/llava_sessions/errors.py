"""Owns the refusals a caller can see: their stable codes, HTTP statuses and the reason phrases on the wire.

Must not know how a refusal came about, nor how a reply is sent. Pure.
"""

from __future__ import annotations

from http import HTTPStatus

STATUS_OF_CODE: dict[str, int] = {
    "invalid_request": 400,
    "session_not_found": 404,
    "session_busy": 409,
    "session_expired": 410,
    "too_large": 413,
    "unsupported_media": 415,
    "context_length_exceeded": 422,
    "capacity": 429,
    "internal": 500,
    "engine_restarting": 503,
    "journal_unavailable": 503,
    "request_dropped": 503,
    "session_moved": 503,
    "shutting_down": 503,
}


class Refused(Exception):
    """A request that is answered with an error and changes nothing.

    `code` is one of `STATUS_OF_CODE`; `message` is one sentence for the caller: what was got and what was wanted.
    `retry_after_s`: when the same request may do better.
    """

    def __init__(self, code: str, message: str, retry_after_s: int | None = None) -> None:
        if code not in STATUS_OF_CODE:
            raise ValueError(f"unknown error code {code!r}")
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    @property
    def status(self) -> int:
        """The HTTP status that goes with the code."""
        return STATUS_OF_CODE[self.code]

    def body(self) -> dict:
        """The reply's JSON: `{"error": {"code", "message"}}`."""
        return {"error": {"code": self.code, "message": self.message}}


def reason_phrase(status: int) -> str:
    """ASCII reason phrase of an HTTP status (TorchServe counts a phrase in characters, so a non-ASCII one kills the
    worker).
    """
    return HTTPStatus(status).phrase
