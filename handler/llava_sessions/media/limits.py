"""The error for a picture or clip that cannot be loaded, and the checks that all sources share. Pure."""

from __future__ import annotations

import re
from typing import ClassVar

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
    """Raise `MediaError` if the media of one request have more than `limits.max_request_pixels` together."""
    if pixels > limits.max_request_pixels:
        most = limits.max_request_pixels
        expected = f"the pictures and clips of a request must have at most {most} pixels together"
        raise MediaError(TOO_LARGE, f"{expected}, got {pixels}")


class ClipFileLimits(MediaLimits):
    """Limits whose `max_bytes` and `noun` are those of a clip's file."""

    noun: ClassVar[str] = "clip"


def clip_file_limits(limits: MediaLimits) -> MediaLimits:
    """Return the limits with which `sources` and `fetch` read the file of a clip: as for a picture, but its bytes."""
    return ClipFileLimits(**{**limits.model_dump(), "max_bytes": limits.max_clip_bytes})


def check_size(size_bytes: int, limits: MediaLimits) -> None:
    """Raise `MediaError` unless `size_bytes` is from 1 to `limits.max_bytes`."""
    if size_bytes > limits.max_bytes:
        most = limits.max_bytes
        raise MediaError(TOO_LARGE, f"the {limits.noun} must be at most {most} bytes, got {size_bytes} bytes")
    if size_bytes == 0:
        raise MediaError(INVALID_REQUEST, f"the {limits.noun} must not be empty, got 0 bytes")
