"""The two kinds of address, a server over plain HTTP and a SageMaker endpoint, and the limits of each."""

from __future__ import annotations

import re

import httpx

from .errors import NotConfigured
from .options import Retries, Timeouts
from .settings import Settings
from .shrink import PictureLimits

# docs/protocol.md, "Limits".
HTTP_BODY_BYTES = 32 * 1024 * 1024
SAGEMAKER_BODY_BYTES = 6 * 1024 * 1024

_HOST = re.compile(rb"[a-zA-Z0-9._:-]+(%25[^%]+)?")  # as sent: a name or an address, which may name its interface
_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")


def is_http(name_or_url: str) -> bool:
    """Return whether this is a URL. Any other string is the name of a SageMaker endpoint."""
    return name_or_url.lower().startswith(("http://", "https://"))


def check_target(name_or_url: str) -> None:
    """Raise `NotConfigured` if this is neither a URL nor a name that a SageMaker endpoint may have."""
    if is_http(name_or_url):
        try:
            url = httpx.URL(name_or_url)
            is_valid = bool(_HOST.fullmatch(url.raw_host)) and (url.port is None or url.port < 65536)
        except httpx.InvalidURL:
            is_valid = False
        if not is_valid:
            raise NotConfigured("a URL must have a host and a valid port, as in http://127.0.0.1:8080")
    elif not _NAME.fullmatch(name_or_url):
        raise NotConfigured("an endpoint must be a URL with http:// or https://, or the name of a SageMaker endpoint")


def settings_of(
    name_or_url: str,
    *,
    timeouts: Timeouts,
    retries: Retries,
    session_token: str | None,
    max_side_px: int,
    max_body_bytes: int | None,
) -> Settings:
    """Return the settings of the chats at this address. Raise `NotConfigured`."""
    check_target(name_or_url)
    is_direct = is_http(name_or_url)
    body_bytes = max_body_bytes or (HTTP_BODY_BYTES if is_direct else SAGEMAKER_BODY_BYTES)
    confirm_s = None if is_direct else timeouts.confirm_s
    return Settings(timeouts, retries, PictureLimits(max_side_px), body_bytes, session_token, confirm_s)
