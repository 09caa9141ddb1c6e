"""Builds a worker's pump from its parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

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
    share_pictures: bool = True,
    allow_system: bool = True,
    served: ServedModel | None = None,
    places: int | None = None,
) -> Pump:
    """Build a pump. Call its `recover` before the first row. `histograms` observe the turns.

    `executor` runs the preparations and `parsing` parses large bodies, instead of threads. `fetch` replaces the HTTP
    client. All three are for tests. `share_pictures`: as in `Preparer`. `allow_system`: whether a client may
    send system messages. `places`: sequences that the frontend can hold.
    """
    timing = timing or Timing()
    preparer = Preparer(template, media_limits, journal, timing.clock, executor, fetch, share_pictures)
    context = WorkerContext(
        gate=EngineGate(client),
        table=table,
        preparer=preparer,
        journal=journal,
        inbox=inbox,
        context_tokens=context_tokens,
        clock=timing.clock,
        monotonic=timing.monotonic,
        served=served or ServedModel(),
        counters=Counters(histograms=histograms or Histograms()),
    )
    manager = SessionManager(context)
    # The frontend has more places than sessions. At most half of the others may wait for the end of their sequence.
    places_left = (places or frontend_capacity(table.max_sessions)) - table.max_sessions
    reaper = SequenceReaper(ender, max_waiting=places_left // 2, clock=timing.monotonic)
    return Pump(
        manager,
        inbox,
        reaper,
        Arrivals(inbox, limits, max_body_bytes(limits, media_limits), parsing, allow_system),
        wait_s=timing.wait_s,
        close_wait_s=timing.close_wait_s,
        clock=timing.monotonic,
    )
