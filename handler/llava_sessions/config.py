"""The declared form of `model-config.yaml`: keys, types, defaults, ranges, and limits of requests and media. Pure.

scripts/configuration_page.py prints docs/configuration.md from these models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from .errors import describe

# How long TorchServe keeps a sequence after its session expired, in seconds. Longer than the longest turn.
FRONTEND_MARGIN_S = 120
# An escaped character is at most 12 bytes of JSON; base64 with line breaks and escapes is at most twice the picture.
_JSON_BYTES_PER_CHAR = 12
JSON_BYTES_PER_PICTURE_BYTE = 2
_JSON_BYTES_OF_OPTIONS = 64 * 2**10
# The largest request, as in HAProxy's rules (deploy/serve/sessions.cfg).
MAX_REQUEST_BYTES = 32 * 2**20
_TEXT_MAX_CHARS = 40
# A validator's error type: its message is complete.
_DEFAULT_ABOVE_MAX = "default_above_max"


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _none_if(absent: str) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value == absent else value)


def _check_default_tokens(count: int, info: ValidationInfo) -> int:
    most = info.data.get("max_new_tokens", RequestLimits.model_fields["max_new_tokens"].default)
    if count > most:
        message = "must be at most `max_new_tokens` ({most}), got {count}"
        raise PydanticCustomError(_DEFAULT_ABOVE_MAX, message, {"most": most, "count": count})
    return count


_Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple)]
_TextOrNone = Annotated[str | None, _none_if("")]
_Bytes = Annotated[int | None, Field(ge=0, le=2**50), _none_if("auto")]


class ConfigError(Exception):
    """The configuration is unusable. The message has every problem, one in a line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class _Section(BaseModel):
    """Base of a mapping in the file. A key without a value has its default; an unknown key is a problem."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        return {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}


class RequestLimits(_Section):
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
    max_frames: int = Field(default=32, ge=1, le=1_000, description="Frames of a clip in one request.")
    max_pictures: int = Field(
        default=8, ge=1, le=1_000, description="Pictures in one request, at open or with a question."
    )

    max_stop_strings: ClassVar[int] = 8
    max_stop_chars: ClassVar[int] = 64


class MediaLimits(_Section):
    """The sizes of pictures, and the places from which they may come."""

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
    held_bytes: _Bytes = Field(
        default=None,
        description=(
            "Bytes of encoded pictures that the worker's memory holds for all sessions. Equal pictures count once. A "
            "request that would exceed it is rejected with 429. Pictures that are read from a journal count, and are "
            "never rejected. `auto`: 10 % of the RAM."
        ),
    )
    fetch_timeout_s: float = Field(
        default=10.0,
        ge=0.1,
        le=60,
        allow_inf_nan=False,
        description="Seconds to fetch one picture: name look-up, redirects, headers and body.",
    )
    allowed_hosts: _Texts = Field(
        default=(), description='Hosts of `https` pictures: exact names or `"*.suffix"`. Empty: any public host.'
    )
    s3_buckets: _Texts = Field(default=(), description="S3 buckets of pictures. Empty: `s3://` is rejected.")
    local_roots: _Texts = Field(
        default=(), description="Directories of local pictures. Empty: local paths are rejected."
    )

    # Longer side / shorter side. A model's resize by the shorter side multiplies the longer one.
    max_aspect: ClassVar[float] = 100.0


class HandlerConfig(_Section):
    """The `llava` section of the file."""

    checkpoint: str = Field(min_length=1, description="Folder in the archive, absolute path, or Hugging Face Hub ID.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description=(
            "Type of the weights. `auto` on CUDA: float16 for a float16 checkpoint, else bfloat16 if the device "
            "supports it, else float16. `auto` on a CPU: bfloat16 if it has instructions for it, else float32."
        ),
    )
    device: str = Field(
        default="auto", description="`cpu`, `cuda`, `cuda:1` ... `auto`: the GPU that TorchServe assigns, else the CPU."
    )
    max_sessions: int = Field(
        default=64,
        ge=1,
        le=4096,
        description="Sessions that are open at once on one worker. The next open is rejected with 429.",
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
    prefill_chunk_tokens: int = Field(
        default=256,
        ge=1,
        le=65_536,
        description="Tokens of a long prompt in one step. Other sessions' answers continue between.",
    )
    device_bytes: _Bytes = Field(
        default=None,
        description=(
            "Bytes of device memory for vision features and KV caches. When they are full, idle KV caches are "
            "offloaded to the host, least recently used first. `auto`: on CUDA the memory left after the weights "
            "and a reserve (docs/operations.md), on CPU 30 % of the RAM. A container's memory limit counts as its RAM."
        ),
    )
    host_bytes: _Bytes = Field(
        default=None,
        description=(
            "Bytes of host memory for offloaded KV caches. When they are full, the least recently used are dropped; a "
            "prefill rebuilds them. On CUDA the memory is pinned and counted as it is taken, in powers of two. `auto`: "
            "20 % of the RAM."
        ),
    )
    system_prompt: str = Field(
        default="", description="Text before each conversation, if the chat template has a place for it."
    )
    limits: RequestLimits = Field(default_factory=RequestLimits, description="Limits of requests.")
    media: MediaLimits = Field(default_factory=MediaLimits, description="Limits of pictures.")


SECTIONS: dict[str, type[_Section]] = {"limits": RequestLimits, "media": MediaLimits}


def frontend_capacity(max_sessions: int) -> int:
    """Return the smallest `batchSize` and `maxNumSequence` for a number of sessions.

    TorchServe keeps a sequence and a blocked thread for each session until it ends, expires or is rejected. The number
    includes sessions that just expired and requests that are about to be rejected.
    """
    return 2 * max_sessions + 16


def max_body_bytes(limits: RequestLimits, media: MediaLimits) -> int:
    """Return the size of the longest body that the limits and the fronts allow, in bytes."""
    pictures = max(limits.max_pictures, limits.max_frames) * media.max_bytes * JSON_BYTES_PER_PICTURE_BYTE
    longest = _JSON_BYTES_OF_OPTIONS + limits.max_prompt_chars * _JSON_BYTES_PER_CHAR + pictures
    return min(longest, MAX_REQUEST_BYTES)


def read_config(model_yaml: Mapping[str, Any]) -> HandlerConfig:
    """Return the handler's part of `model-config.yaml`. Raise `ConfigError` with every problem of the file."""
    section = model_yaml.get("llava")
    if not isinstance(section, Mapping):
        raise ConfigError([f"`llava` must be a mapping, got {_shown(section)}"])
    problems: dict[str, str] = {}
    config: HandlerConfig | None = None
    try:
        config = HandlerConfig.model_validate(section)
    except ValidationError as error:
        problems = _problems_by_key(error, section)

    def value_of(key: str) -> Any:
        """Return a key's value, or its default if the value is absent or malformed."""
        value = None if f"llava.{key}" in problems else section.get(key)
        return HandlerConfig.model_fields[key].default if value is None else value

    frontend = _frontend_problems(model_yaml, value_of("max_sessions"), value_of("session_ttl_s"))
    every = [*problems.values(), *frontend]
    if every or config is None:
        raise ConfigError(every)
    return config


def expected(field: FieldInfo) -> str:
    """Return the values that a key may have, in words for messages and for the documentation."""
    kind = field.annotation
    if kind in SECTIONS.values():
        return "a mapping"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return "a list of non-empty strings"
    if kind is bool:
        return "true or false"
    kinds = get_args(kind) or (kind,)
    if str in kinds:
        return "a non-empty string" if field.is_required() else "a string"
    low = next(limit.ge for limit in field.metadata if isinstance(limit, Ge))
    high = next(limit.le for limit in field.metadata if isinstance(limit, Le))
    number = f"{'an integer' if int in kinds else 'a number'} from {low} to {high}"
    return f"auto or {number}" if kind == int | None else number


def default_of(field: FieldInfo) -> str:
    """Return the default of a key as it is written in the file."""
    if field.is_required():
        return "required"
    if field.default is None:
        return "`auto`" if field.annotation == int | None else "empty"
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{default:g}`" if isinstance(default, float) else f"`{json.dumps(default)}`"


def _problems_by_key(error: ValidationError, section: Mapping[str, Any]) -> dict[str, str]:
    """Return one message for each malformed or unknown key."""
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_input=False):
        section_name = str(detail["loc"][0])
        if len(detail["loc"]) > 1 and section_name in SECTIONS:
            key, path = detail["loc"][1], f"llava.{section_name}.{detail['loc'][1]}"
            problem = _problem(path, key, SECTIONS[section_name], section[section_name], detail)
        else:
            key, path = detail["loc"][0], f"llava.{section_name}"
            problem = _problem(path, key, HandlerConfig, section, detail)
        problems.setdefault(path, problem)
    return problems


def _problem(path: str, key: object, model: type[_Section], values: Mapping[Any, Any], detail: ErrorDetails) -> str:
    field = model.model_fields.get(str(key))
    if field is None:
        return f"`{path}` must be one of the keys {', '.join(sorted(model.model_fields))}, got an unknown key"
    if detail["type"] == _DEFAULT_ABOVE_MAX:
        return f"`{path}` {detail['msg']}"
    return f"`{path}` must be {expected(field)}, got {_shown(values.get(key))}"


def _frontend_problems(model_yaml: Mapping[str, Any], max_sessions: int, session_ttl_s: float) -> Iterator[str]:
    """Yield the problems of TorchServe's own keys on which sessions depend."""
    for key in ("sequenceBatching", "continuousBatching"):
        if model_yaml.get(key) is not True:
            yield f"`{key}` must be true, got {_shown(model_yaml.get(key))}"
    capacity = frontend_capacity(max_sessions)
    for key in ("batchSize", "maxNumSequence"):
        if _is_below(model_yaml.get(key), capacity):
            least = f"{capacity} for {max_sessions} `llava.max_sessions`"
            yield f"`{key}` must be an integer of at least {least}, got {_shown(model_yaml.get(key))}"
    shortest_ms = (session_ttl_s + FRONTEND_MARGIN_S) * 1000
    for key in ("sequenceTimeoutMSec", "sequenceMaxIdleMSec"):
        if _is_below(model_yaml.get(key), shortest_ms):
            least = f"{shortest_ms:.0f} (`llava.session_ttl_s` and {FRONTEND_MARGIN_S} s)"
            yield f"`{key}` must be an integer of at least {least}, got {_shown(model_yaml.get(key))}"
    workers = model_yaml.get("maxWorkers", 1)
    batch = model_yaml.get("batchSize")
    sequences = model_yaml.get("maxNumSequence")
    if isinstance(workers, int) and isinstance(batch, int) and isinstance(sequences, int):
        # TorchServe stalls the requests of further sequences.
        most = workers * batch
        if sequences > most:
            yield f"`maxNumSequence` must be at most maxWorkers * batchSize ({most}), got {sequences}"


def _is_below(value: object, least: float) -> bool:
    return not isinstance(value, int) or value < least


def _shown(value: object) -> str:
    """Return a short form of a value of the file; only short strings are shown."""
    return repr(value) if isinstance(value, str) and len(value) <= _TEXT_MAX_CHARS else describe(value)
