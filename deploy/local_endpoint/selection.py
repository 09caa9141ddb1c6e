"""The instance of a call: of its session, or of the routing strategy, or another one after a loss."""

from __future__ import annotations

from . import contract, faults
from .calls import ApiCall
from .contract import Corners
from .pins import Instance, SessionPins
from .routing import Prefix, Router


class Selector:
    """Selects instances of one endpoint. Raises `Fault` if there is none."""

    def __init__(self, pins: SessionPins, router: Router, corners: Corners) -> None:
        self._pins = pins
        self._router = router
        self._corners = corners

    def choose(self, call: ApiCall, session: str | None) -> Instance:
        """Return the instance of a call of /invocations."""
        if session is None:
            return self._route(self._router.body_prefix(call.headers, call.body))
        if session == contract.NEW_SESSION:
            return self._place()
        instance = self._pins.find(session)
        if instance is None:
            raise faults.unknown_session(session)
        return instance if instance.is_available else self._after_loss(session)

    def choose_for_messages(self, body: bytes) -> Instance:
        """Return the instance of an OpenAI request."""
        return self._route(self._router.messages_prefix(body))

    def _route(self, prefix: Prefix) -> Instance:
        available = self._pins.available()
        if not available:
            raise faults.none_healthy()
        return self._router.choose(available, prefix)

    def _place(self) -> Instance:
        """Return an instance for a new session."""
        instance = self._pins.place()
        if instance is None:
            raise faults.none_healthy()
        return instance

    def _after_loss(self, session: str) -> Instance:
        """Return another instance for a session whose instance is lost, or raise `Fault`, as `Corners` specifies."""
        if self._corners.lost_instance == "503":
            raise faults.unavailable("The instance of this session is not available.")
        if self._corners.lost_instance == "400":
            self._pins.drop(session)
            raise faults.unknown_session(session)
        instance = self._place()
        self._pins.move(session, instance)
        return instance
