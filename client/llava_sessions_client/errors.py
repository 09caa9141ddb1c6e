"""Errors of the client."""

from __future__ import annotations

from typing import Any

import httpx


class ApiError(Exception):
    """A rejected request: the HTTP status, and the stable `code` of the error body.

    `code` is "unexpected_reply" when the reply has no error body of LLaVA Sessions, as from a proxy.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code


def raise_for_error(reply: httpx.Response) -> httpx.Response:
    """Return a successful reply. Raise `ApiError` for any other."""
    if reply.is_success:
        return reply
    try:
        error = reply.json()["error"]
        refusal = ApiError(reply.status_code, error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        refusal = ApiError(reply.status_code, "unexpected_reply", reply.text[:200])
    raise refusal


def raise_for_late_error(body: dict[str, Any]) -> None:
    """Raise `ApiError` if a body, or a line of a stream, is an error that occurred after status 200 was sent."""
    if "error" in body:
        raise ApiError(200, body["error"]["code"], body["error"]["message"])
