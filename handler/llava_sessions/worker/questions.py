"""Questions: from a request to a turn that the engine works on.

A turn of a cold session rebuilds the session first. All methods run on the pump's thread, under its lock.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial

from ..errors import Refused
from ..ipc.messages import AskSession, Sampling
from ..journal.journal import AlreadyClaimed, NotFound
from ..protocol.requests import Ask
from .answers import answer_facts
from .context import WorkerContext
from .marks import TurnMarks
from .openings import check_context, digest_of
from .pending import PendingRequest, session_moved
from .preparation import INLINE_PROMPT_CHARS, PreparedQuestion
from .sessions import MAX_ENGINE_LOSSES, Residency, Session, Turn, TurnState
from .turns import Turns

# Of the time until the deadline, the part that the journal may take to store the answer.
_STORING_SHARE = 0.1
_STORING_MS = 500


class Questions:
    """Starts turns, and answers retried requests from the transcript."""

    def __init__(self, context: WorkerContext, turns: Turns, marks: TurnMarks) -> None:
        self._context = context
        self._turns = turns
        self._marks = marks

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
            message = f"Each of the session's last {MAX_ENGINE_LOSSES} turns ended the engine; open a new session."
            raise Refused("internal", message)
        turn = Turn(session, ask, pending)
        self._turns.add(turn)
        try:
            if session.in_engine and not ask.pictures and len(ask.prompt_text) <= INLINE_PROMPT_CHARS:
                prompt_ids = context.preparer.template.prompt(session.known_transcript.opened_on, ask.prompt_text)
                self._submit(turn, PreparedQuestion(prompt_ids))
                return
            self._prepare(turn)
        except Exception:
            self._turns.end(turn)
            raise

    def _attach(self, pending: PendingRequest, session: Session, ask: Ask) -> bool:
        """Answer a retried ask with the stored answer, or attach it to the running turn. Return False if it is new."""
        turn = session.turn
        if turn is not None and turn.ask.retry_key == ask.retry_key:
            if turn.is_in(TurnState.STOPPING):
                turn.retries.append((pending, ask))
            else:
                turn.pending.append(pending)
                if turn.may_commit:
                    pending.commit()
                pending.stream(turn.shown_text)
            return True
        return self._answer_from_transcript([pending], session, ask)

    def _answer_from_transcript(self, waiting: list[PendingRequest], session: Session, ask: Ask) -> bool:
        transcript = session.transcript
        if transcript is None or ask.retry_key is None:
            return False
        if ask.stored_key is None:
            index = session.find_labelled(ask.retry_key, self._context.clock())
        else:
            index = transcript.find_answer(ask.stored_key)
        if index is None:
            return False
        record = transcript.turns[index]
        facts = answer_facts(self._context.journal, record, durable=index < session.stored_turns)
        for pending in waiting:
            pending.stream(record.text)
            pending.answer(record.text, facts)
        return True

    def _prepare(self, turn: Turn) -> None:
        """Prepare a question in the background. The end of the turn cancels a preparation that has not begun."""
        session = turn.session
        preparer = self._context.preparer
        prepared = preparer.question(turn.ask, session.transcript, session.token_digest, session.in_engine)
        turn.prepared = prepared
        self._context.inbox.when_done(prepared, partial(self._prepared, turn))

    def _prepared(self, turn: Turn, prepared: Future[PreparedQuestion]) -> None:
        """Submit a question that is prepared, or reject it."""
        if not turn.is_in(TurnState.PREPARING):
            return  # it was cancelled, or its client has left
        turn.prepared = None  # it refers to the prepared pictures
        try:
            question = prepared.result()
            session = turn.session
            if session.transcript is None and question.rebuild is not None:
                session.transcript = question.rebuild.transcript
                session.stored_turns = len(question.rebuild.transcript.turns)
            if self._answer_from_transcript(turn.pending, session, turn.ask):
                self._turns.end(turn)
                return
            self._submit(turn, question)
        except AlreadyClaimed:
            self._turns.fail(turn, session_moved())
        except NotFound as error:
            self._turns.fail(turn, error)
            self._turns.lose_session(turn.session, "damaged" if error.damaged else "moved")
        except Exception as error:
            self._turns.fail(turn, error)

    def _submit(self, turn: Turn, question: PreparedQuestion) -> None:
        """Send a turn to the engine, with its session before it if the engine does not hold that.

        A turn whose deadline has passed ends instead.
        """
        context = self._context
        session = turn.session
        deadline_ms = self._ms_left(turn)
        if deadline_ms is not None and deadline_ms <= 0:
            self._turns.cancelled(turn, "deadline")
            return
        check_context(session.known_transcript.token_count + len(question.prompt_ids) + 1, context.context_tokens)
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
        sampling = Sampling(
            ask.max_new_tokens, ask.temperature, ask.top_p, ask.seed, ask.stop, deadline_ms, ask.ignore_eos
        )
        context.gate.submit(AskSession(session.id, turn.id, question.prompt_ids, sampling, question.pictures))
        turn.ask = ask.without_pictures()
        turn.advance(TurnState.RUNNING)
        self._marks.begin(turn)

    def _ms_left(self, turn: Turn) -> int | None:
        """Return the milliseconds that the engine may take for a turn: the rest is for the journal. None: any time."""
        if turn.deadline_s is None:
            return None
        left_ms = (turn.deadline_s - self._context.monotonic()) * 1e3
        storing_ms = min(_STORING_SHARE * left_ms, _STORING_MS) if self._context.journal.durable else 0.0
        return int(left_ms - storing_ms)
