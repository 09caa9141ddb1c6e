"""Requests that wait for their last reply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from ..chat.transcript import Blob, Conversation
from ..ipc.messages import Command
from ..protocol.requests import Ask
from ..torchserve.batch import Reply, Row
from .sessions import Session


class EngineDoor(Protocol):
    """Where commands go."""

    def submit(self, command: Command) -> None:
        """Hand a command over; what comes of it arrives as a `Report` in the pump's inbox."""


@dataclass(eq=False)
class PendingRequest:
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
    ask: Ask
    entries: list[PendingRequest]
    submitted: bool = False
    rebuilding: bool = False
    finished: bool = False
    prompt_ids: list[int] = field(default_factory=list)
    blobs: tuple[Blob, ...] = ()
    waiting_cancels: list[PendingRequest] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
