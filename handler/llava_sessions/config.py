"""The declared form of `model-config.yaml`: keys, types, defaults, ranges, and limits of requests and media. Pure.

`config_file` reads the file. scripts/configuration_page.py prints docs/configuration.md from these models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

# How long TorchServe keeps a sequence after its session expired, in seconds. Longer than the longest turn.
FRONTEND_MARGIN_S = 120
# An escaped character is at most 12 bytes of JSON; base64 with line breaks and escapes is at most twice the file.
_JSON_BYTES_PER_CHAR = 12
JSON_BYTES_PER_PICTURE_BYTE = 2
_JSON_BYTES_OF_OPTIONS = 64 * 2**10
# The largest request, as in HAProxy's rules (deploy/serve/sessions.cfg).
MAX_REQUEST_BYTES = 32 * 2**20
# A validator's error type: its message is complete.
DEFAULT_ABOVE_MAX = "default_above_max"


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _none_if(absent: str) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value == absent else value)


def _check_default_tokens(count: int, info: ValidationInfo) -> int:
    most = info.data.get("max_new_tokens", RequestLimits.model_fields["max_new_tokens"].default)
    if count > most:
        message = "must be at most `max_new_tokens` ({most}), got {count}"
        raise PydanticCustomError(DEFAULT_ABOVE_MAX, message, {"most": most, "count": count})
    return count


def _check_default_frames(count: int, info: ValidationInfo) -> int:
    most = info.data.get("max_frames", RequestLimits.model_fields["max_frames"].default)
    if count > most:
        message = "must be at most `max_frames` ({most}), got {count}"
        raise PydanticCustomError(DEFAULT_ABOVE_MAX, message, {"most": most, "count": count})
    return count


_Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple)]
_Device = Annotated[str, Field(pattern=r"^(cpu|cuda:(0|[1-9][0-9]*))$")]
_Devices = Annotated[tuple[_Device, ...], BeforeValidator(_as_tuple), Field(min_length=1, max_length=64)]
_TextOrNone = Annotated[str | None, _none_if("")]
_Bytes = Annotated[int | None, Field(ge=0, le=2**50), _none_if("auto")]


class Section(BaseModel):
    """Base of a mapping in the file. A key without a value has its default; an unknown key is a problem."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        return {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}


class RequestLimits(Section):
    """What one request may ask for."""

    max_prompt_chars: int = Field(default=32_768, ge=1, le=10_000_000, description="Characters of one question.")
    max_new_tokens: int = Field(
        default=1_024,
        ge=1,
        le=1_000_000,
        description="Tokens of one answer, at most: the largest `max_new_tokens` of a request.",
    )
    default_new_tokens: Annotated[int, Field(ge=1, le=1_000_000), AfterValidator(_check_default_tokens)] = Field(
        default=256,
        validate_default=True,
        description="Tokens of one answer if the request has no `max_new_tokens`. At most `max_new_tokens`.",
    )
    default_deadline_ms: int = Field(
        default=55_000,
        ge=1,
        le=600_000,
        description=(
            "Milliseconds from the arrival of a question to the end of its answer. Applies if the answer is not "
            "streamed and the request has no `deadline_ms`. SageMaker gives up after 60 s."
        ),
    )
    max_frames: int = Field(
        default=32, ge=1, le=1_000, description="Frames of a clip in one request: sent, or sampled from a file."
    )
    default_frames: Annotated[int, Field(ge=1, le=1_000), AfterValidator(_check_default_frames)] = Field(
        default=8,
        validate_default=True,
        description=(
            "Frames that are sampled from the file of a clip if the request has no `video_frames`. At most "
            "`max_frames`; a lower `max_frames` lowers this default."
        ),
    )
    max_pictures: int = Field(
        default=8, ge=1, le=1_000, description="Pictures in one request, at open or with a question."
    )

    max_history_messages: int = Field(
        default=256,
        ge=1,
        le=100_000,
        description="Messages of a conversation that a client sends, as `messages` or as `history`.",
    )
    max_history_chars: int = Field(
        default=131_072, ge=1, le=10_000_000, description="Characters of all texts of such a conversation."
    )
    max_history_pictures: int = Field(
        default=32, ge=1, le=1_000, description="Pictures of all messages of such a conversation."
    )

    @model_validator(mode="before")
    @classmethod
    def _fit_default_frames(cls, values: object) -> object:
        """Lower the default of `default_frames` to `max_frames`: a file that sets only `max_frames` stays valid."""
        default = cls.model_fields["default_frames"].default
        if isinstance(values, Mapping) and values.get("default_frames") is None:
            most = values.get("max_frames")
            if type(most) is int and 1 <= most < default:
                return {**values, "default_frames": most}
        return values

    max_stop_strings: ClassVar[int] = 8
    max_stop_chars: ClassVar[int] = 64


class MediaLimits(Section):
    """The sizes of pictures and clips, and the places from which they may come."""

    max_bytes: int = Field(default=10 * 2**20, ge=1, le=2**31, description="Bytes of one encoded picture.")
    max_pixels: int = Field(
        default=40_000_000,
        ge=1,
        le=2**31,
        description="Pixels of one decoded picture. Pillow itself rejects more than 178 million.",
    )
    max_request_pixels: int = Field(
        default=200_000_000,
        ge=1,
        le=2**40,
        description="Pixels of all pictures or frames of one request. Read from the headers, before any is decoded.",
    )
    max_clip_bytes: int = Field(default=20 * 2**20, ge=1, le=2**31, description="Bytes of the file of one clip.")
    max_clip_s: float = Field(
        default=600.0, ge=0.1, le=86_400, allow_inf_nan=False, description="Seconds that a clip is shown."
    )
    max_clip_pixels: int = Field(
        default=4096 * 2304,
        ge=1,
        le=2**31,
        description="Pixels of one frame of a clip's file. The memory of a process that decodes one follows from it.",
    )
    max_clip_frames: int = Field(
        default=40_000, ge=1, le=10_000_000, description="Frames of a clip's file, of which a few are decoded."
    )
    clip_timeout_s: float = Field(
        default=20.0,
        ge=0.1,
        le=600,
        allow_inf_nan=False,
        description="Seconds to read or to decode one clip, of time and of CPU time. A longer decoding is stopped.",
    )
    held_bytes: _Bytes = Field(
        default=None,
        description=(
            "Bytes of encoded pictures and clips that the worker's memory holds for all sessions. Equal ones count "
            "once. A request that would exceed it is rejected with 429. Those that are read from a journal count, and "
            "are never rejected. `auto`: 10 % of the RAM."
        ),
    )
    fetch_timeout_s: float = Field(
        default=10.0,
        ge=0.1,
        le=60,
        allow_inf_nan=False,
        description="Seconds to fetch one picture or clip: name look-up, redirects, headers and body.",
    )
    allowed_hosts: _Texts = Field(
        default=(),
        description='Hosts of `https` pictures and clips: exact names or `"*.suffix"`. Empty: any public host.',
    )
    s3_buckets: _Texts = Field(default=(), description="S3 buckets of pictures and clips. Empty: `s3://` is rejected.")
    local_roots: _Texts = Field(
        default=(), description="Directories of local pictures and clips. Empty: local paths are rejected."
    )

    # What messages call a file with these limits (media/limits.py, `clip_file_limits`).
    noun: ClassVar[str] = "picture"
    # Longer side / shorter side. A model's resize by the shorter side multiplies the longer one.
    max_aspect: ClassVar[float] = 100.0


class HandlerConfig(Section):
    """The `llava` section of the file."""

    checkpoint: str = Field(min_length=1, description="Folder in the archive, absolute path, or Hugging Face Hub ID.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description=(
            "Type of the weights. `auto` on CUDA: float16 for a float16 checkpoint, else bfloat16 if the device "
            "supports it, else float16. `auto` on a CPU: bfloat16 if it has instructions for it, else float32."
        ),
    )
    weights: Literal["auto", "int8"] = Field(
        default="auto",
        description=(
            "`int8`: the language model's linears are stored as 8-bit integers with a scale for each output, in half "
            "the memory of 16-bit weights. Some answers change (docs/models.md). Needs a GPU, or a CPU with bfloat16. "
            "`auto`: as `dtype`."
        ),
    )
    kv_dtype: Literal["auto", "int8"] = Field(
        default="auto",
        description=(
            "`int8`: KV caches hold 8-bit integers with a scale for each token and head. The same bytes hold 1.9 times "
            "the tokens of a 16-bit cache. Some answers change (docs/models.md). `auto`: as `dtype`."
        ),
    )
    device: str = Field(
        default="auto",
        description="The device of a single engine: `cpu`, `cuda`, `cuda:1` ... `auto`: as `devices`.",
    )
    devices: Annotated[_Devices | None, _none_if("auto")] = Field(
        default=None,
        description=(
            "One engine process for each device of the list, such as `[cuda:0, cuda:1]` or `[cpu, cpu]`. Each engine "
            "has its own copy of the weights. `auto`: all GPUs that CUDA shows to the worker, else the CPU. If "
            "`maxWorkers` is above 1, `auto` is the GPU that TorchServe assigns. Needs `device: auto`."
        ),
    )
    max_sessions: int = Field(
        default=64,
        ge=1,
        le=4096,
        description="Sessions that are open at once on one worker. The next open is rejected with 429.",
    )
    max_implicit_sessions: int = Field(
        default=64,
        ge=1,
        le=4096,
        description=(
            "Conversations without a session header whose state is kept at once. They are counted apart from "
            "`max_sessions`; the least recently used idle one is closed to admit a new one."
        ),
    )
    session_ttl_s: float = Field(
        default=1200.0,
        ge=1,
        le=86_400,
        allow_inf_nan=False,
        description="Seconds from the open of a session to its expiry, as its `Expires` states.",
    )
    session_idle_s: float | None = Field(
        default=None,
        ge=1,
        le=86_400,
        allow_inf_nan=False,
        description="Seconds from the last answer of a session to its expiry. Empty: only `session_ttl_s` counts.",
    )
    engine_hang_s: float = Field(
        default=60.0,
        ge=3,
        le=3600,
        allow_inf_nan=False,
        description=(
            "Seconds without a sign of life after which the engine process is replaced. It must exceed the time of the "
            "slowest picture."
        ),
    )
    journal_dir: _TextOrNone = Field(
        default=None, description="Absolute path of a directory for the sessions' journals. Empty: worker memory only."
    )
    journal_s3_prefix: _TextOrNone = Field(
        default=None, description="`s3://bucket/prefix` for the sessions' journals. Empty: worker memory only."
    )
    adopt_sessions: bool = Field(
        default=True,
        description=(
            "Take over a session of another instance from the journal when a request names it. Needs a journal that "
            "the instances share."
        ),
    )
    prefill_chunk_tokens: Annotated[int | None, Field(ge=1, le=65_536), _none_if("auto")] = Field(
        default=None,
        description=(
            "Tokens of a long prompt in one step while other sessions are answering. Their answers continue between. "
            "A step without answers runs a prompt whole, up to 4 times this number, on a GPU at most 2,048. `auto`: "
            "256 on a CPU; on a GPU 256 to 2,048, as many as take 50 ms."
        ),
    )
    device_bytes: _Bytes = Field(
        default=None,
        description=(
            "Bytes of device memory of one engine for vision features and KV caches. When they are full, idle KV "
            "caches are offloaded to the host, least recently used first. `auto`: on CUDA the memory left after the "
            "weights and a reserve (docs/operations.md), on CPU 30 % of the RAM, divided by the number of engines. A "
            "container's memory limit counts as its RAM."
        ),
    )
    host_bytes: _Bytes = Field(
        default=None,
        description=(
            "Bytes of host memory of one engine for offloaded KV caches. When they are full, the least recently used "
            "are dropped; a prefill rebuilds them. On CUDA the memory is pinned and counted as it is taken, in powers "
            "of two. `auto`: 20 % of the RAM, divided by the number of engines."
        ),
    )
    system_prompt: str = Field(
        default="", description="Text before each conversation, if the chat template has a place for it."
    )
    allow_system: bool = Field(
        default=True,
        description=(
            "Whether a client's `messages` may contain system messages. They follow `system_prompt`. `false`: such a "
            "request is rejected with 400."
        ),
    )
    share_pictures: bool = Field(
        default=True,
        description=(
            "Whether requests of different sessions share picture features and prefilled prompts, and may continue "
            "conversations without a session header. `false`: nothing is shared or searched, so no client can measure "
            "what another one has shown."
        ),
    )
    compat_metrics: Literal["none", "vllm"] = Field(
        default="none",
        description=(
            "`vllm`: the metrics page has eight metrics under vLLM's names too, which SageMaker's dashboards read "
            "(docs/operations.md)."
        ),
    )
    limits: RequestLimits = Field(default_factory=RequestLimits, description="Limits of requests.")
    media: MediaLimits = Field(default_factory=MediaLimits, description="Limits of pictures and clips.")


SECTIONS: dict[str, type[Section]] = {"limits": RequestLimits, "media": MediaLimits}


def frontend_capacity(max_sessions: int) -> int:
    """Return the smallest `batchSize` and `maxNumSequence` for a number of sessions.

    TorchServe keeps a sequence and a blocked thread for each session until it ends, expires or is rejected. The number
    includes sessions that just expired and requests that are about to be rejected.
    """
    return 2 * max_sessions + 16


def max_body_bytes(limits: RequestLimits, media: MediaLimits) -> int:
    """Return the size of the longest body that the limits and the fronts allow, in bytes.

    A clip counts as one picture. It is a file, or as many pictures as it has frames.
    """
    most_bytes = max(limits.max_frames * media.max_bytes, media.max_clip_bytes)
    encoded = max(limits.max_pictures, limits.max_history_pictures) * most_bytes
    chars = limits.max_prompt_chars + limits.max_history_chars
    longest = _JSON_BYTES_OF_OPTIONS + chars * _JSON_BYTES_PER_CHAR + encoded * JSON_BYTES_PER_PICTURE_BYTE
    return min(longest, MAX_REQUEST_BYTES)
