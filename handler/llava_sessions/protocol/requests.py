"""Owns the words on the wire: request payloads and headers -> Open / Ask / Close / Cancel, and the bodies of the
replies.

Two dialects meet here and mean the same: the AWS LLaVA sample's `type` payloads with the native fields beside them,
and the `requestType` payloads of SageMaker's container standard, which open and close only.
Knows neither torch nor TorchServe, and no session: whether an id is open is for `sessions` to say. Pure.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import RequestLimits
from ..errors import Refused
from .constants import INFERENCE_HEADER, NEW_SESSION, SESSION_HEADER, SESSION_ID_MAX_CHARS, SESSION_ID_PATTERN

# Long enough that nobody guesses it.
_SESSION_TOKEN = re.compile(r"[!-~]{16,256}")
# Long enough that two callers do not choose the same one.
_REQUEST_ID = re.compile(r"[!-~]{16,64}")


_TYPES = {"start_session": "open", "send_text_prompt": "ask", "close_session": "close", "cancel": "cancel"}
# SageMaker's container standard (aws/model-hosting-container-standards, "Stateful sessions").
_REQUEST_TYPES = {"NEW_SESSION": "open", "CLOSE": "close"}
_PICTURE_FIELDS = ("image", "images", "path")
_SESSION_FIELDS = {"type", "requestType", "session_id", "session_token"}
_OPEN_FIELDS = {*_SESSION_FIELDS, "request_id", "video", "resume", *_PICTURE_FIELDS}
_ASK_FIELDS = {
    *_SESSION_FIELDS,
    *("prompt_text", "stream", "max_new_tokens", "temperature", "top_p", "seed", "stop"),
    *("return_token_ids", "request_id", "deadline_ms", *_PICTURE_FIELDS),
}


@dataclass(frozen=True)
class PictureSource:
    """Where a picture comes from: `image` (base64 or data URL) or `path` (URL, or what the config allows)."""

    image: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class Open:
    """Open a session on one or more pictures, on the frames of one clip, or where another session stopped.

    `resume` is that session's id; it ends. With a `session_token` all later requests must bring it too; so must a
    resume of a session that has one. An open with the `retry_key` of an earlier one is that open again: the same
    request id, and the same body.
    """

    pictures: tuple[PictureSource, ...]
    frames: tuple[PictureSource, ...] = ()
    retry_key: str | None = None
    session_token: str | None = None
    resume: str | None = None


@dataclass(frozen=True)
class Ask:
    """One turn. `temperature` 0 is greedy; `seed` None draws a fresh one; token counts are in tokens.

    `pictures` are further ones, shown with this question. An ask with an earlier one's `retry_key` is not run again.
    `deadline_ms` from its arrival the answer ends as it is; None: never.
    """

    session_id: str
    prompt_text: str
    stream: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    return_token_ids: bool
    retry_key: str | None
    deadline_ms: int | None
    pictures: tuple[PictureSource, ...] = ()
    session_token: str | None = None


@dataclass(frozen=True)
class Close:
    """End a session and free what it holds."""

    session_id: str
    session_token: str | None = None


@dataclass(frozen=True)
class Cancel:
    """End the running turn of a session; the session stays as it was before that turn."""

    session_id: str
    session_token: str | None = None


Request = Open | Ask | Close | Cancel


def parse(body: Any, headers: Mapping[str, str], limits: RequestLimits) -> Request:
    """Read one request.

    `body` is what TorchServe's worker hands over: the parsed JSON when the content type was `application/json` and it
    parsed, else `bytes`/`str`. `headers` has lower-case names. Raises `Refused` (invalid_request, too_large).
    """
    payload = _payload(body)
    action = _action(payload)
    if action == "open":
        return _open(payload, headers, limits)
    session_id = _session_id(payload, headers)
    if action == "ask":
        return _ask(payload, headers, session_id, limits)
    _known_fields(payload, _SESSION_FIELDS)
    token = _session_token(payload)
    return Close(session_id, token) if action == "close" else Cancel(session_id, token)


def _payload(body: Any) -> dict[str, Any]:
    if isinstance(body, str | bytes | bytearray):
        if not body.strip():
            raise Refused("invalid_request", "The body is empty; a JSON object is wanted.")
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            where = f" ({error.msg} at character {error.pos})" if isinstance(error, json.JSONDecodeError) else ""
            raise Refused("invalid_request", f"The body is not JSON{where}; a JSON object is wanted.") from None
    if not isinstance(body, dict):
        raise Refused("invalid_request", f"The body is a JSON {_json_type(body)}; a JSON object is wanted.")
    return body


def _action(payload: dict[str, Any]) -> str:
    """What is asked for, in whichever dialect."""
    kind, standard = payload.get("type"), payload.get("requestType")
    if kind is not None and standard is not None:
        raise Refused("invalid_request", "The request has both a 'type' and a 'requestType'; one of them is wanted.")
    name, known = ("type", _TYPES) if standard is None else ("requestType", _REQUEST_TYPES)
    given = payload.get(name)
    if not isinstance(given, str) or given not in known:
        got = f"no '{name}'" if given is None else f"'{name}': {_show(given)}"
        raise Refused("invalid_request", f"The request has {got}; it must be one of {', '.join(map(repr, known))}.")
    return known[given]


def _open(payload: dict[str, Any], headers: Mapping[str, str], limits: RequestLimits) -> Open:
    _known_fields(payload, _OPEN_FIELDS)
    if _text(payload, "session_id") not in (None, "", NEW_SESSION):
        raise Refused("invalid_request", "A new session gets its id from the server; open without a 'session_id'.")
    pictures, frames = _pictures(payload, limits), ()
    if payload.get("video") is not None:
        frames = tuple(PictureSource(image=frame) for frame in _images(payload, "video", limits.max_frames))
    resume = _text(payload, "resume")
    if resume is not None:
        if pictures or frames:
            raise Refused("invalid_request", "A resumed session has its pictures already; none may be given with it.")
        _check_session_id(resume)
    elif not pictures and not frames:
        wanted = "a session opens with 'image', 'images', 'path', 'video' or 'resume'"
        raise Refused("invalid_request", f"No picture was given; {wanted}.")
    if pictures and frames:
        raise Refused("invalid_request", "A session opens with pictures or with a 'video'; both were given.")
    return Open(pictures, frames, _retry_key(payload, headers), _session_token(payload), resume)


def _session_token(payload: dict[str, Any]) -> str | None:
    token = _text(payload, "session_token")
    if token is not None and not _SESSION_TOKEN.fullmatch(token):
        raise Refused("invalid_request", "'session_token' must be 16 to 256 printable ASCII characters.")
    return token


def _retry_key(payload: dict[str, Any], headers: Mapping[str, str]) -> str | None:
    """What a repeated request is known by: its id, and what it says.

    With the body in it, the same id in other hands opens no session of theirs, and one that a caller gives to a whole
    chat, as SageMaker allows, answers no other question. How the answer is to come (`stream`) makes no difference.
    """
    request_id = _request_id(payload, headers)
    if request_id is None:
        return None
    body = json.dumps({name: value for name, value in payload.items() if name != "stream"}, sort_keys=True)
    return hashlib.sha256(f"{request_id} {body}".encode()).hexdigest()


def _pictures(payload: dict[str, Any], limits: RequestLimits) -> tuple[PictureSource, ...]:
    """The pictures of a request, from at most one of the fields."""
    given = [name for name in _PICTURE_FIELDS if payload.get(name) is not None]
    if len(given) > 1:
        names = " and ".join(f"'{name}'" for name in given)
        raise Refused("invalid_request", f"Pictures are taken from one field; {names} were given.")
    if given == ["image"]:
        return (PictureSource(image=_text(payload, "image")),)
    if given == ["path"]:
        return (PictureSource(path=_text(payload, "path")),)
    if not given:
        return ()
    return tuple(PictureSource(image=image) for image in _images(payload, "images", limits.max_pictures))


def _images(payload: dict[str, Any], name: str, most: int) -> list[str]:
    images = payload[name]
    if not isinstance(images, list):
        raise Refused("invalid_request", f"'{name}' is a JSON {_json_type(images)}; an array of strings is wanted.")
    if not images:
        raise Refused("invalid_request", f"'{name}' is empty; at least one picture is wanted.")
    if len(images) > most:
        raise Refused("too_large", f"'{name}' has {len(images)} pictures; at most {most} are taken in one request.")
    for image in images:
        if not isinstance(image, str):
            raise Refused("invalid_request", f"'{name}' holds a JSON {_json_type(image)}; strings are wanted.")
    return images


def _request_id(payload: dict[str, Any], headers: Mapping[str, str]) -> str | None:
    """The id by which a repeated request is known: the body's, else SageMaker's own."""
    request_id = _text(payload, "request_id")
    if request_id is None:
        given = headers.get(INFERENCE_HEADER.lower())
        return given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else None
    if not _REQUEST_ID.fullmatch(request_id):
        raise Refused("invalid_request", "'request_id' must be 16 to 64 printable ASCII characters, such as a UUID.")
    return request_id


def _ask(payload: dict[str, Any], headers: Mapping[str, str], session_id: str, limits: RequestLimits) -> Ask:
    _known_fields(payload, _ASK_FIELDS)
    prompt_text = _prompt(payload, "prompt_text", limits)
    if prompt_text is None or not prompt_text.strip():
        raise Refused("invalid_request", "'prompt_text' is missing or empty; a question is wanted.")
    stream = _flag(payload, "stream")
    return Ask(
        session_id=session_id,
        prompt_text=prompt_text,
        stream=stream,
        max_new_tokens=_integer(payload, "max_new_tokens", limits.default_new_tokens, 1, limits.max_new_tokens),
        temperature=_number(payload, "temperature", 0.0, 0.0, 10.0),
        top_p=_number(payload, "top_p", 1.0, 0.0, 1.0, above=True),
        seed=_integer(payload, "seed", None, 0, 2**63 - 1),
        stop=_stop(payload, limits),
        return_token_ids=_flag(payload, "return_token_ids"),
        retry_key=_retry_key(payload, headers),
        # A whole answer must come before SageMaker gives up (60 s); a stream is kept open by its chunks.
        deadline_ms=_integer(payload, "deadline_ms", None if stream else limits.default_deadline_ms, 1, 600_000),
        pictures=_pictures(payload, limits),
        session_token=_session_token(payload),
    )


def session_in_header(headers: Mapping[str, str]) -> str | None:
    """The session id that the header names; None when it is absent, empty or the constant NEW_SESSION."""
    value = headers.get(SESSION_HEADER.lower())
    value = value.strip() if isinstance(value, str) else ""
    return value if value and value != NEW_SESSION else None


def _session_id(payload: dict[str, Any], headers: Mapping[str, str]) -> str:
    in_header, in_body = session_in_header(headers), _text(payload, "session_id")
    if in_header and in_body and in_header != in_body:
        raise Refused("invalid_request", f"The {SESSION_HEADER} header and the body's 'session_id' name two sessions.")
    session_id = in_header or in_body
    if not session_id:
        wanted = f"send the {SESSION_HEADER} header or a 'session_id'"
        raise Refused("invalid_request", f"The request names no session; {wanted}.")
    _check_session_id(session_id)
    return session_id


def _check_session_id(session_id: str) -> None:
    if len(session_id) > SESSION_ID_MAX_CHARS or not SESSION_ID_PATTERN.fullmatch(session_id):
        raise Refused("invalid_request", "The session id is malformed: letters, digits and inner hyphens are wanted.")


def _known_fields(payload: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(payload) - known)
    if unknown:
        names = ", ".join(_show(name) for name in unknown[:5])
        raise Refused("invalid_request", f"Unknown field {names}; known are {', '.join(sorted(known))}.")


def _text(payload: dict[str, Any], name: str) -> str | None:
    value = payload.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise Refused("invalid_request", f"'{name}' is a JSON {_json_type(value)}; a string is wanted.")
    return value


def _prompt(payload: dict[str, Any], name: str, limits: RequestLimits) -> str | None:
    text = _text(payload, name)
    if text is None:
        return None
    if len(text) > limits.max_prompt_chars:
        sizes = f"{len(text):,} characters; at most {limits.max_prompt_chars:,} are taken"
        raise Refused("too_large", f"'{name}' has {sizes}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("invalid_request", f"'{name}' holds a lone surrogate; Unicode text is wanted.") from None
    return text


def _flag(payload: dict[str, Any], name: str) -> bool:
    value = payload.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise Refused("invalid_request", f"'{name}' is a JSON {_json_type(value)}; true or false is wanted.")
    return value


def _integer(payload: dict[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    value = payload.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refused("invalid_request", f"'{name}' is {_show(value)}; a whole number from {low} to {high} is wanted.")
    return value


def _number(payload: dict[str, Any], name: str, default: float, low: float, high: float, above: bool = False) -> float:
    value = payload.get(name)
    if value is None:
        return default
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (above and value == low):
        wanted = f"a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}"
        raise Refused("invalid_request", f"'{name}' is {_show(value)}; {wanted} is wanted.")
    return float(value)


def _stop(payload: dict[str, Any], limits: RequestLimits) -> tuple[str, ...]:
    value = payload.get("stop")
    if value is None:
        return ()
    stop = [value] if isinstance(value, str) else value
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise Refused("invalid_request", "'stop' must be a non-empty string or a list of such strings.")
    if len(stop) > limits.max_stop_strings or any(len(text) > limits.max_stop_chars for text in stop):
        most = f"{limits.max_stop_strings} strings of {limits.max_stop_chars} characters"
        raise Refused("too_large", f"'stop' is too long; at most {most} are taken.")
    return tuple(stop)


def _json_type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return {str: "string", list: "array", dict: "object", type(None): "null"}.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    """A short, ASCII form of what the caller sent, safe in a message."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested too deep, or a number of thousands of digits
        text = f"a JSON {_json_type(value)}"
    return text if len(text) <= 40 else text[:37] + "..."


# --- replies ---
