"""Answers: from the engine's first text to the reply of a stored turn.

All methods run on the pump's thread, under its lock. Events may arrive after their turn has ended.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from functools import partial
from typing import Any

from ..chat.transcript import TurnRecord, short_id
from ..ipc.messages import Delta, Finished, TurnAdmitted
from ..journal.journal import Journal, SaveOutcome
from ..protocol import replies
from ..protocol.requests import Ask
from .context import WorkerContext
from .conversations import Conversations
from .marks import confirm
from .openings import outcome_of
from .pending import session_moved
from .sessions import Turn
from .states import TurnState
from .turns import Turns

log = logging.getLogger(__name__)


class Answers:
    """Streams, stores and acknowledges answers."""

    def __init__(self, context: WorkerContext, turns: Turns, conversations: Conversations) -> None:
        self._context = context
        self._turns = turns
        self._conversations = conversations

    def on_admitted(self, event: TurnAdmitted) -> None:
        """Commit the large requests of a turn that the engine has admitted to status 200."""
        turn = self._turns.find(event.turn_id)
        if turn is not None:
            turn.is_admitted = True
            if self._context.placement.are_several:
                turn.ask = turn.ask.without_pictures()  # it is not placed again any more
            if turn.may_commit:
                for pending in turn.pending:
                    pending.commit()

    def on_delta(self, event: Delta) -> None:
        """Stream new text."""
        turn = self._turns.find(event.turn_id)
        if turn is not None:
            turn.chunks.append(event.text)
            if turn.is_owned:
                for pending in turn.pending:
                    pending.stream(event.text)

    def on_finished(self, event: Finished) -> None:
        """Append a finished turn to the transcript, and store it."""
        turn = self._turns.find(event.turn_id)
        if turn is None:
            return
        turn.advance(TurnState.STORING)
        session = turn.session
        session.picture_keys = turn.picture_keys
        session.engine_losses = 0
        self._context.counters.add_tokens(event.usage)
        self._context.counters.add_times(event.usage, event.timings, turn.submitted_s - turn.arrived_s)
        wants_ids = isinstance(turn.ask, Ask) and turn.ask.return_token_ids
        token_ids = event.answer_ids if wants_ids else None
        facts = replies.answer_facts(session.id, event.reason, event.usage, event.timings, token_ids)
        record = TurnRecord(
            prompt_ids=turn.prompt_ids,
            answer_ids=event.kept_ids,
            pictures=turn.media.pictures,
            retry_key=turn.ask.stored_key,
            text=event.text,
            facts=facts,
            base_turns=turn.base_turns,
            groups=turn.media.groups,
            clips=turn.media.clips,
        )
        turn.record = record
        if turn.prompt is not None:
            self._conversations.finished(session, turn.prompt, turn.kept_tokens, event.kept_ids)
            self._reply(turn, record, durable=False)
            return
        session.known_transcript.append(record)
        saved = self._context.journal.save(session.known_transcript)
        turns = len(session.known_transcript.log)
        self._context.inbox.when_done(saved, partial(self._saved, turn, record, turns))

    def overdue(self, turn: Turn) -> None:
        """Reply to a turn that is still being stored when its time is over: it is not durable yet."""
        if turn.record is not None:
            self._reply(turn, turn.record, durable=False)

    def _saved(self, turn: Turn, record: TurnRecord, turns: int, saved: Future[SaveOutcome]) -> None:
        """Reply to a turn that is stored, or could not be stored. `turns`: those that the save covers.

        A turn that is done already was answered at its deadline, or has failed.
        """
        session = turn.session
        outcome = outcome_of(saved)
        if outcome is SaveOutcome.NOT_OWNER:
            self._turns.lose_session(session, "moved")
            if not turn.is_in(TurnState.DONE):
                self._turns.fail(turn, session_moved())
            return
        if outcome is SaveOutcome.STORED:
            session.stored_turns = max(session.stored_turns, turns)
        if not turn.is_in(TurnState.DONE):
            self._reply(turn, record, durable=outcome is SaveOutcome.STORED)

    def _reply(self, turn: Turn, record: TurnRecord, durable: bool) -> None:
        session = turn.session
        is_labelled = turn.ask.retry_key is not None and turn.ask.stored_key is None
        if turn.ask.retry_key is not None and is_labelled and session.conversation is None:
            session.add_labelled(turn.ask.retry_key, len(session.known_transcript.log) - 1, self._context.clock())
        self._context.counters.turns += 1
        facts = answer_facts(self._context.journal, record, durable)
        confirm(turn)
        self._turns.end(turn)
        for pending in turn.pending:
            pending.answer(record.text, facts)
        self._context.counters.add_duration(self._context.monotonic() - turn.arrived_s)
        usage = facts["usage"]
        timings = facts["timings"]
        log.info(
            "turn_done session=%s reason=%s prompt=%d cached=%d answer=%d ttft_ms=%s total_ms=%s",
            short_id(session.id),
            facts["finish_reason"],
            usage["prompt_tokens"],
            usage["cached_tokens"],
            usage["completion_tokens"],
            timings["ttft_ms"],
            timings["total_ms"],
        )


def answer_facts(journal: Journal, record: TurnRecord, durable: bool) -> dict[str, Any]:
    """Return the facts of an answer's reply. `durable` is omitted if there is no journal."""
    return {**record.facts, "durable": durable} if journal.durable else record.facts
