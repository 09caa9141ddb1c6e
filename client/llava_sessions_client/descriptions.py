"""Where a session is: the reply to `describe_session`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from .errors import ConnectionFailed
from .wire import Body, time_of

Residency = Literal["resident", "offloaded", "cold"]


@dataclass(frozen=True)
class Description:
    """A session as the server has it now. docs/protocol.md, "Describe", has the meaning of the fields."""

    residency: Residency
    expires_at: datetime | None
    is_answering: bool
    cached_tokens: int
    kv_bytes: int
    offloaded_bytes: int
    features_bytes: int


def description_of(facts: Body) -> Description:
    """Return the description of a reply. Raise `ConnectionFailed` if the reply is something else."""
    try:
        memory = facts["memory"]
        return Description(
            residency=facts["residency"],
            expires_at=time_of(facts["expires"]),
            is_answering=facts["is_answering"],
            cached_tokens=facts["cached_tokens"],
            kv_bytes=memory["kv_bytes"],
            offloaded_bytes=memory["offloaded_bytes"],
            features_bytes=memory["features_bytes"],
        )
    except (KeyError, TypeError):
        raise ConnectionFailed("the reply must be a description of the session, got something else") from None
