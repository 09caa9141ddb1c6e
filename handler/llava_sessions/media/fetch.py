"""Fetch https and s3 sources, from public addresses only, within one deadline for each source.

The connection is opened to the very address that was checked.
"""

from __future__ import annotations

import concurrent.futures
import functools
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import httpcore

from ..config import MediaLimits
from ..errors import describe
from .addresses import is_public_address
from .limits import INVALID_REQUEST, MAX_URL_CHARS, TOO_LARGE, MediaError, check_size, scheme_of

_T = TypeVar("_T")

_MAX_REDIRECTS = 3
_MAX_CONNECT_ATTEMPTS = 4  # addresses of one name
_CHUNK_BYTES = 65_536
_HTTPS_PORT = 443
_ACCEPTED = {
    # Not image/*, for which servers send AVIF.
    "picture": b"image/png, image/jpeg, image/webp, image/gif, image/bmp, image/tiff",
    "clip": b"video/mp4, video/quicktime, video/webm, video/x-matroska",
}


class _Deadline:
    """The time at which a fetch must be complete."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ends_at_s = clock() + seconds

    def left_s(self) -> float:
        """Return the seconds left, more than 0. Raise httpcore.TimeoutException if none are left."""
        left = self._ends_at_s - self._clock()
        if left <= 0:
            raise httpcore.TimeoutException("deadline passed")
        return left


def _within(deadline: _Deadline, call: Callable[[], _T]) -> _T:
    """Return or raise what `call()` does. Raise httpcore.TimeoutException at the deadline.

    getaddrinfo and boto3 have no overall time limit, so they run in a thread of their own. At the deadline that thread
    is abandoned; it ends when its own, longer time limits pass.
    """
    future: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="media-fetch", daemon=True).start()
    try:
        return future.result(timeout=deadline.left_s())
    except TimeoutError:
        raise httpcore.TimeoutException("deadline passed") from None


def resolve_host(host: str, port: int) -> list[str]:
    """Return all addresses of `host`, in the order in which to try them. Raise OSError if the host is unknown."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def _new_s3_client() -> Any:
    """Return an S3 client with the AWS SDK's default credentials and region."""
    import boto3
    from botocore.config import Config

    config = Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 2, "mode": "standard"})
    return boto3.session.Session().client("s3", config=config)  # not the default session, which is not thread-safe


@dataclass(frozen=True)
class Fetcher:
    """Reads the bytes of https and s3 sources. Thread-safe.

    Reuse one instance: it holds the certificate store and, after the first use, the S3 client. Proxies of the
    environment are ignored, because a proxy would resolve the name again, after the check.

    The fields are for tests and for other trust stores. `resolve(host, port)` returns the addresses of a name.
    `backend` opens TCP connections to checked addresses. `ssl_context` verifies certificates. `s3_client()` returns a
    boto3 client. `clock()` returns seconds.
    """

    resolve: Callable[[str, int], Sequence[str]] = resolve_host
    backend: httpcore.NetworkBackend = field(default_factory=httpcore.SyncBackend)
    ssl_context: ssl.SSLContext = field(default_factory=httpcore.default_ssl_context)
    s3_client: Callable[[], Any] = field(default_factory=lambda: functools.lru_cache(maxsize=1)(_new_s3_client))
    clock: Callable[[], float] = time.monotonic

    def __call__(self, source: str, limits: MediaLimits) -> bytes:
        """Return the 1 to `limits.max_bytes` bytes at `source`. Raise `MediaError`."""
        deadline = _Deadline(limits.fetch_timeout_s, self.clock)
        read = self._read_s3 if scheme_of(source) == "s3" else self._read_https
        data = read(source, limits, deadline)
        check_size(len(data), limits)
        return data

    def _read_https(self, url: str, limits: MediaLimits, deadline: _Deadline) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            target = _parse_https(url, limits)
            answer = self._get(target, limits, deadline)
            if isinstance(answer, bytes):
                return answer
            url = _redirect_url(url, answer.location, target.host)
        raise MediaError(INVALID_REQUEST, f"the URL must redirect at most {_MAX_REDIRECTS} times, got more")

    def _get(self, target: _Target, limits: MediaLimits, deadline: _Deadline) -> bytes | _Redirect:
        """Send one GET request. Don't follow a redirect. Turn every failure into a `MediaError`."""
        host = target.host
        try:
            return self._exchange(target, limits, deadline)
        except MediaError:
            raise
        except httpcore.TimeoutException:
            message = f"the host {host} did not deliver the {limits.noun} within {limits.fetch_timeout_s:g} s"
        except httpcore.ConnectError as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                message = f"the TLS certificate of {host} is not valid: {error.__cause__.verify_message}"
            elif isinstance(error.__cause__, ssl.SSLError):
                message = f"the TLS handshake with {host} failed"
            else:
                message = f"the host {host} refused the connection or is unreachable"
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError):
            message = f"the host {host} closed the connection early or sent no valid HTTP response"
        except Exception as error:
            message = f"the {limits.noun} could not be fetched from {host}: {type(error).__name__}"
        raise MediaError(INVALID_REQUEST, message)

    def _exchange(self, target: _Target, limits: MediaLimits, deadline: _Deadline) -> bytes | _Redirect:
        backend = _CheckedBackend(self.resolve, self.backend, deadline)
        host = target.host.encode("ascii")
        # httpcore, not httpx: it has no proxies, cookies, redirects or content decoding that would have to be disabled,
        # and its backend can connect to one address while TLS verifies another name.
        origin = httpcore.Origin(b"https", host, _HTTPS_PORT)
        url = httpcore.URL(scheme=b"https", host=host, port=_HTTPS_PORT, target=target.path_and_query)
        headers = [
            (b"Host", b"[" + host + b"]" if b":" in host else host),
            (b"Accept", _ACCEPTED[limits.noun]),
            (b"Accept-Encoding", b"identity"),
            (b"User-Agent", b"llava-sessions"),
            (b"Connection", b"close"),
        ]
        with (
            httpcore.HTTPConnection(origin, ssl_context=self.ssl_context, network_backend=backend) as connection,
            connection.stream("GET", url, headers=headers) as response,
        ):
            return _read_response(response, target.host, limits)

    def _read_s3(self, uri: str, limits: MediaLimits, deadline: _Deadline) -> bytes:
        match = re.fullmatch(r"(?i:s3)://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.+)", uri, re.DOTALL)
        if not match:
            raise MediaError(INVALID_REQUEST, f"the s3 URI must be s3://<bucket>/<key>, got {describe(uri)}")
        bucket, key = match.groups()
        if bucket not in limits.s3_buckets:
            raise MediaError(INVALID_REQUEST, f"the s3 bucket must be one that this server allows, got {bucket}")
        try:
            return _within(deadline, lambda: _read_s3_object(self.s3_client(), bucket, key, limits))
        except MediaError:
            raise
        except httpcore.TimeoutException:
            reason = f"did not arrive within {limits.fetch_timeout_s:g} s"
        except ImportError:
            reason = "cannot be read: boto3 is not installed on this server"
        except Exception as error:
            answer = getattr(error, "response", None)
            code = answer.get("Error", {}).get("Code", "") if isinstance(answer, dict) else ""
            reason = _S3_REASONS.get(code, f"cannot be read: {code or type(error).__name__}")
        raise MediaError(INVALID_REQUEST, f"the object in s3 bucket {bucket} {reason}")


_S3_REASONS = {
    "NoSuchKey": "does not exist",
    "404": "does not exist",
    "AccessDenied": "is not readable with this server's credentials",
}


@dataclass(frozen=True)
class _Target:
    """The parts of an https URL. `host` is a lower-case name, or an address without brackets."""

    host: str
    path_and_query: bytes


@dataclass(frozen=True)
class _Redirect:
    location: str


def _read_response(response: httpcore.Response, host: str, limits: MediaLimits) -> bytes | _Redirect:
    headers = {name.lower(): value.decode("utf-8", "replace") for name, value in reversed(response.headers)}
    if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
        return _Redirect(headers[b"location"])
    if response.status != 200:
        raise MediaError(INVALID_REQUEST, f"the host {host} must answer with status 200, got {response.status}")
    if headers.get(b"content-encoding", "identity").strip().lower() not in ("", "identity"):
        message = f"the host {host} must send the {limits.noun} uncompressed, got a Content-Encoding"
        raise MediaError(INVALID_REQUEST, message)
    declared = headers.get(b"content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_bytes:
        raise _too_many_bytes(limits)
    return _read_chunks(response.iter_stream(), limits)  # a server may send more than it declares


def _read_chunks(chunks: Iterable[bytes], limits: MediaLimits) -> bytes:
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > limits.max_bytes:
            raise _too_many_bytes(limits)
    return bytes(data)


def _too_many_bytes(limits: MediaLimits) -> MediaError:
    return MediaError(TOO_LARGE, f"the {limits.noun} must be at most {limits.max_bytes} bytes, got more")


def _redirect_url(url: str, location: str, host: str) -> str:
    try:
        target = urljoin(url, location)
    except ValueError:
        target = ""
    if scheme_of(target) != "https" or len(target) > MAX_URL_CHARS:
        raise MediaError(INVALID_REQUEST, f"the host {host} must redirect to a valid https URL, got another address")
    return target


_AUTHORITY = re.compile(r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(?::(?P<port>[0-9]{0,5}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def _parse_https(url: str, limits: MediaLimits) -> _Target:
    """Parse and check a URL. Only the returned parts are used afterwards, so that checks and request can't differ."""
    if re.search(r"[\x00-\x1f\x7f\\]", url):
        raise MediaError(INVALID_REQUEST, "the URL must have no control characters and no backslash, got some")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise MediaError(INVALID_REQUEST, f"the URL must be a valid https URL, got {describe(url)}") from None
    if parts.scheme != "https":
        raise MediaError(INVALID_REQUEST, "the URL must have the scheme https, got another scheme")
    if "@" in parts.netloc:
        raise MediaError(INVALID_REQUEST, "the URL must have no user name and no password, got some")
    authority = _AUTHORITY.fullmatch(parts.netloc.lower()) if parts.netloc.isascii() else None
    if not authority:
        raise MediaError(INVALID_REQUEST, "the URL's host must be an ASCII name or an IP address, got another form")
    if authority["port"] and int(authority["port"]) != _HTTPS_PORT:
        raise MediaError(INVALID_REQUEST, f"the URL's port must be {_HTTPS_PORT}, got {int(authority['port'])}")
    host = _checked_ipv6(authority["ipv6"]) if authority["ipv6"] else _checked_name(authority["name"])
    if limits.allowed_hosts and not any(_host_matches(host, pattern) for pattern in limits.allowed_hosts):
        raise MediaError(INVALID_REQUEST, f"the URL's host must be one that this server allows, got {host}")
    path = parts.path or "/"
    # Escape only characters that a request line can't contain.
    printable = "".join(chr(code) for code in range(0x21, 0x7F))
    path_and_query = quote(f"{path}?{parts.query}" if parts.query else path, safe=printable, errors="replace")
    return _Target(host, path_and_query.encode("ascii"))


def _checked_ipv6(text: str) -> str:
    try:
        return str(ipaddress.IPv6Address(text))
    except ValueError:
        raise MediaError(
            INVALID_REQUEST, "the URL's host must be a valid IPv6 address, got other text in brackets"
        ) from None


def _checked_name(text: str) -> str:
    """Return the host name without its final dot, or a dotted IPv4 address. Raise `MediaError`.

    Most resolvers read a name that ends in a number as an IPv4 address, in octal, hexadecimal or shortened spelling,
    such as "0177.1" or "2130706433". Only four decimal numbers are accepted.
    """
    name = text.removesuffix(".")
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise MediaError(INVALID_REQUEST, f"the URL's host must be a valid name, got {len(name)} characters")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            ipaddress.IPv4Address(name)
        except ValueError:
            raise MediaError(
                INVALID_REQUEST, "the URL's host must be an IPv4 address of four decimal numbers, got another spelling"
            ) from None
    return name


def _host_matches(host: str, pattern: str) -> bool:
    pattern = pattern.lower().strip("[]")
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


class _CheckedBackend(httpcore.NetworkBackend):
    """Opens connections to public addresses only, under one deadline.

    The name is resolved once, here, and the checked address is connected to. A name server that changes its answer (DNS
    rebinding) is never asked again. TLS uses the name, so the certificate is verified against the name.
    """

    def __init__(
        self, resolve: Callable[[str, int], Sequence[str]], backend: httpcore.NetworkBackend, deadline: _Deadline
    ) -> None:
        self._resolve = resolve
        self._backend = backend
        self._deadline = deadline

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore.NetworkStream:
        addresses = self._public_addresses(host, port)[:_MAX_CONNECT_ATTEMPTS]
        for index, address in enumerate(addresses, start=1):
            # An address that drops packets must leave time for the next one.
            timeout_s = self._deadline.left_s() / (len(addresses) - index + 1)
            try:
                return _DeadlineStream(self._backend.connect_tcp(address, port, timeout=timeout_s), self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if index == len(addresses):
                    raise
        raise httpcore.ConnectError("no address")

    def _public_addresses(self, host: str, port: int) -> list[str]:
        try:
            addresses = [str(ipaddress.ip_address(host))]
        except ValueError:
            try:
                addresses = list(_within(self._deadline, lambda: self._resolve(host, port)))
            except OSError:
                addresses = []
        if not addresses:
            raise MediaError(INVALID_REQUEST, f"the host {host} was not found")
        # Reject the name if only one of its addresses is private: the name server may be hostile.
        if not all(is_public_address(address) for address in addresses):
            raise MediaError(INVALID_REQUEST, f"the URL's host must have public addresses only, got {host}")
        return addresses


class _DeadlineStream(httpcore.NetworkStream):
    """A stream whose operations all end at the deadline, also if the server keeps sending a few bytes at a time."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left_s())

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left_s())
        return _DeadlineStream(stream, self._deadline)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _read_s3_object(client: Any, bucket: str, key: str, limits: MediaLimits) -> bytes:
    answer = client.get_object(Bucket=bucket, Key=key)
    with closing(answer["Body"]) as body:
        check_size(answer.get("ContentLength", 1), limits)
        return _read_chunks(body.iter_chunks(_CHUNK_BYTES), limits)
