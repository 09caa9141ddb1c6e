"""Builds a worker's pump from its parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

from ..config import MediaLimits, RequestLimits, frontend_capacity, max_body_bytes
from ..journal.journal import Journal
from ..text.chat_template import ChatTemplate
from ..torchserve.sequences import SequenceEnder, SequenceReaper
from .arrivals import Arrivals
from .context import ServedModel, WorkerContext
from .counters import Counters
from .engine_set import EngineSet
from .exporter import Histograms
from .inbox import Inbox
from .manager import SessionManager
from .placement import Placement
from .preparation import Preparer
from .pump import CLOSE_WAIT_S, WAIT_S, Pump
from .sessions import SessionTable


@dataclass(frozen=True)
class Timing:
    """Clocks and waits. `clock`: seconds since the epoch. `monotonic`: seconds. Waits as in `Pump`."""

    clock: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    wait_s: float = WAIT_S
    close_wait_s: float = CLOSE_WAIT_S


@dataclass(frozen=True)
class Policy:
    """Choices of the operator. `share_pictures`: as in `PromptBuilder`. `allow_system`: system messages are accepted.

    `served`: the model as OpenAI's clients see it. `places`: sequences that the frontend can hold; None for the least.
    `adopt_sessions`: take over sessions of other instances from the journal, if there is one.
    """

    share_pictures: bool = True
    allow_system: bool = True
    served: ServedModel = field(default_factory=ServedModel)
    places: int | None = None
    adopt_sessions: bool = True


def make_pump(
    *,
    engines: EngineSet,
    inbox: Inbox,
    template: ChatTemplate,
    table: SessionTable,
    context_tokens: int,
    limits: RequestLimits,
    media_limits: MediaLimits,
    ender: SequenceEnder,
    journal: Journal,
    histograms: Histograms | None = None,
    timing: Timing | None = None,
    executor: Executor | None = None,
    parsing: Executor | None = None,
    fetch: Callable[[str, MediaLimits], bytes] | None = None,
    policy: Policy | None = None,
) -> Pump:
    """Build a pump. Call its `recover` before the first row. The engines' items reach the inbox as `FromEngine`.

    For tests, `executor` runs the preparations, `parsing` parses large bodies, and `fetch` replaces the HTTP client.
    """
    timing = timing or Timing()
    policy = policy or Policy()
    table.may_release_stored = adopts = policy.adopt_sessions and journal.durable
    share = policy.share_pictures
    preparer = Preparer(template, media_limits, journal, timing.clock, executor, fetch, share, adopts=adopts)
    context = WorkerContext(
        engines=engines,
        placement=Placement(engines, table),
        table=table,
        preparer=preparer,
        journal=journal,
        inbox=inbox,
        context_tokens=context_tokens,
        clock=timing.clock,
        monotonic=timing.monotonic,
        adopts=adopts,
        served=policy.served,
        counters=Counters(histograms=histograms or Histograms()),
    )
    return Pump(
        SessionManager(context),
        inbox,
        _reaper(ender, policy.places or frontend_capacity(table.max_sessions), table, timing),
        Arrivals(inbox, limits, max_body_bytes(limits, media_limits), parsing, policy.allow_system),
        wait_s=timing.wait_s,
        close_wait_s=timing.close_wait_s,
        clock=timing.monotonic,
    )


def _reaper(ender: SequenceEnder, places: int, table: SessionTable, timing: Timing) -> SequenceReaper:
    """Build a reaper. Of the places that sessions leave, at most half may wait for the end of their sequence."""
    return SequenceReaper(ender, max_waiting=(places - table.max_sessions) // 2, clock=timing.monotonic)
