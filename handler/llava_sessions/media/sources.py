"""Read the encoded bytes of a picture or of a clip's file from base64, a data URL, https, s3 or a local path.

Sources come from untrusted clients. Each limit is checked before the work that it limits, and each failure is a
`MediaError`. Thread-safe. `fetch` reads from the network, `decoder` and `clips` decode the bytes.

For a clip's file, pass `clip_file_limits(limits)` of limits.py: it has the clip's limit of bytes, and the word "clip".
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Callable, Iterator
from urllib.parse import unquote, unquote_to_bytes

from ..config import JSON_BYTES_PER_PICTURE_BYTE, MediaLimits
from ..errors import describe
from .fetch import Fetcher
from .limits import INVALID_REQUEST, MAX_URL_CHARS, TOO_LARGE, MediaError, check_size, scheme_of

Fetch = Callable[[str, MediaLimits], bytes]


def read_base64(text: str, limits: MediaLimits) -> bytes:
    """Return the bytes that `text` encodes: base64 or a data URL with base64. Raise `MediaError`.

    Standard and URL-safe digits, white space and missing padding are accepted.
    """
    if not isinstance(text, str):
        raise MediaError(INVALID_REQUEST, f"the {limits.noun} must be base64 or a data URL, got {describe(text)}")
    if len(text) > (most := _max_encoded_chars(limits)):
        message = f"the {limits.noun} must be at most {most} characters of base64, got {describe(text)}"
        raise MediaError(TOO_LARGE, message)
    payload = text.lstrip()
    if payload[:5].lower() == "data:":
        payload = _data_url_payload(payload)
    return _decode_base64(payload, limits)


def read_path(source: str, limits: MediaLimits, fetch: Fetch | None = None) -> bytes:
    """Return the encoded bytes at a data URL, https URL, s3:// URI, local path or file:// URL. Raise `MediaError`.

    `fetch` reads https and s3 sources. Without it each call creates a `Fetcher`, so pass one to load many pictures.
    Block for at most `limits.fetch_timeout_s` seconds.
    """
    if not isinstance(source, str):
        raise MediaError(INVALID_REQUEST, f"the path must be an https, s3 or data URL, got {describe(source)}")
    if _scheme_at_start(source) == "data":
        return read_base64(source, limits)
    if len(source) > MAX_URL_CHARS:
        raise MediaError(
            INVALID_REQUEST, f"the path must be at most {MAX_URL_CHARS} characters, got {describe(source)}"
        )
    source = source.strip()
    if not source:
        raise MediaError(INVALID_REQUEST, "the path must be an https, s3 or data URL, got an empty string")
    scheme = scheme_of(source)
    if is_remote(source):
        return (fetch or Fetcher())(source, limits)
    if scheme in ("", "file"):
        return _read_local(source, limits)
    raise MediaError(INVALID_REQUEST, "the path must be an https, s3 or data URL, got another scheme")


def is_remote(source: str) -> bool:
    """Return whether `source` is read over the network (https or s3), which may block for seconds."""
    return isinstance(source, str) and _scheme_at_start(source) in ("https", "s3")


def _scheme_at_start(source: str) -> str:
    """Return the scheme of `source` behind white space. Read only the beginning: the rest may be megabytes."""
    return scheme_of(source[:MAX_URL_CHARS].lstrip())


def _max_encoded_chars(limits: MediaLimits) -> int:
    """Return the most characters of an encoded picture: base64 with line breaks and escapes, and a data URL's head."""
    return JSON_BYTES_PER_PICTURE_BYTE * limits.max_bytes + MAX_URL_CHARS


def _data_url_payload(url: str) -> str:
    """Return the base64 text of a data URL. Its media type is ignored: the decoder detects the format."""
    head, comma, payload = url.partition(",")
    if not comma:
        raise MediaError(INVALID_REQUEST, "the data URL must be data:<type>;base64,<data>, got no comma")
    if head.rpartition(";")[2].strip().lower() != "base64":
        raise MediaError(INVALID_REQUEST, "the data URL must be data:<type>;base64,<data>, got another encoding")
    return "".join(_unquoted(payload)) if "%" in payload else payload


# Text is converted in pieces: one call of C code over megabytes would hold the GIL until its end.
_PIECE_CHARS = 2**16
_WHITE_SPACE = b" \t\n\r\v\f\x1c\x1d\x1e\x1f"
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")


def _unquoted(text: str) -> Iterator[str]:
    """Yield the pieces of `text` with its per cent escapes decoded."""
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARS
        escape = text.rfind("%", end - 2, end)  # an escape is not cut in two
        end = escape if escape > start and end < len(text) else end
        yield unquote_to_bytes(text[start:end]).decode("latin-1")
        start = end


def _decode_base64(text: str, limits: MediaLimits) -> bytes:
    try:
        digits = bytearray().join(_digits(text)).rstrip(b"=")
        # A single digit encodes no byte. It is passed as 1 byte, since "empty" would be the wrong error.
        check_size(1 if len(digits) == 1 else len(digits) * 3 // 4, limits)
        if b"=" in digits:
            raise binascii.Error("padding before the end")
        digits += b"=" * (-len(digits) % 4)
        pieces = (digits[start : start + _PIECE_CHARS] for start in range(0, len(digits), _PIECE_CHARS))
        return b"".join(base64.b64decode(piece, validate=True) for piece in pieces)
    except (UnicodeEncodeError, binascii.Error):
        raise MediaError(INVALID_REQUEST, f"the {limits.noun} must be valid base64, got {describe(text)}") from None


def _digits(text: str) -> Iterator[bytes]:
    """Yield the base64 digits of `text` in the standard alphabet, without white space. Raise UnicodeEncodeError."""
    for start in range(0, len(text), _PIECE_CHARS):
        piece = text[start : start + _PIECE_CHARS].encode("ascii")
        yield piece.translate(_TO_STANDARD, _WHITE_SPACE)


def _read_local(source: str, limits: MediaLimits) -> bytes:
    """Return the bytes of a local file below one of the roots. Symbolic links and ".." are resolved first.

    Processes that can write below a root must not replace a directory by a link during the call.
    """
    if not limits.local_roots:
        raise MediaError(
            INVALID_REQUEST,
            "the path must be an https, s3 or data URL, got a local path, which this server does not allow",
        )
    path = _local_path(source)
    try:
        real_path = os.path.realpath(path)
        # Check the roots before opening the file: the reply must not reveal which other files exist.
        allowed = any(_is_below(real_path, os.path.realpath(root)) for root in limits.local_roots)
    except (OSError, ValueError):
        allowed = False
    if not allowed:
        raise MediaError(INVALID_REQUEST, "the local path must be inside an allowed directory, got a path outside")
    try:
        return _read_regular_file(real_path, limits)
    except FileNotFoundError:
        raise MediaError(INVALID_REQUEST, "the local file does not exist") from None
    except (OSError, ValueError):
        raise MediaError(INVALID_REQUEST, "the local file cannot be read") from None


def _local_path(source: str) -> str:
    if scheme_of(source) != "file":
        return source
    match = re.fullmatch(r"(?i:file):(?://(?i:localhost)?(?=/)|(?!//))(/[^?#]*)", source)
    if not match:
        raise MediaError(INVALID_REQUEST, f"the file URL must be file:///<absolute path>, got {describe(source)}")
    return unquote(match[1])


def _is_below(path: str, root: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep)


def _read_regular_file(real_path: str, limits: MediaLimits) -> bytes:
    # O_NONBLOCK: opening a named pipe must not wait for its writer. O_NOFOLLOW: the path was already resolved.
    descriptor = os.open(real_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(INVALID_REQUEST, "the local path must be a regular file, got another kind of file")
        check_size(status.st_size, limits)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limits.max_bytes + 1)
    finally:
        os.close(descriptor)
    check_size(len(data), limits)
    return data
