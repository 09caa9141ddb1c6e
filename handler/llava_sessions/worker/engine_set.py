"""The engines of one worker, and the commands to the engine that holds a session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import Refused
from ..ipc.messages import Command, EngineFacts, OpenSession, Report
from .counters import EngineMemory
from .engines import CommandSink, EngineLost, EngineUp
from .sessions import Session


@dataclass(eq=False)
class DeviceEngine:
    """One engine as the worker sees it. `client` None: it is being replaced, ready in about `retry_after_s` seconds.

    `label`: its device in metrics. `longest_step_s`, `huge_page_ratio`: as in its latest `Report`.
    """

    label: str
    client: CommandSink | None
    facts: EngineFacts | None = None
    memory: EngineMemory = field(default_factory=EngineMemory)
    retry_after_s: int = 1
    longest_step_s: float = 0.0
    huge_page_ratio: float = 0.0

    @property
    def budget_bytes(self) -> int:
        """Budget of features and KV on the device. 0 if it is not known yet."""
        reported = self.memory.now.device_budget_bytes
        return reported or (0 if self.facts is None else self.facts.device_bytes)

    @property
    def free_bytes(self) -> int:
        """Bytes of the budget that the latest report leaves free."""
        now = self.memory.now
        return self.budget_bytes - now.features_bytes - now.kv_bytes

    def kv_bytes(self, tokens: int) -> int:
        """Return the KV bytes of a number of tokens. 0 if they are not known."""
        return 0 if self.facts is None else tokens * self.facts.token_bytes


class EngineSet:
    """Sends commands to the engines. Rejects new work during a drain, or while no engine works.

    Not thread-safe: all methods run on the pump's thread, under its lock.
    """

    def __init__(self, first: Sequence[EngineUp], labels: Sequence[str]) -> None:
        """`first`, `labels`: of each engine. `draining_since_s`: when the server began to stop, by the pump's clock."""
        self._engines = [DeviceEngine(label, up.client, up.facts) for up, label in zip(first, labels, strict=True)]
        self.draining_since_s: float | None = None

    @property
    def all(self) -> Sequence[DeviceEngine]:
        """All engines, also those that are being replaced."""
        return self._engines

    @property
    def working(self) -> int:
        """The number of engines that take commands."""
        return sum(engine.client is not None for engine in self._engines)

    @property
    def longest_step_s(self) -> float:
        """Duration of the longest recent step of any engine, in seconds."""
        return max(engine.longest_step_s for engine in self._engines)

    def report(self, number: int, report: Report) -> None:
        """Take the latest report of an engine."""
        engine = self._engines[number]
        engine.memory.report(report.memory)
        engine.longest_step_s = report.longest_step_s
        engine.huge_page_ratio = report.huge_page_ratio

    def connect(self, number: int, up: EngineUp) -> None:
        """Send commands to a new engine from now on."""
        engine = self._engines[number]
        engine.client = up.client
        engine.facts = up.facts or engine.facts

    def disconnect(self, number: int, lost: EngineLost) -> None:
        """Place no session on an engine until `connect`."""
        engine = self._engines[number]
        engine.client = None
        engine.retry_after_s = lost.retry_after_s
        engine.memory.lost()

    def check(self) -> None:
        """Raise `Refused` (shutting_down, engine_restarting) if new work would not be done."""
        if self.draining_since_s is not None:
            raise Refused("shutting_down", "The server is about to stop and takes no new work.", retry_after_s=5)
        self.check_working()

    def check_working(self) -> None:
        """Raise `Refused` (engine_restarting) if no engine works."""
        if not self.working:
            raise self.restarting()

    def load(self, session: Session, command: OpenSession, number: int) -> None:
        """Make an engine hold a session. Raise `Refused` (engine_restarting) while the engine is being replaced."""
        self._client(number).submit(command)
        session.load(number, len(command.token_ids))

    def submit(self, session: Session, command: Command) -> None:
        """Send a command to the session's engine. Raise `Refused` (engine_restarting) if no engine holds it."""
        self._client(session.engine).submit(command)

    def submit_if_held(self, session: Session, command: Command) -> None:
        """Send a command that is pointless unless an engine holds the session."""
        if session.engine is not None:
            client = self._engines[session.engine].client
            if client is not None:
                client.submit(command)

    def restarting(self) -> Refused:
        """Return the error for work that a lost engine held. Another engine that works takes its session at once."""
        return _restarting(1 if self.working else min(engine.retry_after_s for engine in self._engines))

    def absent(self) -> Refused | None:
        """Return the error for work that needs the memory of an engine that is being replaced; None if all work."""
        absent = [engine.retry_after_s for engine in self._engines if engine.client is None]
        return _restarting(min(absent)) if absent else None

    def _client(self, number: int | None) -> CommandSink:
        client = None if number is None else self._engines[number].client
        if client is None:
            raise self.restarting()
        return client


def _restarting(after_s: int) -> Refused:
    message = f"The engine is being restarted. No finished turn is lost; try again in {after_s} s."
    return Refused("engine_restarting", message, retry_after_s=after_s)
