"""Owns what crosses the engine's door: commands in, events out. Plain data that can be pickled; no torch.

Times are in milliseconds, sizes in bytes, counts in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How a turn's tokens are chosen and when it ends. `temperature` 0 is greedy; `seed` None draws a fresh one.

    `deadline_ms` after its arrival a turn ends with what it has.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    deadline_ms: int | None = None


@dataclass(frozen=True)
class PreparedPicture:
    """One prepared picture. `key` names its content: the same key, the same features.

    `inputs` are the processor's arrays for this picture alone, by the processor's own names: for LLaVA-1.5
    `pixel_values`, float32 `[1, 3, height, width]`.
    """

    key: str
    inputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class OpenSession:
    """Encode `pictures`, whose image tokens stand in `token_ids` in the same order, and prefill `token_ids`.

    `answer_spans`, (start, end) in `token_ids`, are earlier answers: an image token in one is a token like any other.
    """

    session_id: str
    token_ids: list[int]
    pictures: tuple[PreparedPicture, ...]
    answer_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class AskSession:
    """Run one turn: append `token_ids`, with the image tokens of `pictures` among them, to the session and answer."""

    session_id: str
    turn_id: str
    token_ids: list[int]
    sampling: Sampling
    pictures: tuple[PreparedPicture, ...] = ()


@dataclass(frozen=True)
class StopTurn:
    """End a running turn. `reason` becomes the reason of its `Finished` or `Cancelled`.

    With `keep_answer` the turn finishes with the tokens that it has, or is cancelled if it has none. Without it the
    turn is cancelled: the session is rolled back to its state before the turn.
    """

    turn_id: str
    reason: str
    keep_answer: bool


@dataclass(frozen=True)
class CloseSession:
    """Free all that the session holds. A running turn of it is cancelled first."""

    session_id: str


@dataclass(frozen=True)
class Ping:
    """Ask for a report, an empty one if need be: whoever answers between two steps does not hang."""


Command = OpenSession | AskSession | StopTurn | CloseSession | Ping


@dataclass(frozen=True)
class Admitted:
    """There is room for the session, and it is open."""

    session_id: str


@dataclass(frozen=True)
class Prefilled:
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
    """A turn ended by itself. `reason` is "stop", "length", "deadline" or what a `StopTurn` gave.

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
class OutOfCapacity:
    """A turn, or with it None an opening, that memory can't hold beside what is running.

    The budget tells so before any work; a device that has less than the budget says, when the work runs out of memory
    a second time (`free_bytes` is 0 then). An opening's session holds nothing any more; a turn's session is as it was
    before the turn.
    """

    session_id: str
    turn_id: str | None
    needed_bytes: int
    free_bytes: int
    open_sessions: int


@dataclass(frozen=True)
class Cancelled:
    """A turn ended by a cancel, or before its first token by its deadline or a cut; its session is as it was before."""

    turn_id: str
    reason: str = "cancelled"


@dataclass(frozen=True)
class Closed:
    """A session's memory is free."""

    session_id: str


Event = Admitted | Prefilled | OpenFailed | Delta | Finished | TurnFailed | OutOfCapacity | Cancelled | Closed


@dataclass(frozen=True)
class Memory:
    """What the open sessions hold; `allocated_bytes` is torch's own count on the device (0 on CPU).

    A session is resident (KV on the device), offloaded (KV on the host) or cold (features only).
    """

    resident: int = 0
    offloaded: int = 0
    cold: int = 0
    features_bytes: int = 0
    kv_bytes: int = 0
    offloaded_bytes: int = 0
    allocated_bytes: int = 0

    @property
    def sessions(self) -> int:
        """Open sessions in any tier."""
        return self.resident + self.offloaded + self.cold


@dataclass(frozen=True)
class Report:
    """Everything that one pass of the engine's loop tells: its events, and the memory held after them."""

    events: list[Event] = field(default_factory=list)
    memory: Memory = Memory()


@dataclass(frozen=True)
class EngineSettings:
    """What an engine process loads. `dtype` and `device` as in `Model.load`; bytes None: what the machine has."""

    checkpoint: str
    system_prompt: str
    dtype: str
    device: str
    prefill_chunk_tokens: int
    device_bytes: int | None = None
    host_bytes: int | None = None


@dataclass(frozen=True)
class EngineFacts:
    """What an engine says of itself once it has answered a first question."""

    device: str
    dtype: str
    context_tokens: int
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class StartFailed:
    """The engine can't be loaded; `problem` names the error, for the log and the person at the terminal."""

    problem: str
