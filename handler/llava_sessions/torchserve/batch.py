"""Rows of a TorchServe batch, and the replies to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..protocol.constants import JSON_TYPE


@dataclass(frozen=True)
class Row:
    """One entry of a TorchServe batch.

    `sequence_id` is TorchServe's name for the session; `fresh` tells that the frontend made it for this very request.
    `headers` are the client's own, names in lower case.
    """

    request_id: str
    sequence_id: str
    fresh: bool
    headers: Mapping[str, str]
    body: Any


@dataclass
class Reply:
    """What a row is answered in this step. `more`: None for a whole answer, True for a chunk, False for the last."""

    body: str
    more: bool | None = None
    status: int = 200
    content_type: str = JSON_TYPE
    headers: dict[str, str] = field(default_factory=dict)
