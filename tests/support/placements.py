"""The devices of sessions, as the worker's log shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_LINE = re.compile(r"\b(session_ready|session_close|engine_lost|engine_up)\b(?: session=(\S+))?(?: device=(\S+))?")


@dataclass
class Placements:
    """What happened to the sessions by the log, in its order.

    `devices`: of each session, by its short ID, the devices on which it was prefilled. `losses`: how often an engine
    died that held the session. `unexplained`: sessions that were prefilled again although their engine was alive.
    `lost`, `up`: the devices whose engines died and came back.
    """

    devices: dict[str, list[str]] = field(default_factory=dict)
    losses: dict[str, int] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    up: list[str] = field(default_factory=list)
    _held: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, log: str) -> Placements:
        """Read a log."""
        found = cls()
        for event, session, device in _LINE.findall(log):
            found._add(event, session, device)
        return found

    def _add(self, event: str, session: str, device: str) -> None:
        match event:
            case "session_ready":
                if session in self._held:
                    self.unexplained.append(session)
                self._held[session] = device
                self.devices.setdefault(session, []).append(device)
            case "session_close":
                self._held.pop(session, None)
            case "engine_lost":
                self.lost.append(device)
                for name in [name for name, on in self._held.items() if on == device]:
                    del self._held[name]
                    self.losses[name] = self.losses.get(name, 0) + 1
            case "engine_up":
                self.up.append(device)
