"""Send a request until it has an answer: which errors are retried, when, and for how long."""

from __future__ import annotations

import random
import time

from .effects import Call, Core, Limits, Sleep
from .errors import (
    ApiError,
    Busy,
    ClientError,
    ConnectionFailed,
    TimedOut,
    error_of_body,
    is_from_platform,
    is_transient,
)
from .options import Retries, Timeouts
from .wire import Reply, Request


class Budget:
    """Attempts and time of one call of the client.

    `opening`: give up sooner if no server is reached. `own_turn_runs`: an earlier question may still run, so that
    "busy" is worth a retry. `may_reopen`: give up sooner if SageMaker does not reach the session's instance.
    `may_have_arrived`: an attempt may have reached the server although its reply is unknown.
    """

    def __init__(
        self, timeouts: Timeouts, retries: Retries, *, total_s: float | None = None, deadline_s: float | None = None
    ) -> None:
        """Start the time. `deadline_s`: the end, on the clock of `time.monotonic`, if it has started already."""
        self._timeouts = timeouts
        self._retries = retries
        self.total_s = timeouts.total_s if total_s is None else total_s
        self._deadline_s = time.monotonic() + self.total_s if deadline_s is None else deadline_s
        self._failed = 0
        self.opening = False
        self.own_turn_runs = False
        self.may_reopen = False
        self.may_have_arrived = False

    def renewed(self) -> Budget:
        """Return a budget with new attempts in the rest of the time."""
        budget = Budget(self._timeouts, self._retries, total_s=self.total_s, deadline_s=self._deadline_s)
        budget.may_reopen = self.may_reopen
        return budget

    def limits(self) -> Limits:
        """Return the limits of the next attempt. Raise `TimedOut` if the time is over."""
        remaining_s = self._deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise self.over()
        timeouts = self._timeouts
        return Limits(
            min(timeouts.connect_s, remaining_s),
            min(timeouts.first_byte_s, remaining_s),
            min(timeouts.between_s, remaining_s),
            self._deadline_s,
        )

    def over(self) -> TimedOut:
        """Return the error for the end of the time."""
        return TimedOut(f"the call must end within {self.total_s:g} s, with its retries")

    def pause_after(self, error: ClientError) -> float:
        """Return how long to wait before the next attempt. Raise the error if there is none."""
        self._failed += 1
        unreachable = isinstance(error, ConnectionFailed) and not error.connected
        self.may_have_arrived = self.may_have_arrived or (is_transient(error) and not unreachable)
        own_turn = self.own_turn_runs and isinstance(error, Busy)
        if not (own_turn or is_transient(error)) or self._failed > self._most(error, unreachable):
            raise error
        retries = self._retries
        longest_s = min(retries.longest_pause_s, retries.first_pause_s * 2.0 ** (self._failed - 1))
        least_s = error.retry_after_s if isinstance(error, ApiError) else None
        pause_s = max(longest_s * random.uniform(0.5, 1.0), least_s or 0.0)
        if time.monotonic() + pause_s >= self._deadline_s:
            raise error
        return pause_s

    def _most(self, error: ClientError, unreachable: bool) -> int:
        gives_up = (unreachable and self.opening) or (is_from_platform(error) and self.may_reopen)
        return self._retries.most_in_vain if gives_up else self._retries.most


def send(request: Request, budget: Budget) -> Core[Reply]:
    """Send a request, again after a transient error, and return the reply of a success. Raise `ClientError`."""
    while True:
        try:
            return checked((yield Call(request, budget.limits())))
        except ClientError as error:
            pause_s = budget.pause_after(error)
        yield Sleep(pause_s)


def checked(reply: Reply) -> Reply:
    """Return the reply of a success. Raise the `ApiError` of any other."""
    if reply.is_success:
        return reply
    raise error_of_body(reply.status, reply.body, reply.retry_after_s)
