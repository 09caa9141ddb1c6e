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
from .context import WorkerContext
from .marks import confirm
from .openings import outcome_of
from .pending import session_moved
from .sessions import Turn, TurnState
from .turns import Turns

log = logging.getLogger(__name__)


class Answers:
    """Streams, stores and acknowledges answers."""

    def __init__(self, context: WorkerContext, turns: Turns) -> None:
        self._context = context
        self._turns = turns

    def on_admitted(self, event: TurnAdmitted) -> None:
        """Commit the large requests of a turn that the engine has admitted to status 200."""
        turn = self._turns.find(event.turn_id)
        if turn is not None:
            turn.is_admitted = True
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
        session.engine_losses = 0
        token_ids = event.answer_ids if turn.ask.return_token_ids else None
        facts = replies.answer_facts(session.id, event.reason, event.usage, event.timings, token_ids)
        record = TurnRecord(turn.prompt_ids, event.kept_ids, turn.blobs, turn.ask.stored_key, event.text, facts)
        turn.record = record
        session.known_transcript.append(record)
        saved = self._context.journal.save(session.known_transcript)
        turns = len(session.known_transcript.turns)
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
        if turn.ask.retry_key is not None and turn.ask.stored_key is None:
            session.add_labelled(turn.ask.retry_key, len(session.known_transcript.turns) - 1, self._context.clock())
        self._context.counters.turns += 1
        facts = answer_facts(self._context.journal, record, durable)
        confirm(turn)
        self._turns.end(turn)
        for pending in turn.pending:
            pending.answer(record.text, facts)
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
