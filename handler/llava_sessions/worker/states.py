"""The states of sessions and turns, and the legal transitions."""

from __future__ import annotations

from enum import Enum, auto


class SessionState(Enum):
    """OPENING until the engine has admitted the pictures, CLOSING from a close request until the session is removed."""

    OPENING = auto()
    OPEN = auto()
    CLOSING = auto()


class Residency(Enum):
    """COLD: the engine does not hold the session. LOADING: its prefix is being encoded and prefilled."""

    COLD = auto()
    LOADING = auto()
    LOADED = auto()


class TurnState(Enum):
    """PREPARING: pictures and prompt. RUNNING: in the engine. STOPPING: a stop was sent. STORING: in the journal."""

    PREPARING = auto()
    RUNNING = auto()
    STOPPING = auto()
    STORING = auto()
    DONE = auto()


State = SessionState | Residency | TurnState
TRANSITIONS: dict[State, frozenset[State]] = {
    SessionState.OPENING: frozenset({SessionState.OPEN}),
    SessionState.OPEN: frozenset({SessionState.CLOSING}),
    # A resume closes the old session. If the resume is rejected, the old session is open again.
    SessionState.CLOSING: frozenset({SessionState.OPEN}),
    Residency.COLD: frozenset({Residency.LOADING}),
    Residency.LOADING: frozenset({Residency.LOADED, Residency.COLD}),
    Residency.LOADED: frozenset({Residency.COLD}),
    TurnState.PREPARING: frozenset({TurnState.RUNNING, TurnState.DONE}),
    TurnState.RUNNING: frozenset({TurnState.STOPPING, TurnState.STORING, TurnState.DONE}),
    TurnState.STOPPING: frozenset({TurnState.STORING, TurnState.DONE}),
    TurnState.STORING: frozenset({TurnState.DONE}),
    TurnState.DONE: frozenset(),
}


class IllegalTransition(Exception):
    """A transition that `TRANSITIONS` does not list. It fails one session."""


class Stateful:
    """Has one current state of each given kind. `advance` is the only writer."""

    def __init__(self, identity: str, *states: State) -> None:
        self.id = identity
        self._states: dict[type[State], State] = {type(state): state for state in states}

    def advance(self, new: State) -> None:
        """Enter a state. Raise `IllegalTransition` if it does not follow the current one."""
        old = self._states[type(new)]
        if new not in TRANSITIONS[old]:
            raise IllegalTransition(f"{type(self).__name__} cannot go from {old} to {new}")
        self._states[type(new)] = new

    def is_in(self, *states: State) -> bool:
        """Return whether one of the states is current."""
        return any(self._states[type(state)] is state for state in states)
