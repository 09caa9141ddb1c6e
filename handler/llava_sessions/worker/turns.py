"""Owns the life of a turn: from the question, by way of its pictures, the engine and the journal, to its last words.

Also where a session that the engine does not hold is rebuilt: its next turn brings it back. Must not know how rows are
exchanged, nor opens; no torch, no TorchServe.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from functools import partial

from ..chat.transcript import Conversation, TurnRecord, short_id
from ..errors import Refused
from ..ipc.messages import AskSession, Delta, Finished, Sampling, StopTurn
from ..protocol import replies
from ..protocol.requests import Ask, Cancel
from .context import WorkerContext
from .openings import digest_of, succeeded
from .pending import PendingRequest, Turn
from .preparation import Question
from .sessions import Session
from .telling import refuse_turn, tell_cancelled, tell_end, tell_turn, tell_words

log = logging.getLogger(__name__)

# Engines that may die in a row while a session is answering.
MOST_LOSSES = 5


class Turns:
    """All running turns, by the request id of their first row."""

    def __init__(self, desk: WorkerContext) -> None:
        self._desk = desk
        self._turns: dict[str, Turn] = {}

    def start(self, entry: PendingRequest, ask: Ask) -> None:
        """Take a question. Raises `Refused`."""
        desk = self._desk
        session = desk.table.get(ask.session_id, desk.clock(), digest_of(ask.session_token))
        entry.streamed = ask.stream
        if ask.retry_key is not None and self._asked_before(entry, session, ask.retry_key):
            return
        desk.check_taking_work()
        turn_id = entry.row.request_id
        desk.table.begin_turn(session, turn_id)
        turn = self._turns[turn_id] = Turn(turn_id, session, ask, [entry])
        try:
            if session.in_engine and not ask.pictures:
                self._submit(turn, Question(desk.preparer.prompt(session.conversation, ask.prompt_text)))
                return
            question = desk.preparer.ask(ask, session.conversation, None if session.in_engine else session.story)
        except Exception:
            self._end(turn)
            raise
        question.add_done_callback(lambda done: desk.post(partial(self._prepared, turn, done)))

    def cancel(self, entry: PendingRequest, request: Cancel) -> None:
        """Take a cancel. Raises `Refused`."""
        session = self._desk.table.get(request.session_id, self._desk.clock(), digest_of(request.session_token))
        turn = self._turns.get(session.turn_id)
        if turn is None:
            tell_cancelled(entry, session.id, had_turn=False)
            return
        turn.waiting_cancels.append(entry)
        self._stop(turn)

    def left(self, entry: PendingRequest) -> None:
        """A row's client left: what only it waited for ends."""
        for turn in list(self._turns.values()):
            if entry in turn.entries:
                turn.entries.remove(entry)
                if not turn.entries:
                    log.info("client_left session=%s", short_id(turn.session.id))
                    self._stop(turn)

    def closing(self, session: Session[Conversation]) -> None:
        """The session is being closed: what the engine does not know of ends here."""
        turn = self._turns.get(session.turn_id)
        if turn is not None and not turn.submitted:
            self._cancelled(turn, "cancelled")

    def cut_all(self, reason: str) -> None:
        """End all turns with what they have."""
        for turn in list(self._turns.values()):
            if not turn.submitted:
                self._cancelled(turn, reason)
            elif not turn.finished:
                self._desk.submit(StopTurn(turn.id, reason, keep_answer=True))

    def engine_lost(self) -> None:
        """Refuse what the engine was doing; answers that are known are still stored and told.

        A session that was there each time may be what kills it: it is ended for the sake of all others.
        """
        for turn in list(self._turns.values()):
            if turn.submitted and not turn.finished:
                self._fail(turn, self._desk.restarting())
                turn.session.losses += 1
                if turn.session.losses == MOST_LOSSES and not turn.session.closing:
                    log.error("session_failed session=%s engines_lost=%d", short_id(turn.session.id), MOST_LOSSES)
                    self._desk.forget(turn.session, "failed")
                    self._desk.sequences.end(turn.session.id)

    # --- what the engine tells; of turns that have ended meanwhile it may tell still ---

    def delta(self, event: Delta) -> None:
        """Text that became certain."""
        turn = self._turns.get(event.turn_id)
        if turn is not None:
            turn.text.append(event.text)
            for entry in turn.entries:
                tell_words(entry, event.text)

    def finished(self, event: Finished) -> None:
        """A turn is complete: it is stored, then told."""
        turn = self._turns.get(event.turn_id)
        if turn is None:
            return
        turn.finished, session = True, turn.session
        session.losses = 0
        session.conversation.commit(turn.prompt_ids, event.kept_ids)
        usage, timings = vars(event.usage), {name: round(ms, 1) for name, ms in vars(event.timings).items()}
        ids = event.answer_ids if turn.ask.return_token_ids else None
        facts = replies.answer_facts(session.id, event.reason, usage, timings, ids)
        record = TurnRecord(turn.prompt_ids, event.kept_ids, turn.blobs, turn.ask.retry_key, event.text, facts)
        session.story.turns.append(record)
        self._desk.when_done(self._desk.journal.save(session.story), partial(self._saved, turn, record))

    def cancelled(self, turn_id: str, reason: str) -> None:
        """A turn ended as if it had not been."""
        turn = self._turns.get(turn_id)
        if turn is not None:
            self._cancelled(turn, reason)

    def failed(self, turn_id: str, error: Exception) -> None:
        """A turn ended by an error."""
        turn = self._turns.get(turn_id)
        if turn is not None:
            self._fail(turn, error)

    def not_rebuilt(self, session: Session[Conversation], error: Exception) -> bool:
        """The engine could not take a session back. False where none of its turns asked for that."""
        session.in_engine = False
        turn = self._turns.get(session.turn_id)
        if turn is None or not turn.rebuilding:
            return False
        self._fail(turn, error)
        return True

    # --- steps ---

    def _asked_before(self, entry: PendingRequest, session: Session[Conversation], retry_key: str) -> bool:
        """Answer a repeated ask by the answer that is known, or with the one that is being made."""
        running = self._turns.get(session.turn_id)
        if running is not None and running.ask.retry_key == retry_key:
            running.entries.append(entry)
            tell_words(entry, "".join(running.text))
        elif retry_key in session.answers:
            text, facts = session.answers[retry_key]
            tell_words(entry, text)
            tell_end(entry, text, facts)
        else:
            return False
        return True

    def _prepared(self, turn: Turn, question: Future[Question]) -> None:
        """The question is ready, or can't be put."""
        if turn.id not in self._turns:
            return  # it was cancelled, or its client has left
        try:
            done = question.result()
            if done.story is not None:
                self._recover(turn.session, done)
                if turn.ask.retry_key in turn.session.answers:
                    self._answer_again(turn)
                    return
            self._submit(turn, done)
        except Exception as error:
            self._fail(turn, error)
            if turn.session.conversation is None and isinstance(error, Refused) and error.code == "session_not_found":
                self._desk.forget(turn.session, "damaged", stored=False)

    def _recover(self, session: Session[Conversation], question: Question) -> None:
        """The journal has told what was said in the session before."""
        session.story, session.conversation = question.story, question.chat.conversation()
        for record in question.story.turns:
            if record.retry_key is not None:
                session.keep_answer(record.retry_key, (record.text, self._facts(record, durable=True)))

    def _answer_again(self, turn: Turn) -> None:
        text, facts = turn.session.answers[turn.ask.retry_key]
        self._end(turn)
        for entry in turn.entries:
            tell_words(entry, text)
            tell_end(entry, text, facts)

    def _submit(self, turn: Turn, question: Question) -> None:
        """Hand a turn to the engine, if the context has room for it; its session before it, where that is not there."""
        desk, session, ask = self._desk, turn.session, turn.ask
        desk.check_fits(len(session.conversation.token_ids) + len(question.prompt_ids) + 1)
        if not session.in_engine:
            if question.chat is None:
                raise desk.restarting()  # the engine was lost while the pictures were loaded
            desk.submit(question.chat.command(session.id))
            session.in_engine = turn.rebuilding = True
            desk.rebuilds_total += 1
        turn.prompt_ids, turn.blobs = question.prompt_ids, question.blobs
        sampling = Sampling(ask.max_new_tokens, ask.temperature, ask.top_p, ask.seed, ask.stop, ask.deadline_ms)
        desk.submit(AskSession(session.id, turn.id, question.prompt_ids, sampling, question.pictures))
        turn.submitted = True

    def _saved(self, turn: Turn, record: TurnRecord, saved: Future[bool]) -> None:
        """The turn is stored, or is not; either way its answer is told, and says which."""
        self._desk.turns_total += 1
        facts = self._facts(record, durable=succeeded(saved))
        session = turn.session
        if record.retry_key is not None:
            session.keep_answer(record.retry_key, (record.text, facts))
        self._end(turn)
        tell_turn(turn, facts)
        usage, timings = facts["usage"], facts["timings"]
        counts = f"prompt={usage['prompt_tokens']} cached={usage['cached_tokens']} answer={usage['completion_tokens']}"
        times = f"ttft_ms={timings['ttft_ms']} total_ms={timings['total_ms']}"
        log.info("turn_done session=%s reason=%s %s %s", short_id(session.id), facts["finish_reason"], counts, times)

    def _facts(self, record: TurnRecord, durable: bool) -> dict:
        return {**record.facts, "durable": durable} if self._desk.journal.durable else record.facts

    def _stop(self, turn: Turn) -> None:
        """End a turn before its time: by the engine, if that has it already."""
        if not turn.submitted:
            self._cancelled(turn, "cancelled")
        elif not turn.finished:
            self._desk.submit(StopTurn(turn.id, "cancelled", keep_answer=False))

    def _cancelled(self, turn: Turn, reason: str) -> None:
        self._end(turn, cancelled=True)
        tell_turn(turn, {"session_id": turn.session.id, "finish_reason": reason})

    def _fail(self, turn: Turn, error: Exception) -> None:
        self._end(turn)
        refuse_turn(self._desk, turn, error)

    def _end(self, turn: Turn, cancelled: bool = False) -> None:
        del self._turns[turn.id]
        turn.session.turn_id = None
        turn.session.used_at_s = self._desk.clock()
        for entry in turn.waiting_cancels:
            tell_cancelled(entry, turn.session.id, had_turn=cancelled)
