"""Owns what a picture may cost, how a picture that can't be had is told, and the checks that all ways to one share.

Must not know where bytes come from, nor how they are decoded.
"""

from __future__ import annotations

import re

from ..config import MediaLimits

INVALID_REQUEST = "invalid_request"
TOO_LARGE = "too_large"
UNSUPPORTED_MEDIA = "unsupported_media"

MAX_URL_CHARS = 8192


class MediaError(Exception):
    """A picture that cannot be had.

    `code` is one of "invalid_request", "too_large", "unsupported_media". `message` is one sentence for the client; it
    holds no picture bytes, no credentials, no path and no query string.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


def kind_of(value: object) -> str:
    return "empty" if isinstance(value, str) else f"of type {type(value).__name__}"


def scheme_of(source: str) -> str:
    """The lower-case URL scheme of `source`, "" where it has none."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", source)
    return match[1].lower() if match else ""


def check_size(size_bytes: int, limits: MediaLimits) -> None:
    if size_bytes > limits.max_bytes:
        raise MediaError(TOO_LARGE, f"the picture has {size_bytes} bytes, at most {limits.max_bytes} are wanted")
    if size_bytes == 0:
        raise MediaError(INVALID_REQUEST, "the picture is empty")
