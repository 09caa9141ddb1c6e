"""Rows of a TorchServe batch, and the replies to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..protocol.constants import JSON_TYPE


@dataclass(frozen=True)
class Row:
    """One entry of a TorchServe batch.

    `sequence_id` is TorchServe's ID of the session. `fresh` is true if the frontend made that ID for this request.
    `headers` are the client's headers, with names in lower case. `body` is as TorchServe delivers it: bytes, text, or
    decoded JSON. A held row has its body in every batch; after the first chunk of its reply the body is empty.
    """

    request_id: str
    sequence_id: str
    fresh: bool
    headers: Mapping[str, str]
    body: Any


@dataclass
class Reply:
    """The reply to a row in one step: a whole answer (`more` is None), a chunk (True) or the last chunk (False).

    TorchServe sends status, content type and headers of the first chunk only.
    """

    body: str
    more: bool | None = None
    status: int = 200
    content_type: str = JSON_TYPE
    headers: dict[str, str] = field(default_factory=dict)
