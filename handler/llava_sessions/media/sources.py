"""Bytes, base64, data URLs, https, s3 and local paths -> one decoded RGB picture, safely.

Owns everything between a client's words about a picture and the picture: where it may be fetched from, how many bytes
and pixels it may have, how long it may take, and which formats are decoded. Pictures and addresses come from strangers,
so each limit is checked before the cost it limits is paid, and every failure is a `MediaError`.

It must not know sessions, payloads, tensors or TorchServe: it imports no other module of the package, no torch, no ts.
Thread-safe. This file is the doors and what needs no network; `fetch` is the network, `decode` the picture.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Callable
from urllib.parse import unquote, unquote_to_bytes

from ..config import MediaLimits
from .addresses import is_public_address
from .decoder import DecodedPicture, load_bytes
from .fetch import Fetcher, resolve_host
from .limits import INVALID_REQUEST, MAX_URL_CHARS, MediaError, check_size, kind_of, scheme_of

__all__ = [
    "DecodedPicture",
    "Fetch",
    "Fetcher",
    "MediaError",
    "MediaLimits",
    "is_public_address",
    "is_remote",
    "load_base64",
    "load_bytes",
    "load_path",
    "read_base64",
    "read_path",
    "resolve_host",
]

Fetch = Callable[[str, MediaLimits], bytes]


def load_base64(text: str, limits: MediaLimits) -> DecodedPicture:
    """The picture in `text`: base64 (standard or URL-safe, white space and missing padding tolerated) or a data URL.

    Raises MediaError.
    """
    return load_bytes(read_base64(text, limits), limits)


def load_path(source: str, limits: MediaLimits, fetch: Fetch | None = None) -> DecodedPicture:
    """The picture at `source`: a data URL, an https URL, an s3:// URI, or a local path or file:// URL.

    `fetch` gets the bytes of remote sources; without one a `Fetcher` is made for this call, so keep a `Fetcher` where
    many pictures are loaded. Blocks for up to `limits.fetch_timeout_s` seconds. Raises MediaError.
    """
    return load_bytes(read_path(source, limits, fetch), limits)


def read_base64(text: str, limits: MediaLimits) -> bytes:
    """The encoded bytes in `text`, as for `load_base64`, not decoded. Raises MediaError."""
    if not isinstance(text, str):
        raise MediaError(INVALID_REQUEST, f"the picture is {kind_of(text)}, wanted a base64 string or a data URL")
    payload = text.lstrip()
    if payload[:5].lower() == "data:":
        payload = _data_url_payload(payload)
    return _decode_base64(payload, limits)


def read_path(source: str, limits: MediaLimits, fetch: Fetch | None = None) -> bytes:
    """The encoded bytes at `source`, as for `load_path`, not decoded. Raises MediaError."""
    if not isinstance(source, str) or not source.strip():
        raise MediaError(INVALID_REQUEST, f"the path is {kind_of(source)}, wanted an https, s3 or data URL")
    source = source.strip()
    scheme = scheme_of(source)
    if scheme == "data":
        return read_base64(source, limits)
    if len(source) > MAX_URL_CHARS:
        raise MediaError(INVALID_REQUEST, f"the path has {len(source)} characters, at most {MAX_URL_CHARS} are wanted")
    if is_remote(source):
        return (fetch or Fetcher())(source, limits)
    if scheme in ("", "file"):
        return _read_local(source, limits)
    raise MediaError(INVALID_REQUEST, "the path has a scheme that is not served, wanted an https, s3 or data URL")


def is_remote(source: str) -> bool:
    """Whether loading `source` goes over the network (https or s3), and so may block for seconds."""
    return isinstance(source, str) and scheme_of(source.strip()) in ("https", "s3")


def _data_url_payload(url: str) -> str:
    """The base64 text of a data URL. Its media type is not looked at: formats are judged by content."""
    head, comma, payload = url.partition(",")
    if not comma:
        raise MediaError(INVALID_REQUEST, "the data URL has no comma, wanted data:<type>;base64,<data>")
    if head.rpartition(";")[2].strip().lower() != "base64":
        raise MediaError(INVALID_REQUEST, "the data URL is not base64, wanted data:<type>;base64,<data>")
    return unquote_to_bytes(payload).decode("latin-1") if "%" in payload else payload


def _decode_base64(text: str, limits: MediaLimits) -> bytes:
    digits = "".join(text.split()).rstrip("=")
    check_size(1 if len(digits) == 1 else len(digits) * 3 // 4, limits)  # one digit is no byte, yet not "empty" either
    try:
        standard = digits.encode("ascii").translate(bytes.maketrans(b"-_", b"+/"))
        return base64.b64decode(standard + b"=" * (-len(standard) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise MediaError(INVALID_REQUEST, "the picture is not valid base64") from None


def _read_local(source: str, limits: MediaLimits) -> bytes:
    """The bytes of a local file whose real path, symbolic links and ".." resolved, lies below one of the roots.

    Who may write below a root is trusted not to swap directories for links while this runs.
    """
    if not limits.local_roots:
        raise MediaError(INVALID_REQUEST, "local paths are not served here, wanted an https, s3 or data URL")
    path = _local_path(source)
    try:
        real_path = os.path.realpath(path)
        # The roots are judged before the file is looked at: the answer must not tell which other files exist.
        allowed = any(_is_below(real_path, os.path.realpath(root)) for root in limits.local_roots)
    except (OSError, ValueError):
        allowed = False
    if not allowed:
        raise MediaError(INVALID_REQUEST, "the local path lies outside the directories that are served")
    try:
        return _read_regular_file(real_path, limits)
    except (OSError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise MediaError(INVALID_REQUEST, f"the local file {reason}") from None


def _local_path(source: str) -> str:
    if scheme_of(source) != "file":
        return source
    match = re.fullmatch(r"(?i:file):(?://(?i:localhost)?(?=/)|(?!//))(/[^?#]*)", source)
    if not match:
        raise MediaError(INVALID_REQUEST, "the file URL is not valid, wanted file:///<absolute path>")
    return unquote(match[1])


def _is_below(path: str, root: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep)


def _read_regular_file(real_path: str, limits: MediaLimits) -> bytes:
    # O_NONBLOCK: opening a named pipe must not wait for its writer. O_NOFOLLOW: the path was already resolved.
    descriptor = os.open(real_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(INVALID_REQUEST, "the local path is not a regular file")
        check_size(status.st_size, limits)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limits.max_bytes + 1)
    finally:
        os.close(descriptor)
    check_size(len(data), limits)
    return data
