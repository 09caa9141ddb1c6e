"""The core of a chat: its state, and what each operation sends. No input or output.

The server's transcript and `turns` are the same after every answer. If an operation fails so that the server may have a
turn that `turns` lacks, the conversation is in doubt: the next question sends all messages, from which the server
rewrites the session's transcript. So a question that failed never becomes a turn later.
"""

from __future__ import annotations

import logging
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, cast

from .answers import CANCELLED, LENGTH, STOP, Answer, Turn
from .asking import Delivery, ask_streamed, ask_whole
from .clips import Clip
from .descriptions import Description, description_of
from .effects import Abort, Core
from .errors import (
    AnswerChanged,
    ApiError,
    ChatClosed,
    ClientError,
    SessionLost,
    is_lost,
)
from .fitting import fit_each, fit_request
from .options import MAX_DEADLINE_MS, AskOptions, OnLost
from .pictures import Picture
from .retrying import Budget, send
from .settings import Settings
from .wire import (
    Body,
    Request,
    announced_session,
    ask_request,
    cancel_request,
    close_request,
    describe_request,
    facts_of,
    open_request,
    rewrite_request,
)

log = logging.getLogger(__name__)
MAX_REPLAYS = 3  # of one question
# The server's own limit for a whole answer. SageMaker ends a call after 60 s.
WHOLE_DEADLINE_MS = 55_000


@dataclass
class Conversation:
    """A session, its turns, and the pictures that the next question will show."""

    settings: Settings
    pictures: tuple[Picture, ...]
    turns: tuple[Turn, ...] = ()
    on_lost: OnLost = "raise"
    session_id: str = ""
    expires_at: datetime | None = None
    waiting: tuple[Picture, ...] = ()
    sending: int = 0  # so many of `waiting`, from the first one, are in the running question
    notices: list[str] = field(default_factory=list)
    in_doubt: bool = False
    stopping: bool = False
    closed: bool = False
    has_history: bool = False  # whether the session was opened with turns
    clip: Clip | None = None  # on which the session was opened

    # --- open and close -----------------------------------------------------------------------------------------------

    def open(self, budget: Budget | None = None) -> Core[None]:
        """Open the session with `pictures`, or `clip`, and `turns`. Raise `ClientError`.

        If no reply arrives, the open is sent once more with the same `request_id` and the session is closed. On
        SageMaker a retry may reach another instance than the open whose reply was lost. So the server expires a session
        there unless the client confirms it at once.
        """
        settings = self.settings
        self.pictures = yield from fit_each(self.pictures, settings, self.notices)
        fitting = fit_request(self.pictures, self.turns, settings, self.notices, self.clip)
        self.pictures, self.turns = yield from fitting
        confirm_s = settings.confirm_s
        token = settings.session_token
        request = open_request(self.pictures, self.turns, str(uuid.uuid4()), token, confirm_s, self.clip)
        budget = budget or Budget(settings.timeouts, settings.retries)
        budget.opening = True
        try:
            reply = yield from send(request, budget)
        except GeneratorExit:
            raise
        except BaseException as error:
            if budget.may_have_arrived or not isinstance(error, ClientError):
                yield from self._close_unanswered(request)
            raise
        self.session_id, self.expires_at = announced_session(reply)
        self.in_doubt = False
        self.has_history = bool(self.turns)
        if confirm_s is not None:
            yield from send(cancel_request(self.session_id, token), budget)

    def close(self) -> Core[None]:
        """Close the session. A session that the server no longer has is closed. Raise `ClientError`."""
        if self.closed:
            return
        self.closed = True
        try:
            yield from send(close_request(self.session_id, self.settings.session_token), self.cleanup_budget())
        except SessionLost:
            log.info("session_lost_before_close")

    def describe(self) -> Core[Description]:
        """Ask where the session is. This renews nothing. Raise `ClientError`."""
        request = describe_request(self.session_id, self.settings.session_token)
        reply = yield from send(request, self.cleanup_budget())
        return description_of(facts_of(reply.body))

    def _close_unanswered(self, request: Request) -> Core[None]:
        """Close the session of an open whose reply was lost. It expires by itself if the server is out of reach."""
        try:
            budget = self.cleanup_budget()
            reply = yield from send(request, budget)
            session_id, _ = announced_session(reply)
            yield from send(close_request(session_id, self.settings.session_token), budget)
        except ClientError as error:
            log.warning("unanswered_open_not_closed error=%s", type(error).__name__)

    # --- questions ----------------------------------------------------------------------------------------------------

    def ask(
        self, text: str, pictures: Sequence[Picture], options: AskOptions, *, stream: bool, clip: Clip | None = None
    ) -> Core[Answer]:
        """Ask the next question. Its pictures are those that wait and `pictures`. Raise `ClientError`."""
        waited = self.waiting
        shown = yield from fit_each((*waited, *pictures), self.settings, self.notices)
        self.waiting = (*shown[: len(waited)], *self.waiting[len(waited) :])
        before = self.turns
        self.sending = len(waited)
        try:
            return (yield from self._answer(before, Turn(text, Answer(""), shown, clip), options, stream=stream))
        finally:
            self.sending = 0
            if len(self.turns) > len(before):  # the turn is kept; others may have been added during the answer
                self.waiting = self.waiting[len(waited) :]

    def rewrite(self, index: int, text: str | None, options: AskOptions, *, stream: bool) -> Core[Answer]:
        """Ask question `index` again, with another text unless `text` is None. Later turns are dropped.

        The request has the whole conversation as `messages` and names the session, which works over plain HTTP and
        SageMaker alike: the server keeps the cache of what stays. Opening a session with a history would compute it
        all. Raise `ClientError`, and `IndexError` for a turn that does not exist.
        """
        old = self.turns[index]
        before = self.turns[: range(len(self.turns))[index]]
        turn = replace(old, text=old.text if text is None else text)
        return (yield from self._answer(before, turn, options, stream=stream))

    def _answer(self, before: tuple[Turn, ...], turn: Turn, options: AskOptions, *, stream: bool) -> Core[Answer]:
        """Answer `turn` after the turns `before`, and keep it. If it fails, the turns stay as they are."""
        if self.closed:
            raise ChatClosed("the chat must be open, got a closed one")
        self.stopping = False
        kept = self.turns
        try:
            answer = yield from self._replayed(before, turn, options, stream=stream)
        except AnswerChanged as error:
            self._keep(before, turn, error.answer)
            raise
        except BaseException:
            if self.turns != kept:  # the session was to be opened again without the later turns
                self.turns = kept
                self.in_doubt = True
            raise
        if self.stopping and answer.finish_reason == LENGTH:
            # OpenAI's form has the same reason for a cancelled answer. If this one has just ended by its length, the
            # next question rewrites the session's transcript without the turn.
            answer = replace(answer, finish_reason=CANCELLED)
        if not answer.is_kept:
            self.turns = kept
        self._keep(before, turn, answer)
        return answer

    def _replayed(self, before: tuple[Turn, ...], turn: Turn, options: AskOptions, *, stream: bool) -> Core[Answer]:
        """Answer `turn` after the turns `before`. Open the session again if it is lost and `on_lost` says so."""
        fields = self._fields(options, stream=stream)
        delivery = Delivery(lambda: self.stopping)
        budget = Budget(self.settings.timeouts, self.settings.retries, total_s=options.get("timeout_s"))
        budget.may_reopen = self.on_lost == "replay"
        replays = 0
        while True:
            try:
                answer = yield from self._attempt(before, turn, fields, budget, delivery, stream=stream)
                return replace(answer, replayed=replays > 0)
            except ClientError as error:
                if not budget.may_reopen or not is_lost(error) or replays == MAX_REPLAYS:
                    raise
                if self.stopping:
                    return delivery.cancelled(fields["request_id"])
            if self.closed:
                raise ChatClosed("the chat must be open, got one that was closed during the question")
            replays += 1
            log.info("session_replayed turns=%d", len(before))
            self.turns = before
            yield from self.open(budget.renewed())
            if self.closed:  # `close` has closed the old session only
                self.closed = False
                yield from self.close()
                raise ChatClosed("the chat must be open, got one that was closed during the question")
            if self.stopping:
                return delivery.cancelled(fields["request_id"])
            budget = budget.renewed()
            fields = {**fields, "request_id": str(uuid.uuid4())}

    def _attempt(
        self, before: tuple[Turn, ...], turn: Turn, fields: Body, budget: Budget, delivery: Delivery, *, stream: bool
    ) -> Core[Answer]:
        """Ask in the present session. Mark the conversation as in doubt if the server may have the turn afterwards."""
        settings = self.settings
        budget.own_turn_runs = self.in_doubt
        if self.in_doubt or before != self.turns:
            turns, clip = self._with_opened_media((*before, turn))
            _, turns = yield from fit_request((), turns, settings, self.notices, clip)
            request = rewrite_request(self.session_id, turns, fields, settings.session_token, clip)
        else:
            _, [turn] = yield from fit_request((), (turn,), settings, self.notices)
            request = ask_request(self.session_id, turn, fields, settings.session_token)
        try:
            return (yield from (ask_streamed if stream else ask_whole)(request, budget, delivery))
        except GeneratorExit:
            self.in_doubt = True
            raise
        except AnswerChanged:
            raise
        except BaseException as error:
            was_refused = isinstance(error, ApiError) and 400 <= error.status < 500
            self.in_doubt = self.in_doubt or not was_refused
            was_left = not isinstance(error, ClientError)
            if was_left or (budget.may_have_arrived and not isinstance(error, ApiError)):
                yield from self._stop_turn()
            raise

    def stop(self) -> Request:
        """Return the request that cancels the running turn, whose answer is then no part of the conversation."""
        self.stopping = True
        return cancel_request(self.session_id, self.settings.session_token)

    def _with_opened_media(self, turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], Clip | None]:
        """Return the turns for a rewrite, and the clip of the open. The first turn repeats the pictures of the open.

        Nothing is repeated if the session was opened without a history and the first question has neither pictures nor
        a clip: then the server keeps those of the open.
        """
        if not (self.has_history or turns[0].pictures or turns[0].clip):
            return turns, None
        return (replace(turns[0], pictures=(*self.pictures, *turns[0].pictures)), *turns[1:]), self.clip

    def _stop_turn(self) -> Core[None]:
        """Close the stream and cancel the turn. Its reply says that the session is as it was before the turn."""
        yield Abort()
        try:
            yield from send(cancel_request(self.session_id, self.settings.session_token), self.cleanup_budget())
        except ClientError as error:
            log.info("cancel_failed error=%s", type(error).__name__)

    def _keep(self, before: tuple[Turn, ...], turn: Turn, answer: Answer) -> None:
        """Make `turns` what the session has now."""
        self.in_doubt = answer.finish_reason not in (STOP, LENGTH)
        if answer.is_kept:
            self.turns = (*before, replace(turn, answer=answer))

    # --- fields and budgets ------------------------------------------------------------------------------------------

    def _fields(self, options: AskOptions, *, stream: bool) -> Body:
        """Return the options as fields of a request. They are the same in all attempts, since they are in its key.

        A sampled answer gets a seed, so that a turn that runs again has the same answer.
        """
        fields: dict[str, Any] = {**options, "request_id": str(uuid.uuid4())}
        total_s = cast("float", fields.pop("timeout_s", self.settings.timeouts.total_s))
        if fields.get("temperature") and fields.get("seed") is None:
            fields["seed"] = secrets.randbelow(2**63)
        most_ms = MAX_DEADLINE_MS if stream else WHOLE_DEADLINE_MS
        fields.setdefault("deadline_ms", max(1, min(most_ms, int(total_s * 1000))))
        return {name: value for name, value in fields.items() if value is not None}

    def cleanup_budget(self) -> Budget:
        """Return the budget of a close or of a clean-up after an interrupted call."""
        timeouts = self.settings.timeouts
        return Budget(timeouts, self.settings.retries, total_s=min(timeouts.total_s, timeouts.close_s))
