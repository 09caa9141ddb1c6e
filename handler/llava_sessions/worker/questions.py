"""Questions: from a request to a turn that the engine works on.

A turn of a cold session rebuilds the session first. All methods run on the pump's thread, under its lock.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial

from ..errors import Refused
from ..ipc.messages import AskSession, Sampling
from ..journal.journal import AlreadyClaimed, NotFound
from ..protocol.openai import Chat
from ..protocol.requests import Ask
from .answers import answer_facts
from .context import WorkerContext
from .conversations import lacks_features
from .marks import TurnMarks
from .openings import check_context, digest_of
from .pending import PendingRequest, session_moved
from .preparation import INLINE_PROMPT_CHARS
from .prompts import PreparedQuestion, QuestionedSession
from .sessions import MAX_ENGINE_LOSSES, Session, Turn
from .sources import sources_of
from .states import TurnState
from .turns import Turns

# Of the time until the deadline, the part that the journal may take to store the answer.
_STORING_SHARE = 0.1
_STORING_MS = 500
# Turns of one session that later ones may replace, and bytes of their pictures: their records stay in the journal.
MAX_REPLACED_TURNS = 1_000
MAX_REPLACED_BYTES = 2**30


class Questions:
    """Starts turns, and answers retried requests from the transcript."""

    def __init__(self, context: WorkerContext, turns: Turns, marks: TurnMarks) -> None:
        self._context = context
        self._turns = turns
        self._marks = marks

    def start(self, pending: PendingRequest, ask: Ask | Chat) -> None:
        """Start a turn of a session that was opened by name, or answer a retried one. Raise `Refused`."""
        context = self._context
        session = context.table.get(ask.session_id or "", context.clock(), digest_of(ask.session_token))
        if not pending.was_placed_again:  # `ask` is that of the turn's first request, which may have another form
            pending.streamed = ask.stream
        if ask.retry_key is not None and self._attach(pending, session, ask):
            return
        context.engines.check()
        if session.turn is not None:
            raise Refused("session_busy", "The session is still answering; wait for that answer or cancel it.")
        if session.engine_losses >= MAX_ENGINE_LOSSES:
            message = f"Each of the session's last {MAX_ENGINE_LOSSES} turns ended the engine; open a new session."
            raise Refused("internal", message)
        self._check_replaced(session)
        turn = Turn(session, ask, pending)
        self._turns.add(turn)
        try:
            is_short = isinstance(ask, Ask) and not sources_of(ask) and len(ask.prompt_text) <= INLINE_PROMPT_CHARS
            if isinstance(ask, Ask) and is_short and session.in_engine:
                prompt_ids = context.preparer.template.prompt(session.known_transcript.opened_on, ask.prompt_text)
                self._submit(turn, PreparedQuestion(prompt_ids))
                return
            self._prepare(turn)
        except Exception:
            self._turns.end(turn)
            raise

    def _check_replaced(self, session: Session) -> None:
        """Raise `Refused` if the session has too many replaced turns. A session that resumes it has none of them."""
        transcript = session.transcript
        if transcript is None:
            return
        is_large = self._context.journal.durable and transcript.replaced_bytes >= MAX_REPLACED_BYTES
        if is_large or transcript.replaced_turns >= MAX_REPLACED_TURNS:
            message = (
                f"The session must have fewer than {MAX_REPLACED_TURNS:,} replaced turns, with less than "
                f"{MAX_REPLACED_BYTES:,} bytes of pictures, got more; `resume` it in a new session."
            )
            raise Refused("invalid_request", message)

    def _attach(self, pending: PendingRequest, session: Session, ask: Ask | Chat) -> bool:
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

    def _answer_from_transcript(self, waiting: list[PendingRequest], session: Session, ask: Ask | Chat) -> bool:
        transcript = session.transcript
        if transcript is None or ask.retry_key is None:
            return False
        if ask.stored_key is None:
            index = session.find_labelled(ask.retry_key, self._context.clock())
        else:
            index = transcript.find_answer(ask.stored_key)
        if index is None:
            return False
        record = transcript.log[index]
        facts = answer_facts(self._context.journal, record, durable=index < session.stored_turns)
        for pending in waiting:
            pending.stream(record.text)
            pending.answer(record.text, facts)
        return True

    def _prepare(self, turn: Turn, with_arrays: bool = False) -> None:
        """Prepare a question in the background. The end of the turn cancels a preparation that has not begun."""
        session = turn.session
        questioned = QuestionedSession(
            session.id, session.transcript, session.token_digest, session.in_engine, session.picture_keys
        )
        prepared = self._context.preparer.question(turn.ask, questioned, with_arrays)
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
                session.stored_turns = len(question.rebuild.transcript.log)
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
        deadline_ms = ms_left(context, turn)
        if deadline_ms is not None and deadline_ms <= 0:
            self._turns.cancelled(turn, "deadline")
            return
        rewrite = question.rewrite
        held_tokens = session.known_transcript.token_count
        kept_tokens = held_tokens if rewrite is None else rewrite.kept_tokens
        sent_ids = question.prompt_ids if rewrite is None else rewrite.sent_ids
        check_context(kept_tokens + len(sent_ids) + 1, context.context_tokens)
        if question.rebuild is None and lacks_features(context.table, question.pictures, session.engine):
            self._prepare(turn, with_arrays=True)
            return
        if not session.in_engine:
            if question.rebuild is None:  # the engine lost the session during the preparation
                self._prepare(turn)
                return
            engine = context.placement.place(question.rebuild.picture_keys, turn.avoids)
            context.engines.load(session, question.rebuild.command(session.id), engine)
            session.picture_keys = question.rebuild.picture_keys
            context.counters.rebuilds += 1
        turn.prompt_ids = question.prompt_ids
        turn.media = question.media
        turn.base_turns = None if rewrite is None else rewrite.base_turns
        turn.kept_tokens = kept_tokens
        turn.crops = kept_tokens < held_tokens
        before = session.picture_keys if rewrite is None else ()
        turn.picture_keys = (*before, *question.picture_keys)
        # The engine drops all others.
        session.picture_keys = turn.picture_keys[: len(turn.picture_keys) - len(question.pictures)]
        sampling = sampling_of(turn.ask, deadline_ms)
        kept = None if rewrite is None else kept_tokens
        context.engines.submit(session, AskSession(session.id, turn.id, sent_ids, sampling, question.pictures, kept))
        if not context.placement.are_several:
            turn.ask = turn.ask.without_pictures()
        turn.submitted_s = context.monotonic()
        turn.advance(TurnState.RUNNING)
        self._marks.begin(turn)


def ms_left(context: WorkerContext, turn: Turn) -> int | None:
    """Return the milliseconds that the engine may take for a turn: the rest is for the journal. None: any time.

    A question without a session ID is not stored.
    """
    if turn.deadline_s is None:
        return None
    left_ms = (turn.deadline_s - context.monotonic()) * 1e3
    is_stored = context.journal.durable and turn.ask.session_id is not None
    storing_ms = min(_STORING_SHARE * left_ms, _STORING_MS) if is_stored else 0.0
    return int(left_ms - storing_ms)


def sampling_of(ask: Ask | Chat, deadline_ms: int | None) -> Sampling:
    """Return how the engine chooses the tokens of an answer."""
    return Sampling(
        max_new_tokens=ask.max_new_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        seed=ask.seed,
        stop=ask.stop,
        deadline_ms=deadline_ms,
        ignore_eos=ask.ignore_eos,
        min_tokens=ask.min_tokens,
    )
