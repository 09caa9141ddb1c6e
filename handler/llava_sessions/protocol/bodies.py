"""Read the body of a request as a JSON object. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import Refused, describe
from .constants import CONTENT_TYPE_HEADER

# Content types that do not contradict a JSON body.
_JSON_TYPES = ("", "application/octet-stream", "application/json")
_GZIP = b"\x1f\x8b"
# Of a name or a content type, in a message.
_NAME_MAX_CHARS = 40
# The beginning of a JSON array or object, in any of the encodings that `json` detects.
_CONTAINER = re.compile(rb"[\s\0\xef\xbb\xbf\xfe\xff]*[\[{]")
# A body is searched in pieces, so that the GIL is released between them.
_PIECE_BYTES = 2**16


def read_object(
    body: object, headers: Mapping[str, object], max_body_bytes: int | None = None, max_values: int | None = None
) -> dict[str, Any]:
    """Return the JSON object of a body, whatever its content type. Raise `Refused`.

    `headers`: names in lower case. Errors name a content type that is not JSON's. `max_values`: commas, and opening
    brackets, in strings too. Parsing a body of 32 MiB with millions of values would hold the GIL for seconds and take
    20 times its size.
    """
    content_type = _content_type(headers)
    sent_as = "" if content_type in _JSON_TYPES else f" with content type {shown(content_type)}"
    if content_type.startswith("multipart/"):
        raise Refused("unsupported_media", f"the body must be a JSON object, got a body{sent_as}")
    if isinstance(body, str | bytes | bytearray):
        if max_body_bytes is not None and len(body) > max_body_bytes:
            raise Refused("too_large", f"the body must be at most {max_body_bytes:,} bytes, got {len(body):,}")
        if not body.strip():
            raise Refused("invalid_request", "the body must be a JSON object, got an empty body")
        if isinstance(body, bytes | bytearray) and body.startswith(_GZIP):
            raise Refused("unsupported_media", "the body must be an uncompressed JSON object, got a gzip stream")
        if max_values is not None:
            _check_values(body, max_values)
        try:
            body = json.loads(body)
        except json.JSONDecodeError as error:
            where = f"{error.msg} at character {error.pos}{sent_as}"
            raise Refused("invalid_request", f"the body must be a JSON object, got malformed JSON ({where})") from None
        except (ValueError, RecursionError):  # not UTF-8, a number of too many digits, or nested too deep
            raise Refused("invalid_request", f"the body must be a JSON object, got undecodable text{sent_as}") from None
    if not isinstance(body, dict):
        raise Refused("invalid_request", f"the body must be a JSON object, got {describe(body)}{sent_as}")
    return body


def _check_values(body: str | bytes | bytearray, most: int) -> None:
    """Raise `Refused` if a JSON body has more than `most` commas or opening brackets. Stop at that number.

    The number of its values is at most the sum of both. What is not an array or object costs no time to parse.
    """
    if isinstance(body, str):
        body = body.encode("utf-8", "replace")
    if _CONTAINER.match(body) is None:
        return
    commas = 0
    brackets = 0
    for start in range(0, len(body), _PIECE_BYTES):
        end = start + _PIECE_BYTES
        commas += body.count(b",", start, end)
        brackets += body.count(b"[", start, end) + body.count(b"{", start, end)
        if commas > most:
            raise Refused("too_large", f"the body must have at most {most:,} commas, got more")
        if brackets > most:
            raise Refused("invalid_request", f"the body must have at most {most:,} opening brackets, got more")


def shown(name: object) -> str:
    """Return a short ASCII form of a content type, or of the name of an action or a field."""
    if not isinstance(name, str):
        return describe(name)
    text = ascii(name[:_NAME_MAX_CHARS])
    return text if len(text) <= _NAME_MAX_CHARS else f"{text[:_NAME_MAX_CHARS]}..."


def _content_type(headers: Mapping[str, object]) -> str:
    """Return the client's content type without parameters, in lower case; "" without one."""
    value = headers.get(CONTENT_TYPE_HEADER.lower(), headers.get("content-type"))
    return value.partition(";")[0].strip().lower() if isinstance(value, str) else ""
