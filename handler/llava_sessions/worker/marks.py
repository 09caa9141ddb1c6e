"""Marks of running turns in the journal, so that no other instance takes over their sessions.

A mark also shows whether another instance has taken over the session before the turn: then the session is not here any
more, and the turn is rejected. No client sees text before that is known. All methods run on the pump's thread.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial

from ..journal.journal import SaveOutcome
from .context import WorkerContext
from .openings import outcome_of
from .pending import session_moved
from .sessions import Turn
from .states import TurnState
from .turns import Turns

# A mark is valid for so long. If its instance dies, the session can be adopted after that: with a shared directory at
# once (journal/locks.py).
LEASE_S = 10.0
# It is renewed after so long, while the turn runs.
RENEWAL_S = 3.0
# Text is held back for at most so long: a journal that does not answer delays a stream, and does not end it.
_HOLD_S = 2.0


class TurnMarks:
    """Marks the turns of named sessions while the engine works on them."""

    def __init__(self, context: WorkerContext, turns: Turns) -> None:
        self._context = context
        self._turns = turns
        self._marked_s: dict[Turn, float] = {}  # the latest mark of each turn, by the pump's clock
        self._held_s: dict[Turn, float] = {}  # the first mark of each turn whose text is held back

    def begin(self, turn: Turn) -> None:
        """Mark a turn that has been sent to the engine, and hold its text back until that is done."""
        if not self._context.adopts:
            return
        turn.is_owned = False
        self._held_s[turn] = self._context.monotonic()
        self._mark(turn)

    def tidy(self) -> None:
        """Remove the marks of the turns that are done. Call it after every change."""
        for turn in [turn for turn in self._marked_s if turn.is_in(TurnState.DONE)]:
            del self._marked_s[turn]
            self._held_s.pop(turn, None)
            successor = turn.session.turn
            if successor is None or successor not in self._marked_s:
                self._context.journal.mark(turn.session.id, 0.0)

    def renew(self) -> None:
        """Renew the marks of long turns, and show the text that has been held back for too long. Call it often."""
        now_s = self._context.monotonic()
        for turn in [turn for turn, at_s in self._held_s.items() if now_s - at_s >= _HOLD_S]:
            self._show(turn)
        for turn in [turn for turn, at_s in self._marked_s.items() if now_s - at_s >= RENEWAL_S]:
            self._mark(turn)

    def _mark(self, turn: Turn) -> None:
        self._marked_s[turn] = self._context.monotonic()
        marked = self._context.journal.mark(turn.session.id, self._context.clock() + LEASE_S)
        self._context.inbox.when_done(marked, partial(self._marked, turn))

    def _marked(self, turn: Turn, marked: Future[SaveOutcome]) -> None:
        """Show the text of a turn whose session is still here. If the journal can't be written, chats go on."""
        if outcome_of(marked) is SaveOutcome.NOT_OWNER:
            self._turns.lose_session(turn.session, "moved")
            if not turn.is_in(TurnState.DONE):
                self._turns.fail(turn, session_moved())
        elif not turn.is_in(TurnState.DONE):
            self._show(turn)

    def _show(self, turn: Turn) -> None:
        self._held_s.pop(turn, None)
        confirm(turn)


def confirm(turn: Turn) -> None:
    """Let the clients of a turn have its text."""
    if turn.is_owned:
        return
    turn.is_owned = True
    for pending in turn.pending:
        if turn.may_commit:
            pending.commit()
        pending.stream(turn.text)
