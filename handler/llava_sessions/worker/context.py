"""Owns what opens, turns and closes have in common: the doors that they use, and the counters that they keep.

Must not know how any of them goes, torch or TorchServe.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from ..chat.transcript import Conversation
from ..errors import Refused
from ..ipc.messages import CloseSession, Command
from ..journal.journal import Journal
from ..torchserve.sequences import SequenceReaper
from .pending import EngineDoor, PendingRequest
from .preparation import Preparer
from .sessions import Session, SessionTable


@dataclass(eq=False)
class WorkerContext:
    """`engine` is None while there is none; then the next will probably be there in `retry_after_s`.

    `post` has something done between two rows, from any thread; `let_go` has the sequence of a row whose client left
    ended. `draining_since_s`: since when (`time.monotonic`) the server is about to stop.
    """

    engine: EngineDoor | None
    table: SessionTable[Conversation]
    preparer: Preparer
    journal: Journal
    sequences: SequenceReaper
    context_tokens: int
    clock: Callable[[], float]
    post: Callable[[Callable[[], None]], None]
    let_go: Callable[[PendingRequest], None]
    retry_after_s: int = 1
    draining_since_s: float | None = None
    turns_total: int = 0
    refusals_total: int = 0
    rebuilds_total: int = 0
    engine_restarts_total: int = 0

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken any more."""
        return self.draining_since_s is not None

    def submit(self, command: Command) -> None:
        """Hand the engine a command. Raises `Refused` (engine_restarting) while there is none."""
        if self.engine is None:
            raise self.restarting()
        self.engine.submit(command)

    def check_taking_work(self) -> None:
        """Raises `Refused` (shutting_down, engine_restarting) where new work would not be done."""
        if self.draining:
            raise Refused("shutting_down", "The server is about to stop and takes nothing new.", retry_after_s=5)
        if self.engine is None:
            raise self.restarting()

    def restarting(self) -> Refused:
        """What is told to whom an engine's loss concerns."""
        again = f"Nothing that was said is lost; try again in {self.retry_after_s} s"
        message = f"The engine is being restarted. {again}."
        return Refused("engine_restarting", message, retry_after_s=self.retry_after_s)

    def check_fits(self, tokens: int) -> None:
        """Raises `Refused` (context_length_exceeded) for a conversation of so many tokens."""
        if tokens > self.context_tokens:
            sizes = f"the model's context is {self.context_tokens} tokens, the conversation would need {tokens}"
            raise Refused("context_length_exceeded", f"The conversation is too long: {sizes}.")

    def when_done(self, future: Future, step: Callable[[Future], None]) -> None:
        """Have `step` done with the future when it is done: at once if it is."""
        if future.done():
            step(future)
        else:
            future.add_done_callback(lambda done: self.post(partial(step, done)))

    def forget(self, session: Session[Conversation], reason: str, stored: bool = True) -> Future:
        """Drop an open session from everywhere but the frontend; done when its journal is gone too.

        `stored` False leaves its journal where it is stored.
        """
        self.table.remove(session.id, reason)
        if session.in_engine and self.engine is not None:
            self.engine.submit(CloseSession(session.id))
        session.in_engine = False
        if stored:
            return self.journal.forget(session.id)
        kept: Future = Future()
        kept.set_result(None)
        return kept


def new_session_id() -> str:
    """An id that nobody can guess."""
    return f"ls-{uuid.uuid4()}"
