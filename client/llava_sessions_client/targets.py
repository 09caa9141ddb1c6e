"""What is at an address: a server over plain HTTP, or a SageMaker endpoint; and the limits of each."""

from __future__ import annotations

from .options import Retries, Timeouts
from .settings import Settings
from .shrink import PictureLimits

# docs/protocol.md, "Limits".
HTTP_BODY_BYTES = 32 * 1024 * 1024
SAGEMAKER_BODY_BYTES = 6 * 1024 * 1024


def is_http(name_or_url: str) -> bool:
    """Return whether this is a URL. Any other string is the name of a SageMaker endpoint."""
    return name_or_url.lower().startswith(("http://", "https://"))


def settings_of(
    name_or_url: str,
    *,
    timeouts: Timeouts,
    retries: Retries,
    session_token: str | None,
    max_side_px: int,
    max_body_bytes: int | None,
) -> Settings:
    """Return the settings of the chats at this address."""
    is_direct = is_http(name_or_url)
    body_bytes = max_body_bytes or (HTTP_BODY_BYTES if is_direct else SAGEMAKER_BODY_BYTES)
    confirm_s = None if is_direct else timeouts.confirm_s
    return Settings(timeouts, retries, PictureLimits(max_side_px), body_bytes, session_token, confirm_s)
