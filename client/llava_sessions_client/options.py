"""Time-outs, retries, and the options of one question."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypedDict

OnLost = Literal["raise", "replay"]
MAX_DEADLINE_MS = 600_000


@dataclass(frozen=True)
class Timeouts:
    """Limits in seconds.

    `connect_s`: to make a connection. `first_byte_s`: from the request to the first byte of the reply. `between_s`:
    between two parts of a streamed answer. `total_s`: of one call of the client, with all its retries and pauses.
    `close_s`: as `total_s`, for a close, and for the clean-up after an interrupted call. `confirm_s`: until a session
    on SageMaker expires whose ID has not reached the client.
    """

    connect_s: float = 5.0
    first_byte_s: float = 70.0
    between_s: float = 60.0
    total_s: float = 180.0
    close_s: float = 5.0
    confirm_s: int = 60

    @classmethod
    def of(cls, value: float | Timeouts | None) -> Timeouts:
        """Return the default time-outs, those given, or the default ones with `value` as `total_s`."""
        if value is None:
            return cls()
        return value if isinstance(value, Timeouts) else replace(cls(), total_s=float(value))


@dataclass(frozen=True)
class Retries:
    """How often and when a request is sent again. Every attempt has the same `request_id`, so that no turn runs twice.

    `most`: further attempts after the first. `most_in_vain`: the same for an open that finds no server, and for a
    question whose instance SageMaker does not reach if `on_lost` is "replay". The pause doubles from `first_pause_s` to
    `longest_pause_s`, is shortened at random by up to half, and is at least `Retry-After`.
    """

    most: int = 8
    most_in_vain: int = 3
    first_pause_s: float = 0.25
    longest_pause_s: float = 4.0

    @classmethod
    def of(cls, value: int | Retries | None) -> Retries:
        """Return the default retries, those given, or the default ones with `value` further attempts."""
        if value is None:
            return cls()
        return value if isinstance(value, Retries) else replace(cls(), most=value, most_in_vain=min(value, 3))


class AskOptions(TypedDict, total=False):
    """Options of one question. docs/protocol.md, "Ask", has their ranges and defaults.

    `timeout_s`: replaces `Timeouts.total_s` for this question. It also limits `deadline_ms`, at which the server ends
    the answer with the text so far. `return_token_ids` has no effect on `Chat.edit` and `Chat.retry`.
    """

    max_new_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: str | list[str]
    ignore_eos: bool
    return_token_ids: bool
    deadline_ms: int
    timeout_s: float
