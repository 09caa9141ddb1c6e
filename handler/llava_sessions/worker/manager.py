"""Dispatch of requests and of the inbox; expiry, drain and recovery."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from ..chat.transcript import short_id
from ..errors import Refused
from ..ipc.messages import Report
from ..metrics import MetricValues
from ..protocol.openai import Chat, Models
from ..protocol.parsing import Request
from ..protocol.requests import Ask, Cancel, Close, Describe, Open
from .adoption import Adoption
from .answers import Answers
from .chats import Chats
from .closes import Closes, expire
from .context import WorkerContext
from .conversations import Conversations
from .descriptions import Descriptions
from .engine_metrics import engine_values
from .engines import EngineLost, EngineUp, FromEngine
from .events import EngineEvents
from .marks import TurnMarks
from .openings import Openings, unload
from .pending import PendingRequest, session_moved
from .questions import Questions
from .recovery import Recovery
from .sessions import expired_sessions
from .states import TurnState
from .turns import Turns

log = logging.getLogger(__name__)

# How often expired journals are searched for. The journals of sessions in the table are removed with the session.
JOURNAL_SWEEP_S = 60.0
# A platform that stops a container gives it 30 s. The launcher waits 26 s for the last lines of the answers
# (deploy/serve/service.py); they are to leave before that, so many seconds after the drain began.
LAST_LINES_S = 25.0
# Time for storing answers, and between two sweeps.
_CUT_MARGIN_S = 1.5
# Running turns may go on for at least so long, however long the engine's steps are.
_SHORTEST_DRAIN_S = 5.0


class SessionManager:
    """Owns all sessions of one worker. All methods run on the pump's thread, under its lock, except `drain`."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._openings = Openings(context)
        self._recovery = Recovery(context, self._openings)
        self._conversations = Conversations(context)
        self._turns = Turns(context, self._conversations)
        self._marks = TurnMarks(context, self._turns)
        self._questions = Questions(context, self._turns, self._marks)
        self._chats = Chats(context, self._turns, self._conversations, self._questions)
        self._closes = Closes(context, self._openings, self._turns)
        self._answers = Answers(context, self._turns, self._conversations)
        self._descriptions = Descriptions(context)
        self._events = EngineEvents(
            context,
            openings=self._openings,
            turns=self._turns,
            answers=self._answers,
            closes=self._closes,
            conversations=self._conversations,
            descriptions=self._descriptions,
        )
        self._adoption = Adoption(context, self.handle)
        self._journal_swept_s = context.monotonic()

    def recover(self) -> None:
        """Add the sessions that the journal holds. Call it once, before the first row. Blocks."""
        self._recovery.run()

    def handle(self, pending: PendingRequest, request: Request) -> None:
        """Start the work of a request. Raise `Refused` if it is rejected at once."""
        try:
            match request:
                case Open():
                    self._openings.start(pending, request)
                case Ask():
                    self._questions.start(pending, request)
                case Chat():
                    self._chats.start(pending, request)
                case Models():
                    pending.reply(request.body(self._context.served.name, self._context.served.since_s))
                case Close():
                    self._closes.start(pending, request)
                case Cancel():
                    self._turns.cancel(pending, request)
                case Describe():
                    self._descriptions.start(pending, request)
        except Refused as error:
            if error.code != "session_not_found" or not self._adoption.start(pending, request):
                raise self._recovery.error_for(error) from None
        self._follow_up()

    def disconnected(self, pending: PendingRequest) -> None:
        """Stop the work that only this request's client waited for."""
        pending.disconnected = True
        self._turns.disconnected(pending)
        self._descriptions.disconnected(pending)
        self._follow_up()

    def on_event(self, item: FromEngine | Callable[[], None]) -> None:
        """Apply an item of the inbox. Never raises: an error is logged."""
        engines = self._context.engines
        try:
            match item:
                case FromEngine(engine, Report() as report):
                    engines.report(engine, report)
                    for event in report.events:
                        self._events.apply(engine, event)
                case FromEngine(engine, EngineLost() as lost):
                    engines.disconnect(engine, lost)
                    self._context.counters.engine_restarts += 1
                    self._events.engine_lost(engine)
                case FromEngine(engine, EngineUp() as up):
                    engines.connect(engine, up)
                    log.info("engine_up device=%s sessions=%d", engines.all[engine].label, len(self._context.table))
                case FromEngine():
                    raise TypeError(f"unexpected item {type(item.item).__name__}")
                case _:
                    item()
        except Exception:
            log.exception("item_failed item=%s", type(item).__name__)
        self._follow_up()

    def end_overdue(self) -> None:
        """End the turns whose deadline passed before the engine got them, or while their answer is being stored.

        The engine ends those that it works on.
        """
        now_s = self._context.monotonic()
        for turn in self._turns.all():
            if not turn.is_overdue(now_s):
                continue
            if turn.is_in(TurnState.PREPARING):
                self._turns.cancelled(turn, "deadline")
            elif turn.is_in(TurnState.STORING):
                self._answers.overdue(turn)
        self._marks.renew()
        self._follow_up()

    def sweep(self) -> None:
        """Expire sessions, sweep the journal, and end turns that outlast the drain. Call it about once a second."""
        context = self._context
        for session in expired_sessions(context.table, context.clock()):
            if self._openings.holds(session):
                continue  # it expires after its acknowledgement
            if session.conversation is not None:
                log.info("session_expired session=%s", short_id(session.id))
                self._conversations.drop(session)
            else:
                expire(context, session)
        self._recovery.retry()
        self.end_overdue()
        now_s = context.monotonic()
        if now_s - self._journal_swept_s > JOURNAL_SWEEP_S:
            self._journal_swept_s = now_s
            context.journal.sweep(context.clock())
        draining_since_s = context.engines.draining_since_s
        if draining_since_s is None:
            return
        for turn in self._turns.all():
            if now_s - draining_since_s >= _cut_s(context.engines.longest_step_s):
                self._turns.stop(turn, "shutdown", keep_answer=True)
            if now_s - draining_since_s >= LAST_LINES_S and turn.is_in(TurnState.STORING):
                self._answers.overdue(turn)  # the journal is slow

    def drain(self) -> None:
        """Take no new work from now on. Takes no lock, so a signal handler may call it."""
        if self._context.engines.draining_since_s is None:
            self._context.engines.draining_since_s = self._context.monotonic()

    @property
    def drained(self) -> bool:
        """Whether a drain was asked for and everything is stored."""
        is_draining = self._context.engines.draining_since_s is not None
        return is_draining and self._context.journal.flush(timeout_s=0)

    def waits_for_close(self, has_output: bool) -> bool:
        """Return whether a step goes on until an engine has freed a session whose close arrived in the step.

        `has_output`: of any request. Output of one engine does not wait for another engine.
        """
        return self._closes.freeing and not (has_output and self._context.placement.are_several)

    def take_ended_sequences(self) -> list[str]:
        """Return the sequences of the sessions that have ended since the last call."""
        return self._context.table.take_ended()

    def has_session(self, session_id: str) -> bool:
        """Return whether a session of this ID is opening, open or closing."""
        return session_id in self._context.table

    def metric_values(self) -> MetricValues:
        """Return all gauges and counters as of now."""
        context = self._context
        counters = context.counters
        turns = self._turns.all()
        implicit = len(self._conversations.all)
        preparing = sum(turn.is_in(TurnState.PREPARING) for turn in turns)
        return replace(
            engine_values(context.engines.all, preparing),
            open_sessions=len(context.table) - implicit,
            implicit_sessions=implicit,
            running_turns=len(turns),
            session_ttl_seconds=context.table.ttl_s,
            media_held_bytes=context.journal.blobs.held_bytes,
            opens_total=counters.opens,
            turns_total=counters.turns,
            prompt_tokens_total=counters.prompt_tokens,
            cached_tokens_total=counters.cached_tokens,
            generation_tokens_total=counters.generation_tokens,
            refusals_total=dict(counters.refusals),
            rebuilds_total=counters.rebuilds,
            engine_restarts_total=counters.engine_restarts,
            journal_failures_total=context.journal.failures_total,
        )

    def count_refusal(self, code: str) -> None:
        """Count a request that was answered with an error."""
        self._context.counters.refusals[code] += 1

    def _follow_up(self) -> None:
        """Drop sessions that the journal cannot give back, and start retries whose stopped turn is done."""
        for session, reason in self._turns.take_lost():
            if self._context.table.find(session.id) is session:
                log.warning("session_lost session=%s reason=%s", short_id(session.id), reason)
                # A turn may run here if the answer before it was not stored at its deadline.
                if session.turn is not None and not session.turn.is_in(TurnState.STORING):
                    self._turns.fail(session.turn, session_moved())
                unload(self._context, session)
                self._context.table.end(session, reason)
                self._closes.lost(session, reason)
        for pending, ask in self._turns.take_retries():
            if pending.disconnected:
                continue
            try:
                self.handle(pending, ask)
            except Exception as error:
                pending.refuse(error)
        self._marks.tidy()


def _cut_s(longest_step_s: float) -> float:
    """Return the time from the beginning of a drain until turns are stopped: a step that runs then must end."""
    return max(LAST_LINES_S - _CUT_MARGIN_S - longest_step_s, _SHORTEST_DRAIN_S)
