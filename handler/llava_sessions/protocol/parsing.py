"""Parse payloads and headers into requests. Pure.

A payload names its action by `type` (the AWS LLaVA sample's words), by `requestType` (SageMaker's container standard,
which opens and closes only) or by `messages` (OpenAI's words).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import Any

from ..config import RequestLimits
from ..errors import Refused
from .bodies import read_object, shown
from .chat_payload import parse_chat
from .constants import PATH_HEADER, SESSION_HEADER
from .fields import without_expiry
from .openai import CHAT_PATH, MODELS_PATH, Chat, Models, RefusedChat
from .requests import PICTURE_FIELDS, Ask, Cancel, Close, Describe, Open, session_in_header
from .validation import Problem, add_retry_key, refusal, validated

Native = Open | Ask | Close | Cancel | Describe
Request = Native | Chat | Models

_ACTION_FIELDS = {"type", "requestType"}
_UNKNOWN_NAMES_SHOWN = 5
# Commas, and opening brackets, outside of a question: 1,000 pictures, a URL and unknown fields have fewer. A history
# with more of them exceeds the context of every model.
_OTHER_VALUES = 2**16
MODEL_OF_TYPE: dict[str, type[Native]] = {
    "start_session": Open,
    "send_text_prompt": Ask,
    "close_session": Close,
    "cancel": Cancel,
    "describe_session": Describe,
}
# SageMaker's container standard (aws/model-hosting-container-standards, "Stateful sessions").
MODEL_OF_REQUEST_TYPE: dict[str, type[Native]] = {"NEW_SESSION": Open, "CLOSE": Close}


def parse(
    body: object,
    headers: Mapping[str, object],
    limits: RequestLimits,
    max_body_bytes: int | None = None,
    allow_system: bool = True,
) -> Request:
    """Return the request of a body and its headers.

    Raise `Refused` (invalid_request, too_large, unsupported_media, not_found), or `RefusedChat` for a request in
    OpenAI's words. `body`: parsed JSON if TorchServe parsed it, else `bytes` or `str`. `headers`: names in lower case.
    A body that is longer than `max_body_bytes`, or has very many values, is rejected before it is parsed. The message
    names every problem; the code is that of the first one. `allow_system`: whether a client may send system messages.
    """
    path = openai_path(headers)
    max_values = limits.max_prompt_chars + _OTHER_VALUES
    if path is None:
        payload = read_object(body, headers, max_body_bytes, max_values)
        if payload.get("messages") is None:
            return _parse_native(payload, headers, limits)
        return parse_chat(payload, headers, limits, is_sse=False, allow_system=allow_system)
    if path == CHAT_PATH:
        try:
            payload = read_object(body, headers, max_body_bytes, max_values)
        except Refused as error:
            raise RefusedChat(error.code, error.message) from None
        return parse_chat(payload, headers, limits, is_sse=True, allow_system=allow_system)
    if path == MODELS_PATH:
        return Models()
    if path.startswith(f"{MODELS_PATH}/"):
        return Models(name=path.removeprefix(f"{MODELS_PATH}/"))
    raise RefusedChat("not_found", f"the path must be `/{CHAT_PATH}` or `/{MODELS_PATH}`, got {shown(path)}")


def openai_path(headers: Mapping[str, object]) -> str | None:
    """Return the path of a request to an OpenAI route, without slashes around it; None for other requests."""
    value = headers.get(PATH_HEADER) if isinstance(headers, Mapping) else None
    path = value.partition("?")[0].strip("/") if isinstance(value, str) else ""
    return path if path.startswith("v1/") else None


def _parse_native(payload: dict[str, Any], headers: Mapping[str, object], limits: RequestLimits) -> Native:
    model = _model(payload)
    # A null counts as an absent field.
    fields = {name: value for name, value in payload.items() if value is not None and name in model.model_fields}
    problems = [*_unknown_fields(payload, model), *_conflicts(payload, model, fields, limits)]
    if model is not Open:
        problems += _merge_session_id(fields, headers)
    if model is Ask:
        _add_defaults(fields, limits)
    request, malformed = validated(model, fields, limits)
    problems += malformed
    if problems or request is None:
        raise refusal(problems, model)
    if isinstance(request, Open | Ask):
        # `stream` changes the form of an answer only.
        add_retry_key(request, headers, lambda: {name: value for name, value in payload.items() if name != "stream"})
    return request


def _model(payload: dict[str, Any]) -> type[Native]:
    """Return the model that the payload's `type` or `requestType` names."""
    action = payload.get("type")
    standard = payload.get("requestType")
    if action is not None and standard is not None:
        raise Refused("invalid_request", "the request must have either `type` or `requestType`, got both")
    model: type[Native] | None
    if standard is not None:
        model = MODEL_OF_REQUEST_TYPE.get(standard) if isinstance(standard, str) else None
        message = f"`requestType` must be 'NEW_SESSION' or 'CLOSE', got {shown(standard)}"
    else:
        model = MODEL_OF_TYPE.get(action) if isinstance(action, str) else None
        known = "'start_session', 'send_text_prompt', 'close_session', 'cancel' or 'describe_session'"
        message = f"`type` must be {known}, got {'nothing' if action is None else shown(action)}"
    if model is None:
        raise Refused("invalid_request", message)
    return model


def _unknown_fields(payload: dict[str, Any], model: type[Native]) -> list[Problem]:
    known = model.model_fields.keys() | _ACTION_FIELDS
    unknown = [name for name in payload if name not in known]
    if not unknown:
        return []
    # Not sorted: a call over millions of names would hold the GIL for a second.
    got = ", ".join(shown(name) for name in heapq.nsmallest(_UNKNOWN_NAMES_SHOWN, unknown))
    if len(unknown) > _UNKNOWN_NAMES_SHOWN:
        got += f" and {len(unknown) - _UNKNOWN_NAMES_SHOWN:,} more"
    message = f"the fields must be among {', '.join(sorted(known))}, got unknown field {got}"
    return [Problem("", "invalid_request", message)]


def _conflicts(
    payload: dict[str, Any], model: type[Native], fields: dict[str, Any], limits: RequestLimits
) -> Iterator[Problem]:
    """Yield the problems of fields that exclude each other, and of an open on nothing.

    SageMaker's own example opens an empty session, by NEW_SESSION alone.
    """
    pictures = [name for name in PICTURE_FIELDS if name in fields]
    if len(pictures) > 1:
        got = " and ".join(f"`{name}`" for name in pictures)
        message = f"a request must have at most one of `image`, `images` and `path`, got {got}"
        yield Problem("image", "invalid_request", message)
    if model is not Open:
        images = fields.get("images")
        count = len(images) + 1 if isinstance(images, list) and "video" in fields else 0
        if count == limits.max_pictures + 1:  # more of them are a problem of `images`
            message = f"a question must have at most {limits.max_pictures} pictures and clips, got {count}"
            yield Problem("video", "too_large", message)
        return
    if "resume" in fields and (pictures or fields.keys() & {"video", "history"}):
        message = "a request must have either `resume` or pictures, a `video` or a `history`, got both"
        yield Problem("resume", "invalid_request", message)
    elif pictures and "video" in fields:
        message = "a request that opens a session must have either pictures or a `video`, got both"
        yield Problem("resume", "invalid_request", message)
    elif not (pictures or fields.keys() & {"video", "resume"} or fields.get("history") or payload.get("requestType")):
        expected = "`image`, `images`, `path`, `video`, `history` or `resume`"
        message = f"a request that opens a session must have {expected}, got no picture"
        yield Problem("resume", "invalid_request", message)


def _merge_session_id(fields: dict[str, Any], headers: Mapping[str, object]) -> list[Problem]:
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
    return [Problem("session_id", "invalid_request", message)]


def _add_defaults(fields: dict[str, Any], limits: RequestLimits) -> None:
    """Set the defaults of an ask that the configuration decides.

    A whole answer must arrive before SageMaker gives up (60 s). The chunks of a stream keep its connection open.
    """
    fields.setdefault("max_new_tokens", limits.default_new_tokens)
    fields.setdefault("deadline_ms", None if fields.get("stream") is True else limits.default_deadline_ms)
