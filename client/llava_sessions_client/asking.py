"""Ask one question: whole or streamed, with retries that deliver each piece of the answer once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .answers import CANCELLED, Answer, timings_of, usage_of
from .effects import Abort, Call, Core, Finish, Piece, Read, Sleep, Start
from .errors import AnswerChanged, ClientError, ConnectionFailed
from .lines import LineSplitter
from .retrying import Budget, checked
from .wire import Body, Request, facts_of, finish_of, piece_of, text_of


@dataclass
class Delivery:
    """What the caller has received of an answer, over all attempts. Times are of `time.perf_counter`.

    `is_cancelled`: whether the caller has cancelled the answer. No further attempt begins then.
    """

    is_cancelled: Callable[[], bool] = lambda: False
    asked_at: float = field(default_factory=time.perf_counter)
    text: str = ""
    first_at: float | None = None
    changed: bool = False

    def next_piece(self, text: str) -> str:
        """Return what the caller lacks of the answer so far, which an attempt has received from its beginning."""
        if text.startswith(self.text):
            piece = text[len(self.text) :]
            if piece and not self.changed:
                self.text = text
                self.first_at = self.first_at or time.perf_counter()
                return piece
        elif not self.text.startswith(text):
            self.changed = True
        return ""

    def cancelled(self, request_id: str) -> Answer:
        """Return the text so far as a cancelled answer."""
        return self.answer(self.text, {"finish_reason": CANCELLED}, request_id)

    def answer(self, text: str, facts: Body, request_id: str) -> Answer:
        """Return the finished answer."""
        total_s = time.perf_counter() - self.asked_at
        tokens = facts.get("token_ids")
        return Answer(
            text=text,
            finish_reason=finish_of(facts),
            usage=usage_of(facts),
            timings=timings_of(facts),
            ttft_s=total_s if self.first_at is None else self.first_at - self.asked_at,
            total_s=total_s,
            request_id=request_id,
            durable=facts.get("durable"),
            token_ids=None if tokens is None else tuple(tokens),
        )


def ask_whole(request: Request, budget: Budget, delivery: Delivery) -> Core[Answer]:
    """Ask a question and return its answer. Raise `ClientError`."""
    while True:
        try:
            facts = facts_of(checked((yield Call(request, budget.limits()))).body)
            if not finish_of(facts):
                raise ConnectionFailed("the reply must have a finish reason, got a part of it")
            return delivery.answer(text_of(facts), facts, request.body["request_id"])
        except ClientError as error:
            pause_s = budget.pause_after(error)
        yield Sleep(pause_s)


def ask_streamed(request: Request, budget: Budget, delivery: Delivery) -> Core[Answer]:
    """Ask a question, yield the pieces of its answer, and return the answer. Raise `ClientError`.

    A stream that breaks is asked for again with the same `request_id`. The server has cancelled the turn, so it runs
    again; or it had ended, so its stored answer is sent. Text that the caller has already received is skipped.
    """
    request = request.streamed
    while True:
        try:
            answer = yield from _read_once(request, budget, delivery)
            break
        except ClientError as error:
            yield Abort()
            pause_s = budget.pause_after(error)
        yield Sleep(pause_s)
        if delivery.is_cancelled():
            return delivery.cancelled(request.body["request_id"])
    if delivery.changed or answer.text != delivery.text:
        raise AnswerChanged(answer)
    return answer


def _read_once(request: Request, budget: Budget, delivery: Delivery) -> Core[Answer]:
    limits = budget.limits()
    checked((yield Start(request, limits)))
    splitter = LineSplitter()
    text = ""
    while True:
        part: bytes = yield Read()
        for line in splitter.feed(part) if part else splitter.end():
            facts = facts_of(line)
            text += piece_of(facts)
            piece = delivery.next_piece(text)
            if piece:
                yield Piece(piece)
            if finish_of(facts):
                yield Finish()
                return delivery.answer(text, facts, request.body["request_id"])
        if not part:
            raise ConnectionFailed("a streamed answer must have a last line, got its end before")
        if time.monotonic() > limits.deadline_s:
            raise budget.over()
