"""Owns what the pump deals in: a request as it comes, what it waits for, what it is answered, and the doors it is sent
through.

Must not know what any of it means: the pump decides. No torch, no TorchServe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import protocol
from .conversation import Conversation
from .engine.messages import Command
from .records import Blob
from .sessions import Session


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
    content_type: str = protocol.JSON_TYPE
    headers: dict[str, str] = field(default_factory=dict)


class SequenceEnd(Protocol):
    """Has the frontend end a sequence, by a request with the header `mark` (its name in lower case, and its value).

    `able`: whether the frontend takes such requests; `pending`: sequences that it has still to end.
    """

    mark: tuple[str, str]
    able: bool
    pending: int

    def end(self, sequence_id: str) -> None:
        """Have the sequence ended soon."""


class EngineDoor(Protocol):
    """Where commands go."""

    def submit(self, command: Command) -> None:
        """Hand a command over; what comes of it arrives as a `Report` in the pump's inbox."""


@dataclass(eq=False)
class Entry:
    """An active row and what it waits for.

    `steps` counts the steps that ended without its last reply; `lines` are streamed text not yet sent; `final` is its
    last reply, once known. `gone`: its client has left.
    """

    row: Row
    steps: int = 0
    streamed: bool = False
    head_sent: bool = False
    gone: bool = False
    lines: list[str] = field(default_factory=list)
    final: Reply | None = None


@dataclass(eq=False)
class Turn:
    """A running turn. `entries` are the rows that wait for it: more than one where a request was repeated.

    Until it is `submitted`, the engine knows nothing of it. `rebuilding`: its session is brought back with it;
    `finished`: its answer is complete, and being stored.
    """

    id: str
    session: Session[Conversation]
    ask: protocol.Ask
    entries: list[Entry]
    submitted: bool = False
    rebuilding: bool = False
    finished: bool = False
    prompt_ids: list[int] = field(default_factory=list)
    blobs: tuple[Blob, ...] = ()
    waiting_cancels: list[Entry] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
