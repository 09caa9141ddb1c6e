"""Parse payloads and headers into `Open`, `Ask`, `Close` or `Cancel`. Pure.

A payload names its action by `type` (the AWS LLaVA sample's words) or by `requestType` (SageMaker's container standard,
which opens and closes only). The models below are the requests that the worker uses.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from ..config import RequestLimits
from ..errors import Refused, describe
from .bodies import read_object, shown
from .constants import INFERENCE_HEADER, NEW_SESSION, REQUEST_ID_PATTERN, SESSION_HEADER
from .fields import (
    TOO_LARGE,
    Frames,
    Images,
    NewTokens,
    Prompt,
    RequestId,
    SessionId,
    SessionToken,
    Stop,
    without_expiry,
)

_PICTURE_FIELDS = ("image", "images", "path")
_ACTION_FIELDS = {"type", "requestType"}
_UNKNOWN_NAMES_SHOWN = 5
# Commas, and opening brackets, outside of a question: 1,000 pictures, a URL and unknown fields have fewer.
_OTHER_VALUES = 2**16


@dataclass(frozen=True)
class PictureSource:
    """Where a picture comes from: `image` (base64 or data URL) or `path` (URL, or a path that the config allows)."""

    image: str | None = None
    path: str | None = None


class _Request(BaseModel):
    """Base of all requests. Problems are reported in the order of the fields.

    `messages`: the error message of each field, a template of `limits` and `actual`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    messages: ClassVar[Mapping[str, str]] = {
        "session_id": (
            f"`session_id` (or the {SESSION_HEADER} header) must be at most 226 letters, digits and inner hyphens, "
            "got {actual}"
        ),
        "session_token": "`session_token` must be 16 to 256 printable ASCII characters, got {actual}",
        "request_id": "`request_id` must be 16 to 64 printable ASCII characters, got {actual}",
        "image": "`image` must be a string (base64 or a data URL), got {actual}",
        "images": "`images` must be an array of 1 to {limits.max_pictures} strings, got {actual}",
        "path": "`path` must be a string (a URL or an allowed path), got {actual}",
    }


class _RetriableRequest(_Request):
    """A request that brings pictures and may be sent again.

    `retry_key` is a digest of the body and of its request ID, or else of SageMaker's Inference-Id. None without either.
    An Inference-Id may label a whole chat: it identifies a retry for a short time only, and never that of an open.
    """

    _retry_key: str | None = PrivateAttr(default=None)
    _has_request_id: bool = PrivateAttr(default=False)

    @property
    def retry_key(self) -> str | None:
        """Return the digest that a retry of this request has too."""
        return self._retry_key

    @property
    def stored_key(self) -> str | None:
        """Return the retry key if the body has a request ID, so that the key identifies a retry at any later time."""
        return self._retry_key if self._has_request_id else None


class Open(_RetriableRequest):
    """Open a session on pictures, on the frames of a clip (`video`), or from another session (`resume`).

    `resume` is the ID of a session, which ends. If the open has a `session_token`, all later requests must have the
    same token. A resume of a session with a token must have that token.
    """

    session_id: Literal["", "NEW_SESSION"] | None = None
    image: str | None = None
    images: Images | None = None
    path: str | None = None
    video: Frames | None = None
    resume: SessionId | None = None
    request_id: RequestId | None = None
    session_token: SessionToken | None = None

    messages: ClassVar[Mapping[str, str]] = {
        **_Request.messages,
        "session_id": "`session_id` must be absent from a request that opens a session, got {actual}",
        "video": "`video` must be an array of 1 to {limits.max_frames} strings, got {actual}",
        "resume": "`resume` must be at most 226 letters, digits and inner hyphens, got {actual}",
    }

    @property
    def pictures(self) -> tuple[PictureSource, ...]:
        """Return the pictures in the order in which they were sent."""
        return _sources(self.image, self.images, self.path)

    @property
    def frames(self) -> tuple[PictureSource, ...]:
        """Return the frames of the clip."""
        return tuple(PictureSource(image=frame) for frame in self.video or ())


class Ask(_RetriableRequest):
    """Run one turn.

    `temperature` 0 is greedy; `seed` None draws a random one. With `ignore_eos` an end-of-sequence token does not end
    the answer. Pictures are shown with the question. `deadline_ms` after its arrival the turn ends with the text that
    it has; None sets no deadline.
    """

    session_id: SessionId
    prompt_text: Prompt
    stream: bool = False
    max_new_tokens: NewTokens
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stop = ()
    ignore_eos: bool = False
    return_token_ids: bool = False
    request_id: RequestId | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=600_000)] | None
    image: str | None = None
    images: Images | None = None
    path: str | None = None
    session_token: SessionToken | None = None

    messages: ClassVar[Mapping[str, str]] = {
        **_Request.messages,
        "prompt_text": (
            "`prompt_text` must be Unicode text of 1 to {limits.max_prompt_chars} characters, not only white space, "
            "got {actual}"
        ),
        "stream": "`stream` must be true or false, got {actual}",
        "max_new_tokens": "`max_new_tokens` must be an integer from 1 to {limits.max_new_tokens}, got {actual}",
        "temperature": "`temperature` must be a number from 0 to 10, got {actual}",
        "top_p": "`top_p` must be a number above 0 and up to 1, got {actual}",
        "seed": "`seed` must be an integer from 0 to 9223372036854775807, got {actual}",
        "stop": (
            "`stop` must be a string of 1 to {limits.max_stop_chars} characters or an array of at most "
            "{limits.max_stop_strings} such strings, got {actual}"
        ),
        "ignore_eos": "`ignore_eos` must be true or false, got {actual}",
        "return_token_ids": "`return_token_ids` must be true or false, got {actual}",
        "deadline_ms": "`deadline_ms` must be an integer from 1 to 600000, got {actual}",
    }

    @property
    def pictures(self) -> tuple[PictureSource, ...]:
        """Return the pictures in the order in which they were sent."""
        return _sources(self.image, self.images, self.path)

    def without_pictures(self) -> Ask:
        """Return a copy without the pictures, which may take 32 MiB. It has the same retry key."""
        return self.model_copy(update=dict.fromkeys(_PICTURE_FIELDS))


class Close(_Request):
    """End a session and free its memory."""

    session_id: SessionId
    session_token: SessionToken | None = None


class Cancel(_Request):
    """End the running turn of a session; the session is as before that turn."""

    session_id: SessionId
    session_token: SessionToken | None = None


Request = Open | Ask | Close | Cancel

_TYPES: dict[str, type[Request]] = {
    "start_session": Open,
    "send_text_prompt": Ask,
    "close_session": Close,
    "cancel": Cancel,
}
# SageMaker's container standard (aws/model-hosting-container-standards, "Stateful sessions").
_REQUEST_TYPES: dict[str, type[Request]] = {"NEW_SESSION": Open, "CLOSE": Close}


@dataclass(frozen=True)
class _Problem:
    """One reason to reject a payload. `field` "" precedes all fields."""

    field: str
    code: str
    message: str


def parse(
    body: object, headers: Mapping[str, object], limits: RequestLimits, max_body_bytes: int | None = None
) -> Request:
    """Return the request of a body and its headers. Raise `Refused` (invalid_request, too_large, unsupported_media).

    `body`: parsed JSON if TorchServe parsed it, else `bytes` or `str`. `headers`: names in lower case. A body that is
    longer than `max_body_bytes`, or has very many values, is rejected before it is parsed. The message names every
    problem; the code is that of the first one.
    """
    payload = read_object(body, headers, max_body_bytes, limits.max_prompt_chars + _OTHER_VALUES)
    model = _model(payload)
    # A null counts as an absent field.
    fields = {name: value for name, value in payload.items() if value is not None and name in model.model_fields}
    problems = [*_unknown_fields(payload, model), *_conflicts(model, fields)]
    if model is not Open:
        problems += _merge_session_id(fields, headers)
    if model is Ask:
        _add_defaults(fields, limits)
    request, malformed = _validated(model, fields, limits)
    problems += malformed
    if problems or request is None:
        raise _refusal(problems, model)
    if isinstance(request, _RetriableRequest):
        request._has_request_id = request.request_id is not None
        request._retry_key = _retry_key(request.request_id or _inference_id(headers), payload)
    return request


def session_in_header(headers: Mapping[str, object]) -> str | None:
    """Return the session ID in the headers; None if it is absent, empty or the constant NEW_SESSION."""
    value = headers.get(SESSION_HEADER.lower())
    value = value.strip() if isinstance(value, str) else ""
    value = str(without_expiry(value))
    return value if value and value != NEW_SESSION else None


def _model(payload: dict[str, Any]) -> type[Request]:
    """Return the model that the payload's `type` or `requestType` names."""
    action = payload.get("type")
    standard = payload.get("requestType")
    if action is not None and standard is not None:
        raise Refused("invalid_request", "the request must have either `type` or `requestType`, got both")
    model: type[Request] | None
    if standard is not None:
        model = _REQUEST_TYPES.get(standard) if isinstance(standard, str) else None
        message = f"`requestType` must be 'NEW_SESSION' or 'CLOSE', got {shown(standard)}"
    else:
        model = _TYPES.get(action) if isinstance(action, str) else None
        known = "'start_session', 'send_text_prompt', 'close_session' or 'cancel'"
        message = f"`type` must be {known}, got {'nothing' if action is None else shown(action)}"
    if model is None:
        raise Refused("invalid_request", message)
    return model


def _unknown_fields(payload: dict[str, Any], model: type[Request]) -> list[_Problem]:
    known = model.model_fields.keys() | _ACTION_FIELDS
    unknown = [name for name in payload if name not in known]
    if not unknown:
        return []
    # Not sorted: a call over millions of names would hold the GIL for a second.
    got = ", ".join(shown(name) for name in heapq.nsmallest(_UNKNOWN_NAMES_SHOWN, unknown))
    if len(unknown) > _UNKNOWN_NAMES_SHOWN:
        got += f" and {len(unknown) - _UNKNOWN_NAMES_SHOWN:,} more"
    message = f"the fields must be among {', '.join(sorted(known))}, got unknown field {got}"
    return [_Problem("", "invalid_request", message)]


def _conflicts(model: type[Request], fields: dict[str, Any]) -> Iterator[_Problem]:
    """Yield the problems of fields that exclude each other, and of an open without a picture."""
    pictures = [name for name in _PICTURE_FIELDS if name in fields]
    if len(pictures) > 1:
        got = " and ".join(f"`{name}`" for name in pictures)
        message = f"a request must have at most one of `image`, `images` and `path`, got {got}"
        yield _Problem("image", "invalid_request", message)
    if model is not Open:
        return
    if "resume" in fields and (pictures or "video" in fields):
        message = "a request must have either `resume` or pictures, got both"
        yield _Problem("resume", "invalid_request", message)
    elif pictures and "video" in fields:
        message = "a request that opens a session must have either pictures or a `video`, got both"
        yield _Problem("resume", "invalid_request", message)
    elif not pictures and not fields.keys() & {"video", "resume"}:
        expected = "`image`, `images`, `path`, `video` or `resume`"
        message = f"a request that opens a session must have {expected}, got no picture"
        yield _Problem("resume", "invalid_request", message)


def _merge_session_id(fields: dict[str, Any], headers: Mapping[str, object]) -> list[_Problem]:
    """Set the session ID of the header if the body has none. Return a problem if both have one and they differ."""
    in_header = session_in_header(headers)
    in_body = without_expiry(fields.get("session_id"))
    if in_header is None:
        return []
    if in_body in (None, ""):
        fields["session_id"] = in_header
        return []
    if not isinstance(in_body, str) or in_body == in_header:
        return []
    message = f"`session_id` and the {SESSION_HEADER} header must be the same, got two session IDs"
    return [_Problem("session_id", "invalid_request", message)]


def _add_defaults(fields: dict[str, Any], limits: RequestLimits) -> None:
    """Set the defaults of an ask that the configuration decides.

    A whole answer must arrive before SageMaker gives up (60 s). The chunks of a stream keep its connection open.
    """
    fields.setdefault("max_new_tokens", limits.default_new_tokens)
    fields.setdefault("deadline_ms", None if fields.get("stream") is True else limits.default_deadline_ms)


def _validated(
    model: type[Request], fields: dict[str, Any], limits: RequestLimits
) -> tuple[Request | None, list[_Problem]]:
    """Return the request, or one problem for each malformed field."""
    try:
        return model.model_validate(fields, context=limits), []
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
    problems: dict[str, _Problem] = {}
    for detail in details:
        field = str(detail["loc"][0])
        code = TOO_LARGE if detail["type"] == TOO_LARGE else "invalid_request"
        actual = describe(fields[field]) if field in fields else "nothing"
        message = model.messages[field].format(limits=limits, actual=actual)
        problems.setdefault(field, _Problem(field, code, message))
    return None, list(problems.values())


def _refusal(problems: list[_Problem], model: type[Request]) -> Refused:
    """Return one refusal for all problems, in the order of the fields."""
    order = ["", *model.model_fields]
    ordered = sorted(problems, key=lambda problem: order.index(problem.field))
    return Refused(ordered[0].code, "; ".join(problem.message for problem in ordered))


def _inference_id(headers: Mapping[str, object]) -> str | None:
    """Return SageMaker's own request ID if it has the form of a `request_id`."""
    value = headers.get(INFERENCE_HEADER.lower())
    return value if isinstance(value, str) and REQUEST_ID_PATTERN.fullmatch(value) else None


def _retry_key(request_id: str | None, payload: dict[str, Any]) -> str | None:
    """Return a digest of the request ID and the body.

    With the body in the digest, another client with the same ID doesn't get this client's session. `stream` is left
    out: it changes the form of an answer only.
    """
    if request_id is None:
        return None
    body = json.dumps({name: value for name, value in payload.items() if name != "stream"}, sort_keys=True)
    return hashlib.sha256(f"{request_id} {body}".encode()).hexdigest()


def _sources(image: str | None, images: tuple[str, ...] | None, path: str | None) -> tuple[PictureSource, ...]:
    if image is not None:
        return (PictureSource(image=image),)
    if path is not None:
        return (PictureSource(path=path),)
    return tuple(PictureSource(image=image) for image in images or ())
