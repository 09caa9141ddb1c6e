"""What all chats of an endpoint share."""

from __future__ import annotations

from dataclasses import dataclass

from .options import Retries, Timeouts
from .shrink import PictureLimits


@dataclass(frozen=True)
class Settings:
    """What all chats of an endpoint share.

    `max_body_bytes`: of one request. `confirm_s`: as in `Timeouts` if opens need a confirmation, else None.
    """

    timeouts: Timeouts
    retries: Retries
    limits: PictureLimits
    max_body_bytes: int
    session_token: str | None = None
    confirm_s: int | None = None
