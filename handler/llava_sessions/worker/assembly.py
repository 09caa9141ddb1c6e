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
from .engines import CommandSink, EngineGate
from .exporter import Histograms
from .inbox import Inbox
from .manager import SessionManager
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
    """Choices of the operator.

    `share_pictures`: as in `PromptBuilder`. `allow_system`: clients may send system messages. `served`: the model as
    OpenAI's clients see it. `places`: sequences that the frontend can hold; None for the least.
    """

    share_pictures: bool = True
    allow_system: bool = True
    served: ServedModel = field(default_factory=ServedModel)
    places: int | None = None


def make_pump(
    *,
    client: CommandSink,
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
    """Build a pump. Call its `recover` before the first row. `histograms` observe the turns.

    `executor` runs the preparations and `parsing` parses large bodies, instead of threads. `fetch` replaces the HTTP
    client. All three are for tests.
    """
    timing = timing or Timing()
    policy = policy or Policy()
    preparer = Preparer(template, media_limits, journal, timing.clock, executor, fetch, policy.share_pictures)
    context = WorkerContext(
        gate=EngineGate(client),
        table=table,
        preparer=preparer,
        journal=journal,
        inbox=inbox,
        context_tokens=context_tokens,
        clock=timing.clock,
        monotonic=timing.monotonic,
        served=policy.served,
        counters=Counters(histograms=histograms or Histograms()),
    )
    manager = SessionManager(context)
    return Pump(
        manager,
        inbox,
        _reaper(ender, table.max_sessions, policy.places, timing),
        Arrivals(inbox, limits, max_body_bytes(limits, media_limits), parsing, policy.allow_system),
        wait_s=timing.wait_s,
        close_wait_s=timing.close_wait_s,
        clock=timing.monotonic,
    )


def _reaper(ender: SequenceEnder, max_sessions: int, places: int | None, timing: Timing) -> SequenceReaper:
    """Return a reaper that lets half of the places that sessions leave free wait for the end of their sequence."""
    places_left = (places or frontend_capacity(max_sessions)) - max_sessions
    return SequenceReaper(ender, max_waiting=places_left // 2, clock=timing.monotonic)
