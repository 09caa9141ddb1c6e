"""The life of a turn: question prepared, answered by the engine, stored, replied to.

A turn of a cold session rebuilds the session first. All methods run on the pump's thread, under its lock.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from functools import partial
from typing import Any

from ..chat.transcript import TurnRecord, short_id
from ..errors import Refused
from ..ipc.messages import AskSession, Delta, Finished, Sampling, StopTurn
from ..journal.journal import NotFound, SaveOutcome
from ..protocol import replies
from ..protocol.requests import Ask, Cancel
from .context import WorkerContext
from .openings import check_context, digest_of, outcome_of
from .pending import PendingRequest, session_moved
from .preparation import PreparedQuestion
from .sessions import MAX_ENGINE_LOSSES, Residency, Session, Turn, TurnState

log = logging.getLogger(__name__)


class Turns:
    """All turns that are not done, by the request ID of their first row."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._turns: dict[str, Turn] = {}
        self._retries: list[tuple[PendingRequest, Ask]] = []
        self._lost: list[tuple[Session, str]] = []

    def start(self, pending: PendingRequest, ask: Ask) -> None:
        """Start a turn, or answer a retried one. Raise `Refused`."""
        context = self._context
        session = context.table.get(ask.session_id, context.clock(), digest_of(ask.session_token))
        pending.streamed = ask.stream
        if ask.retry_key is not None and self._attach(pending, session, ask):
            return
        context.gate.check()
        if session.turn is not None:
            raise Refused("session_busy", "The session is still answering; wait for that answer or cancel it.")
        if session.engine_losses >= MAX_ENGINE_LOSSES:
            message = f"The last {MAX_ENGINE_LOSSES} turns of the session each ended the engine; close the session."
            raise Refused("internal", message)
        turn = Turn(session, ask, pending)
        session.turn = self._turns[turn.id] = turn
        try:
            if session.in_engine and not ask.pictures:
                prompt_ids = context.preparer.prompt(session.transcript.opened_on, ask.prompt_text)
                self._submit(turn, PreparedQuestion(prompt_ids))
                return
            self._prepare(turn)
        except Exception:
            self._end(turn)
            raise

    def cancel(self, pending: PendingRequest, request: Cancel) -> None:
        """Stop the session's turn. Raise `Refused`."""
        context = self._context
        session = context.table.get(request.session_id, context.clock(), digest_of(request.session_token))
        if session.turn is None:
            pending.reply(replies.cancelled(session.id, False))
            return
        session.turn.cancels.append(pending)
        self.stop(session.turn, "cancelled")

    def disconnected(self, pending: PendingRequest) -> None:
        """Stop the turn that only a disconnected client waited for."""
        for turn in list(self._turns.values()):
            turn.retries = [retry for retry in turn.retries if retry[0] is not pending]
            if pending in turn.pending:
                turn.pending.remove(pending)
                if not turn.pending:
                    log.info("client_left session=%s", short_id(turn.session.id))
                    self.stop(turn, "cancelled")

    def stop(self, turn: Turn, reason: str, keep_answer: bool = False) -> None:
        """End a turn early. With `keep_answer` the tokens so far become the answer."""
        if turn.is_in(TurnState.PREPARING):
            self._cancelled(turn, reason)
        elif turn.is_in(TurnState.RUNNING):
            turn.advance(TurnState.STOPPING)
            self._context.gate.submit_if_connected(StopTurn(turn.id, reason, keep_answer))

    def stop_all(self, reason: str) -> None:
        """End all turns early, with the tokens that they have."""
        for turn in list(self._turns.values()):
            self.stop(turn, reason, keep_answer=True)

    def closing(self, session: Session) -> None:
        """End a turn that the engine does not know of, because its session is being closed."""
        if session.turn is not None and session.turn.is_in(TurnState.PREPARING):
            self._cancelled(session.turn, "cancelled")

    def unloaded(self, session: Session, error: Exception) -> None:
        """Fail the turn of a session that the engine does not hold any more. An answer that is being stored stays."""
        if session.turn is not None and session.turn.in_engine:
            self._fail(session.turn, error)

    def engine_lost(self) -> None:
        """Fail the turns that the lost engine worked on."""
        for turn in list(self._turns.values()):
            if turn.in_engine:
                session = turn.session
                session.engine_losses += 1
                if session.engine_losses == MAX_ENGINE_LOSSES:
                    log.error("session_rejected session=%s engines_lost=%d", short_id(session.id), MAX_ENGINE_LOSSES)
                self._fail(turn, self._context.gate.restarting())

    def take_retries(self) -> list[tuple[PendingRequest, Ask]]:
        """Return the retries whose stopped turn is done, to be started now."""
        retries = self._retries
        self._retries = []
        return retries

    def take_lost(self) -> list[tuple[Session, str]]:
        """Return the sessions that only a journal held and that it cannot give back, each with the reason."""
        lost = self._lost
        self._lost = []
        return lost

    # --- Events of the engine. They may arrive after the turn has ended. ---

    def delta(self, event: Delta) -> None:
        """Stream new text."""
        turn = self._turns.get(event.turn_id)
        if turn is not None:
            turn.chunks.append(event.text)
            for pending in turn.pending:
                pending.stream(event.text)

    def finished(self, event: Finished) -> None:
        """Append a finished turn to the transcript, and store it."""
        turn = self._turns.get(event.turn_id)
        if turn is None:
            return
        turn.advance(TurnState.STORING)
        session = turn.session
        session.engine_losses = 0
        usage = vars(event.usage)
        timings = {name: round(value_ms, 1) for name, value_ms in vars(event.timings).items()}
        token_ids = event.answer_ids if turn.ask.return_token_ids else None
        facts = replies.answer_facts(session.id, event.reason, usage, timings, token_ids)
        record = TurnRecord(turn.prompt_ids, event.kept_ids, turn.blobs, turn.ask.retry_key, event.text, facts)
        session.transcript.append(record)
        saved = self._context.journal.save(session.transcript)
        self._context.inbox.when_done(saved, partial(self._saved, turn, record))

    def cancelled(self, turn_id: str, reason: str) -> None:
        """End a turn that left its session unchanged."""
        turn = self._turns.get(turn_id)
        if turn is not None:
            self._cancelled(turn, reason)

    def failed(self, turn_id: str, error: Exception) -> None:
        """End a turn with an error."""
        turn = self._turns.get(turn_id)
        if turn is not None:
            self._fail(turn, error)

    # --- Steps ---

    def _attach(self, pending: PendingRequest, session: Session, ask: Ask) -> bool:
        """Answer a retried ask with the stored answer, or attach it to the running turn. Return False if it is new."""
        turn = session.turn
        if turn is not None and turn.ask.retry_key == ask.retry_key:
            if turn.is_in(TurnState.STOPPING):
                turn.retries.append((pending, ask))
            else:
                turn.pending.append(pending)
                pending.stream(turn.text)
            return True
        return self._answer_from_transcript([pending], session, ask)

    def _answer_from_transcript(self, waiting: list[PendingRequest], session: Session, ask: Ask) -> bool:
        transcript = session.transcript
        if transcript is None or ask.retry_key is None:
            return False
        index = transcript.find_answer(ask.retry_key)
        if index is None:
            return False
        record = transcript.turns[index]
        facts = self._facts(record, durable=index < session.stored_turns)
        for pending in waiting:
            pending.stream(record.text)
            pending.answer(record.text, facts)
        return True

    def _prepare(self, turn: Turn) -> None:
        """Prepare a question in the background."""
        session = turn.session
        preparer = self._context.preparer
        prepared = preparer.question(turn.ask, session.transcript, session.token_digest, session.in_engine)
        self._context.inbox.when_done(prepared, partial(self._prepared, turn))

    def _prepared(self, turn: Turn, prepared: Future[PreparedQuestion]) -> None:
        """Submit a question that is prepared, or reject it."""
        if not turn.is_in(TurnState.PREPARING):
            return  # it was cancelled, or its client has left
        try:
            question = prepared.result()
            session = turn.session
            if session.transcript is None and question.rebuild is not None:
                session.transcript = question.rebuild.transcript
                session.stored_turns = len(session.transcript.turns)
                if self._answer_from_transcript(turn.pending, session, turn.ask):
                    self._end(turn)
                    return
            self._submit(turn, question)
        except NotFound as error:
            self._fail(turn, error)
            self._lost.append((turn.session, "damaged" if error.damaged else "moved"))
        except Exception as error:
            self._fail(turn, error)

    def _submit(self, turn: Turn, question: PreparedQuestion) -> None:
        """Send a turn to the engine, with its session before it if the engine does not hold that."""
        context = self._context
        session = turn.session
        check_context(session.transcript.token_count + len(question.prompt_ids) + 1, context.context_tokens)
        if not session.in_engine:
            if question.rebuild is None:  # the engine lost the session during the preparation
                self._prepare(turn)
                return
            context.gate.submit(question.rebuild.command(session.id))
            session.advance(Residency.LOADING)
            context.counters.rebuilds += 1
        ask = turn.ask
        turn.prompt_ids = question.prompt_ids
        turn.blobs = question.blobs
        sampling = Sampling(ask.max_new_tokens, ask.temperature, ask.top_p, ask.seed, ask.stop, ask.deadline_ms)
        context.gate.submit(AskSession(session.id, turn.id, question.prompt_ids, sampling, question.pictures))
        turn.advance(TurnState.RUNNING)

    def _saved(self, turn: Turn, record: TurnRecord, saved: Future[SaveOutcome]) -> None:
        """Reply to a turn that is stored, or could not be stored."""
        if turn.is_in(TurnState.DONE):
            return
        session = turn.session
        outcome = outcome_of(saved)
        if outcome is SaveOutcome.NOT_OWNER:
            self._lost.append((session, "moved"))
            self._fail(turn, session_moved())
            return
        if outcome is SaveOutcome.STORED:
            session.stored_turns = len(session.transcript.turns)
        self._context.counters.turns += 1
        facts = self._facts(record, durable=outcome is SaveOutcome.STORED)
        self._end(turn)
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

    def _facts(self, record: TurnRecord, durable: bool) -> dict[str, Any]:
        return {**record.facts, "durable": durable} if self._context.journal.durable else record.facts

    def _cancelled(self, turn: Turn, reason: str) -> None:
        self._end(turn, cancelled=True)
        for pending in turn.pending:
            pending.answer(turn.text, {"session_id": turn.session.id, "finish_reason": reason})

    def _fail(self, turn: Turn, error: Exception) -> None:
        self._end(turn)
        for pending in turn.pending:
            pending.refuse(error)

    def _end(self, turn: Turn, cancelled: bool = False) -> None:
        turn.advance(TurnState.DONE)
        del self._turns[turn.id]
        turn.session.turn = None
        turn.session.used_at_s = self._context.clock()
        self._retries += turn.retries
        for pending in turn.cancels:
            pending.reply(replies.cancelled(turn.session.id, cancelled))
