"""The error for a picture or clip that cannot be loaded, and the checks that all sources share. Pure."""

from __future__ import annotations

import re

from ..config import MediaLimits

INVALID_REQUEST = "invalid_request"
TOO_LARGE = "too_large"
UNSUPPORTED_MEDIA = "unsupported_media"

MAX_URL_CHARS = 8192
# The longest scheme that matters is "https". Longer text is not searched for one.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31}):")


class MediaError(Exception):
    """A picture or clip that cannot be loaded.

    `code` is "invalid_request", "too_large" or "unsupported_media". `message` is one sentence for the client, without a
    capital letter and a full stop. It contains no bytes of the file, credentials, paths or query strings.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


def scheme_of(source: str) -> str:
    """Return the URL scheme of `source` in lower case, or "" if `source` has none."""
    match = _SCHEME.match(source)
    return match[1].lower() if match else ""


def check_request_pixels(pixels: int, limits: MediaLimits) -> None:
    """Raise `MediaError` if the pictures of one request have more than `limits.max_request_pixels` together."""
    if pixels > limits.max_request_pixels:
        most = limits.max_request_pixels
        raise MediaError(TOO_LARGE, f"the pictures of a request must have at most {most} pixels together, got {pixels}")


def check_size(size_bytes: int, limits: MediaLimits) -> None:
    """Raise `MediaError` unless `size_bytes` is from 1 to `limits.max_bytes`."""
    if size_bytes > limits.max_bytes:
        raise MediaError(TOO_LARGE, f"the picture must be at most {limits.max_bytes} bytes, got {size_bytes} bytes")
    if size_bytes == 0:
        raise MediaError(INVALID_REQUEST, "the picture must not be empty, got 0 bytes")


def check_clip_size(size_bytes: int, limits: MediaLimits) -> None:
    """Raise `MediaError` unless `size_bytes` is from 1 to `limits.max_clip_bytes`."""
    if size_bytes > limits.max_clip_bytes:
        raise MediaError(TOO_LARGE, f"the clip must be at most {limits.max_clip_bytes} bytes, got {size_bytes} bytes")
    if size_bytes == 0:
        raise MediaError(INVALID_REQUEST, "the clip must not be empty, got 0 bytes")
