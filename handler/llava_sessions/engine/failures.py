"""What an error does to the sessions that it concerns: retry, reject, roll back or remove them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from ..ipc.messages import Event, OpenFailed, OutOfCapacity, TurnFailed
from .faults import first_line
from .memory import DeviceMemory
from .session import EngineSession, EngineSessionState, EngineTurn, IllegalTransition

log = logging.getLogger(__name__)


class Failures:
    """Ends the work of single sessions after errors. Runs in the engine's thread."""

    def __init__(self, *, sessions: dict[str, EngineSession], device_memory: DeviceMemory, events: list[Event]) -> None:
        """`sessions` and `events` are the engine's own: broken sessions are removed, and results appended."""
        self._sessions = sessions
        self._device_memory = device_memory
        self._events = events

    def retry_or_reject(self, session: EngineSession, error: Exception) -> None:
        """Handle an out-of-memory error that changed no session.

        The first time, offload all idle KV caches: the next step runs the same work again. The second time, reject the
        request of `session`, the most recent arrival.
        """
        if not session.short_of_memory:
            session.short_of_memory = True
            log.warning("out_of_memory offloading=all_idle error=%s", first_line(error))
            self._device_memory.relieve()
            return
        log.warning("out_of_memory rejected=%s error=%s", session.id[:12], first_line(error))
        turn_id = None if session.turn is None else session.turn.id
        with self.isolated(session):
            if session.turn is None:
                del self._sessions[session.id]
                session.kv.drop()
            else:
                self.report_text(session.turn)
                session.roll_back_turn()
            self._events.append(
                OutOfCapacity(session.id, turn_id, session.reserved_bytes, 0, open_sessions=len(self._sessions))
            )

    def fail(self, session: EngineSession, error: Exception, ends_opening: bool = True) -> None:
        """End the session's turn, and its opening if that is unfinished and `ends_opening` is True.

        After an `IllegalTransition` the session's state is unreliable: the session is removed.
        """
        message = f"{type(error).__name__}: {error}"
        broken = isinstance(error, IllegalTransition)
        if session.turn is not None:
            self.report_text(session.turn)
            self._events.append(TurnFailed(session.turn.id, message))
            try:
                if not broken:
                    session.roll_back_turn()
            except IllegalTransition:
                log.exception("rollback_failed session=%s", session.id[:12])
                broken = True
        if broken or (ends_opening and session.state is not EngineSessionState.READY):
            self._events.append(OpenFailed(session.id, message))
            self._sessions.pop(session.id, None)
            session.kv.drop()

    def report_text(self, turn: EngineTurn) -> None:
        """Report the text of a turn that ends, as far as it is not reported yet.

        An error of the detokenizer is logged: text is lost, but the turn still ends.
        """
        try:
            self._events += turn.detokenize()
        except Exception:
            log.exception("detokenize_failed turn=%s", turn.id[:12])

    @contextlib.contextmanager
    def isolated(self, session: EngineSession) -> Iterator[None]:
        """Remove the session after an `IllegalTransition` in this block."""
        try:
            yield
        except IllegalTransition as error:
            log.exception("session_broken session=%s", session.id[:12])
            self.fail(session, error)
