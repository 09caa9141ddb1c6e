"""Types of the payloads' fields. Limits of the configuration come from the validation context. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from ..config import RequestLimits
from .constants import (
    ANNOUNCED_ID_MAX_CHARS,
    ANNOUNCED_ID_PATTERN,
    REQUEST_ID_PATTERN,
    SESSION_ID_MAX_CHARS,
    SESSION_ID_PATTERN,
    SESSION_TOKEN_PATTERN,
)

# The error type of a value that has the right form but exceeds a limit.
TOO_LARGE = "too_large"


def limits_of(info: ValidationInfo) -> RequestLimits:
    """Return the configured limits of requests."""
    return info.context if isinstance(info.context, RequestLimits) else RequestLimits()


def _check_prompt(text: str, info: ValidationInfo) -> str:
    if len(text) > limits_of(info).max_prompt_chars:
        raise PydanticCustomError(TOO_LARGE, "too many characters")
    if not text.strip() or not is_unicode(text):
        raise ValueError("empty, or with a lone surrogate")
    return text


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: it has no lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_new_tokens(count: int, info: ValidationInfo) -> int:
    if count > limits_of(info).max_new_tokens:
        raise ValueError("above the limit")
    return count


def _check_min_tokens(count: int, info: ValidationInfo) -> int:
    if count > info.data.get("max_new_tokens", limits_of(info).max_new_tokens):
        raise ValueError("above the number of new tokens")
    return count


def _check_frames(count: int, info: ValidationInfo) -> int:
    if count > limits_of(info).max_frames:
        raise ValueError("above the limit")
    return count


def _check_sampled_frames(count: int | None, info: ValidationInfo) -> int | None:
    """Return the number of frames to sample. The default is that of the configuration, for a file only."""
    limits = limits_of(info)
    has_file = isinstance(info.data.get("video"), str)
    if count is None:
        return limits.default_frames if has_file else None
    if "video" in info.data and not has_file:
        raise ValueError("without a file")
    return count


def _check_unicode(text: str) -> str:
    if not is_unicode(text):
        raise ValueError("a lone surrogate")
    return text


def _check_stop(texts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    limits = limits_of(info)
    if not all(texts):
        raise ValueError("an empty string")
    if len(texts) > limits.max_stop_strings or any(len(text) > limits.max_stop_chars for text in texts):
        raise PydanticCustomError(TOO_LARGE, "too many strings, or too long")
    return texts


def _one_or_many(value: object) -> object:
    """Read a string as an array of one."""
    return (value,) if isinstance(value, str) else as_tuple(value)


def as_tuple(value: object) -> object:
    """Make an array immutable. Leave anything else to the validation of the field."""
    return tuple(value) if isinstance(value, list) else value


def _at_most(limit: str) -> Callable[[object, ValidationInfo], object]:
    """Return a validator of an array's length, before its items are looked at."""

    def check(value: object, info: ValidationInfo) -> object:
        if isinstance(value, list) and len(value) > getattr(limits_of(info), limit):
            raise PydanticCustomError(TOO_LARGE, "too many items")
        return as_tuple(value)

    return check


def without_expiry(value: object) -> object:
    """Return the session ID of a value "ID; Expires=...", which announces a session. Return other values unchanged."""
    if not isinstance(value, str) or len(value) > ANNOUNCED_ID_MAX_CHARS:
        return value
    announced = ANNOUNCED_ID_PATTERN.fullmatch(value)
    return announced[1] if announced else value


SessionId = Annotated[
    str,
    BeforeValidator(without_expiry),
    Field(max_length=SESSION_ID_MAX_CHARS, pattern=f"^{SESSION_ID_PATTERN.pattern}$"),
]
SessionToken = Annotated[str, Field(pattern=f"^{SESSION_TOKEN_PATTERN.pattern}$")]
RequestId = Annotated[str, Field(pattern=f"^{REQUEST_ID_PATTERN.pattern}$")]
ConfirmSeconds = Annotated[int, Field(ge=1, le=600)]
Prompt = Annotated[str, AfterValidator(_check_prompt)]
NewTokens = Annotated[int, Field(ge=1), AfterValidator(_check_new_tokens)]
MinTokens = Annotated[int, Field(ge=0), AfterValidator(_check_min_tokens)]
Answer = Annotated[str, AfterValidator(_check_unicode)]
Stop = Annotated[tuple[str, ...], Field(fail_fast=True), BeforeValidator(_one_or_many), AfterValidator(_check_stop)]
Images = Annotated[tuple[str, ...], Field(min_length=1, fail_fast=True), BeforeValidator(_at_most("max_pictures"))]
Frames = Annotated[int, Field(ge=1), AfterValidator(_check_frames)]
# A file, or the frames of a clip.
Video = Annotated[
    Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1, fail_fast=True)],
    BeforeValidator(_at_most("max_frames")),
]
# Follows the field `video`. None with a clip of frames, and without a clip.
SampledFrames = Annotated[Frames | None, AfterValidator(_check_sampled_frames), Field(validate_default=True)]
