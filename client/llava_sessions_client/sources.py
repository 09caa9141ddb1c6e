"""Read a picture or a clip from a URL: `http(s)://`, `s3://` and `data:`."""

from __future__ import annotations

import base64
import binascii
import contextlib
import time
import urllib.parse
from typing import Any

import httpx

from .addresses import is_loopback
from .errors import InvalidPicture, TimedOut
from .within import within

MAX_BYTES = 64 * 1024 * 1024
FETCH_TIMEOUT_S = 20.0
MAX_REDIRECTS = 3
_SCHEMES = ("http://", "https://", "s3://", "data:")
_SHOWN_CHARS = 80


def is_url(text: str) -> bool:
    """Return whether a string is a URL that `fetch` reads. Any other string is a path."""
    return text[:8].lower().startswith(_SCHEMES)


def shown(url: str) -> str:
    """Return a short form of a URL for messages, without its query, which may hold a signature."""
    if url.lower().startswith("data:"):
        return "the data URL"
    return url.partition("?")[0].partition("#")[0][:_SHOWN_CHARS]


def fetch(url: str, region: str | None = None) -> bytes:
    """Return the bytes at a URL: at most 64 MiB, within 20 s, after at most 3 redirects. Raise `InvalidPicture`."""
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        return _data(url)
    if scheme.startswith("s3://"):
        return _object(url, region)
    return _download(url)


def _data(url: str) -> bytes:
    head, comma, text = url.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        if head.lower().endswith(";base64"):
            return base64.b64decode(urllib.parse.unquote(text), validate=True)
        return urllib.parse.unquote_to_bytes(text)
    except (ValueError, binascii.Error) as error:
        raise InvalidPicture("a data URL must have valid base64 after its comma") from error


def _download(url: str) -> bytes:
    deadline = time.monotonic() + FETCH_TIMEOUT_S
    data = bytearray()
    try:
        with (
            httpx.Client(
                trust_env=not is_loopback(url),
                follow_redirects=True,
                max_redirects=MAX_REDIRECTS,
                timeout=FETCH_TIMEOUT_S,
            ) as client,
            client.stream("GET", url) as reply,
        ):
            if not reply.is_success:
                raise InvalidPicture(f"{shown(url)} must be available, got status {reply.status_code}")
            for part in reply.iter_bytes():
                data += part
                _check_size(len(data), url)
                if time.monotonic() > deadline:
                    raise _late(url)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InvalidPicture(f"{shown(url)} must be reachable: {error or type(error).__name__}") from error
    return bytes(data)


def _object(url: str, region: str | None) -> bytes:
    bucket, _, key = url[len("s3://") :].partition("/")
    if not bucket or not key:
        raise InvalidPicture("an S3 URI must be s3://BUCKET/KEY")
    try:
        return within(FETCH_TIMEOUT_S, lambda: _read_object(bucket, key, region, url), lambda _: None)
    except TimedOut as error:
        raise _late(url) from error


def _read_object(bucket: str, key: str, region: str | None, url: str) -> bytes:
    import boto3  # here: it takes a third of a second, and plain HTTP needs none of it
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    # `_object` no longer waits then. These time-outs end the thread.
    config = Config(connect_timeout=FETCH_TIMEOUT_S, read_timeout=FETCH_TIMEOUT_S, retries={"total_max_attempts": 2})
    try:
        client = boto3.client("s3", region_name=region, config=config)
        reply: dict[str, Any] = client.get_object(Bucket=bucket, Key=key)
        data = bytearray()
        with contextlib.closing(reply["Body"]) as body:
            for part in body.iter_chunks(1 << 20):  # one `read` of the largest size accepts an object that is cut off
                data += part
                _check_size(len(data), url)
    except (BotoCoreError, ClientError) as error:
        raise InvalidPicture(f"{shown(url)} must be a readable object: {error}") from error
    return bytes(data)


def _check_size(size: int, url: str) -> None:
    if size > MAX_BYTES:
        raise InvalidPicture(f"{shown(url)} must have at most {MAX_BYTES} bytes")


def _late(url: str) -> InvalidPicture:
    return InvalidPicture(f"{shown(url)} must arrive within {FETCH_TIMEOUT_S:.0f} s")
