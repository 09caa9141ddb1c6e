"""The collaborators that openings, turns and the manager share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..journal.journal import Journal
from .counters import Counters
from .engine_set import EngineSet
from .inbox import Inbox
from .placement import Placement
from .preparation import Preparer
from .sessions import SessionTable


@dataclass(frozen=True)
class ServedModel:
    """The model as OpenAI's clients see it. `fingerprint`: of the checkpoint. `since_s`: Unix time of the start."""

    name: str = "llava"
    fingerprint: str = ""
    since_s: float = 0.0


@dataclass(frozen=True)
class WorkerContext:
    """`placement` chooses a session's engine; `engines` sends commands.

    `clock`: seconds since the epoch. `monotonic`: seconds. `context_tokens` is the model's context length. `adopts`:
    sessions move between the instances of a shared journal.
    """

    engines: EngineSet
    placement: Placement
    table: SessionTable
    preparer: Preparer
    journal: Journal
    inbox: Inbox
    context_tokens: int
    clock: Callable[[], float]
    monotonic: Callable[[], float] = time.monotonic
    adopts: bool = False
    counters: Counters = field(default_factory=Counters)
    served: ServedModel = field(default_factory=ServedModel)
