"""Owns what crosses the engine's door: commands in, events out. Plain data that can be pickled; no torch.

Times are in milliseconds, sizes in bytes, counts in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How a turn's tokens are chosen and when it ends. `temperature` 0 is greedy; `seed` None draws a fresh one."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpenSession:
    """Encode `pixel_values` (float32 [pictures, 3, height, width]) and prefill `token_ids`."""

    session_id: str
    token_ids: list[int]
    pixel_values: np.ndarray


@dataclass(frozen=True)
class AskSession:
    """Run one turn: append `token_ids` to the session and answer."""

    session_id: str
    turn_id: str
    token_ids: list[int]
    sampling: Sampling


@dataclass(frozen=True)
class CancelTurn:
    """End a running turn and put its session back to where it was before."""

    turn_id: str


@dataclass(frozen=True)
class CloseSession:
    """Free all that the session holds. A running turn of it is cancelled first."""

    session_id: str


Command = OpenSession | AskSession | CancelTurn | CloseSession


@dataclass(frozen=True)
class Opened:
    """The picture is encoded and the prompt up to it is prefilled."""

    session_id: str
    encode_ms: float
    total_ms: float


@dataclass(frozen=True)
class OpenFailed:
    """The session could not be prepared and holds nothing any more."""

    session_id: str
    error: str


@dataclass(frozen=True)
class Delta:
    """Text that became certain in one step of a turn."""

    turn_id: str
    text: str


@dataclass(frozen=True)
class Usage:
    """Tokens of one turn. `prompt_tokens`: the whole conversation; `cached_tokens`: what of it was in the KV cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """From the ask's arrival at the engine: to its first step, to its first token, to its end."""

    queue_ms: float
    ttft_ms: float
    total_ms: float


@dataclass(frozen=True)
class Finished:
    """A turn ended by itself. `reason` is "stop" or "length".

    `answer_ids` are all generated tokens; `kept_ids` those that the session keeps (without the end-of-sequence token).
    """

    turn_id: str
    reason: str
    text: str
    answer_ids: list[int]
    kept_ids: list[int]
    usage: Usage
    timings: Timings


@dataclass(frozen=True)
class TurnFailed:
    """A turn ended by an error; its session is as it was before the turn."""

    turn_id: str
    error: str


@dataclass(frozen=True)
class Cancelled:
    """A turn ended by a cancel."""

    turn_id: str


@dataclass(frozen=True)
class Closed:
    """A session's memory is free."""

    session_id: str


Event = Opened | OpenFailed | Delta | Finished | TurnFailed | Cancelled | Closed


@dataclass(frozen=True)
class Memory:
    """What the open sessions hold on the device, and what torch's allocator holds in all (0 on CPU, which has no
    count).
    """

    sessions: int = 0
    features_bytes: int = 0
    kv_bytes: int = 0
    allocated_bytes: int = 0


@dataclass(frozen=True)
class Report:
    """Everything that one pass of the engine's loop tells: its events, and the memory held after them."""

    events: list[Event] = field(default_factory=list)
    memory: Memory = Memory()
