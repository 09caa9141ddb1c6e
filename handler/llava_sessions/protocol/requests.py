"""The native requests that the worker uses: `Open`, `Ask`, `Close`, `Cancel` and `Describe`. Pure. See `parsing`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationInfo
from pydantic_core import PydanticCustomError

from ..media.limits import MAX_URL_CHARS, scheme_of
from .constants import NEW_SESSION, SESSION_HEADER
from .fields import (
    TOO_LARGE,
    Answer,
    ConfirmSeconds,
    Images,
    MinTokens,
    NewTokens,
    Prompt,
    RequestId,
    SampledFrames,
    SessionId,
    SessionToken,
    Stop,
    Video,
    as_tuple,
    limits_of,
    without_expiry,
)

PICTURE_FIELDS = ("image", "images", "path")
CLIP_FIELDS = ("video", "video_frames")
PROMPT_EXPECTED = (
    "`{name}` must be Unicode text of 1 to {limits.max_prompt_chars} characters, not only white space, got {actual}"
)


@dataclass(frozen=True)
class PictureSource:
    """Where a picture comes from: `image` (base64 or data URL) or `path` (URL, or a path that the config allows)."""

    image: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class ClipSource:
    """Where a clip comes from: its `frames`, in their order, or a video `file`.

    `count`: how many frames of the file are sampled; None with frames.
    """

    frames: tuple[PictureSource, ...] = ()
    file: PictureSource | None = None
    count: int | None = None

    @property
    def sources(self) -> tuple[PictureSource, ...]:
        """Return what is read for the clip: its frames, or its file alone."""
        return self.frames if self.file is None else (self.file,)


class BaseRequest(BaseModel):
    """Base of all requests. Problems are reported in the order of `first`, then in that of the fields.

    `expected`: the error message of each field, a template of `name` (the client's name of the field), `limits` and
    `actual`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    first: ClassVar[tuple[str, ...]] = ()
    expected: ClassVar[Mapping[str, str]] = {
        "session_id": (
            f"`session_id` (or the {SESSION_HEADER} header) must be at most 226 letters, digits and inner hyphens, "
            "got {actual}"
        ),
        "session_token": "`session_token` must be 16 to 256 printable ASCII characters, got {actual}",
        "request_id": "`request_id` must be 16 to 64 printable ASCII characters, got {actual}",
        "image": "`{name}` must be a string (base64 or a data URL), got {actual}",
        "images": "`{name}` must be an array of 1 to {limits.max_pictures} strings, got {actual}",
        "path": "`{name}` must be a string (a URL or an allowed path), got {actual}",
        "video": (
            "`{name}` must be a string (a video file) or an array of 1 to {limits.max_frames} strings (frames), "
            "got {actual}"
        ),
        "video_frames": (
            "`{name}` must be an integer from 1 to {limits.max_frames}, with a `video` that is a file, got {actual}"
        ),
    }


class RetriableRequest(BaseRequest):
    """A request that brings pictures and may be sent again.

    `retry_key` is a digest of the body and of its request ID, or else of SageMaker's Inference-Id. None without either.
    An Inference-Id may label a whole chat: it identifies a retry for a short time only, and never that of an open.
    """

    _retry_key: str | None = PrivateAttr(default=None)
    _has_request_id: bool = PrivateAttr(default=False)

    def set_retry_key(self, retry_key: str | None, has_request_id: bool) -> None:
        """Set the retry key. `has_request_id`: it is made of the body's `request_id`."""
        self._retry_key = retry_key
        self._has_request_id = has_request_id

    @property
    def retry_key(self) -> str | None:
        """Return the digest that a retry of this request has too."""
        return self._retry_key

    @property
    def stored_key(self) -> str | None:
        """Return the retry key if the body has a request ID, so that the key identifies a retry at any later time."""
        return self._retry_key if self._has_request_id else None


class PastTurn(BaseRequest):
    """A question of an earlier conversation with its pictures and its clip, and its answer."""

    prompt_text: Prompt
    image: str | None = None
    images: Images | None = None
    path: str | None = None
    video: Video | None = None
    video_frames: SampledFrames = None
    response_text: Answer

    expected: ClassVar[Mapping[str, str]] = {
        **BaseRequest.expected,
        "prompt_text": PROMPT_EXPECTED,
        "response_text": "`{name}` must be Unicode text, got {actual}",
    }

    @property
    def pictures(self) -> tuple[PictureSource, ...]:
        """Return the pictures in the order in which they were sent."""
        return _sources(self.image, self.images, self.path)

    @property
    def clip(self) -> ClipSource | None:
        """Return the clip, or None without one."""
        return _clip(self.video, self.video_frames)


def _check_turns(value: object, info: ValidationInfo) -> object:
    """Check the number of turns before any is read."""
    if isinstance(value, list) and 2 * len(value) > limits_of(info).max_history_messages:
        raise PydanticCustomError(TOO_LARGE, "too many turns")
    return as_tuple(value)


def _check_history(turns: tuple[PastTurn, ...], info: ValidationInfo) -> tuple[PastTurn, ...]:
    limits = limits_of(info)
    chars = sum(len(turn.prompt_text) + len(turn.response_text) for turn in turns)
    pictures = sum(len(turn.pictures) + (turn.clip is not None) for turn in turns)
    if chars > limits.max_history_chars or pictures > limits.max_history_pictures:
        raise PydanticCustomError(TOO_LARGE, "too much text, or too many pictures")
    return turns


History = Annotated[
    tuple[PastTurn, ...], Field(fail_fast=True), BeforeValidator(_check_turns), AfterValidator(_check_history)
]


class Open(RetriableRequest):
    """Open a session on pictures, on a clip (`video`), or from another session (`resume`).

    `history`: earlier turns, which follow the session's own pictures and are prefilled as they are. `resume` is the ID
    of a session, which ends. If the open has a `session_token`, all later requests must have the same token. A resume
    of a session with a token must have that token. NEW_SESSION alone opens a session on nothing. `confirm_s`: the
    session expires so soon unless another request names it.
    """

    session_id: Literal["", "NEW_SESSION"] | None = None
    image: str | None = None
    images: Images | None = None
    path: str | None = None
    video: Video | None = None
    video_frames: SampledFrames = None
    history: History = ()
    resume: SessionId | None = None
    confirm_s: ConfirmSeconds | None = None
    request_id: RequestId | None = None
    session_token: SessionToken | None = None

    expected: ClassVar[Mapping[str, str]] = {
        **BaseRequest.expected,
        "session_id": "`session_id` must be absent from a request that opens a session, got {actual}",
        "history": (
            "`history` must be an array of turns: at most {limits.max_history_messages} questions and answers of "
            "{limits.max_history_chars} characters and {limits.max_history_pictures} pictures and clips together, "
            "got {actual}"
        ),
        "resume": "`resume` must be at most 226 letters, digits and inner hyphens, got {actual}",
        "confirm_s": "`confirm_s` must be an integer from 1 to 600, got {actual}",
    }

    @property
    def pictures(self) -> tuple[PictureSource, ...]:
        """Return the pictures in the order in which they were sent."""
        return _sources(self.image, self.images, self.path)

    @property
    def clip(self) -> ClipSource | None:
        """Return the clip, or None without one."""
        return _clip(self.video, self.video_frames)


class TurnRequest(RetriableRequest):
    """Base of the requests that run one turn: how its answer is generated and sent.

    `temperature` 0 is greedy; `seed` None draws a random one. With `ignore_eos` an end-of-sequence token does not end
    the answer. None ends it before it has `min_tokens` tokens. `deadline_ms` after its arrival the turn ends with the
    text that it has; None sets no deadline.
    """

    stream: bool = False
    max_new_tokens: NewTokens
    min_tokens: MinTokens = 0
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stop = ()
    ignore_eos: bool = False
    request_id: RequestId | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=600_000)] | None
    session_token: SessionToken | None = None

    expected: ClassVar[Mapping[str, str]] = {
        **BaseRequest.expected,
        "stream": "`stream` must be true or false, got {actual}",
        "max_new_tokens": "`{name}` must be an integer from 1 to {limits.max_new_tokens}, got {actual}",
        "min_tokens": "`min_tokens` must be an integer from 0 to the most tokens of the answer, got {actual}",
        "temperature": "`temperature` must be a number from 0 to 10, got {actual}",
        "top_p": "`top_p` must be a number above 0 and up to 1, got {actual}",
        "seed": "`seed` must be an integer from 0 to 9223372036854775807, got {actual}",
        "stop": (
            "`stop` must be a string of 1 to {limits.max_stop_chars} characters or an array of at most "
            "{limits.max_stop_strings} such strings, got {actual}"
        ),
        "ignore_eos": "`ignore_eos` must be true or false, got {actual}",
        "deadline_ms": "`deadline_ms` must be an integer from 1 to 600000, got {actual}",
    }


class Ask(TurnRequest):
    """Run one turn of a session. Pictures and a clip are shown with the question."""

    session_id: SessionId
    prompt_text: Prompt
    return_token_ids: bool = False
    image: str | None = None
    images: Images | None = None
    path: str | None = None
    video: Video | None = None
    video_frames: SampledFrames = None

    first: ClassVar[tuple[str, ...]] = ("session_id", "prompt_text")
    expected: ClassVar[Mapping[str, str]] = {
        **TurnRequest.expected,
        "prompt_text": PROMPT_EXPECTED,
        "return_token_ids": "`return_token_ids` must be true or false, got {actual}",
    }

    @property
    def pictures(self) -> tuple[PictureSource, ...]:
        """Return the pictures in the order in which they were sent."""
        return _sources(self.image, self.images, self.path)

    @property
    def clip(self) -> ClipSource | None:
        """Return the clip, or None without one."""
        return _clip(self.video, self.video_frames)

    def without_pictures(self) -> Ask:
        """Return a copy without pictures and clip, which may take 32 MiB. It has the same retry key."""
        return self.model_copy(update=dict.fromkeys((*PICTURE_FIELDS, *CLIP_FIELDS)))


class Close(BaseRequest):
    """End a session and free its memory."""

    session_id: SessionId
    session_token: SessionToken | None = None


class Cancel(BaseRequest):
    """End the running turn of a session; the session is as before that turn."""

    session_id: SessionId
    session_token: SessionToken | None = None


class Describe(BaseRequest):
    """Report where a session's KV cache is, its memory and its expiry. Changes nothing and renews nothing."""

    session_id: SessionId
    session_token: SessionToken | None = None


def session_in_header(headers: Mapping[str, object]) -> str | None:
    """Return the session ID in the headers; None if it is absent, empty or the constant NEW_SESSION."""
    value = headers.get(SESSION_HEADER.lower())
    value = value.strip() if isinstance(value, str) else ""
    value = str(without_expiry(value))
    return value if value and value != NEW_SESSION else None


def _sources(image: str | None, images: tuple[str, ...] | None, path: str | None) -> tuple[PictureSource, ...]:
    if image is not None:
        return (PictureSource(image=image),)
    if path is not None:
        return (PictureSource(path=path),)
    return tuple(PictureSource(image=image) for image in images or ())


def _clip(video: str | tuple[str, ...] | None, count: int | None) -> ClipSource | None:
    """Return the clip of a request: a file if `video` is a string, else frames."""
    if video is None:
        return None
    if isinstance(video, str):
        return ClipSource(file=_file(video), count=count)
    return ClipSource(frames=tuple(PictureSource(image=frame) for frame in video))


def _file(text: str) -> PictureSource:
    """Return the source of a video file. No format of a video begins with a slash in base64, but JPEG does."""
    start = text[:MAX_URL_CHARS].lstrip()
    is_path = scheme_of(start) != "" or (start.startswith("/") and len(text) <= MAX_URL_CHARS)
    return PictureSource(path=text) if is_path else PictureSource(image=text)
