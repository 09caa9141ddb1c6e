"""Owns the network: https and s3 sources -> bytes, from public addresses only, within one deadline.

The address that was checked is the address that is connected to. Must not know what the bytes are.
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
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpcore

from ..config import MediaLimits
from .addresses import is_public_address
from .limits import INVALID_REQUEST, MAX_URL_CHARS, TOO_LARGE, MediaError, check_size, scheme_of

_MAX_REDIRECTS = 3
_MAX_CONNECT_ATTEMPTS = 4  # of the addresses one name resolves to
_CHUNK_BYTES = 65_536
_HTTPS_PORT = 443


class _Deadline:
    """A moment by which something must be over."""

    def __init__(self, seconds: float) -> None:
        self._ends_at_s = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds left, more than 0. Raises httpcore.TimeoutException when there are none."""
        left = self._ends_at_s - time.monotonic()
        if left <= 0:
            raise httpcore.TimeoutException("deadline passed")
        return left


def _within(deadline: _Deadline, call: Callable[[], Any]) -> Any:
    """What `call()` returns or raises; httpcore.TimeoutException if it takes longer than the deadline leaves.

    For getaddrinfo and boto3, which take no overall time limit: they run in a thread of their own, which is left behind
    when time is up and ends by itself when their own, longer limits pass.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()

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
    """All addresses of `host`, in the order in which to try them. Raises OSError where there are none."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def _new_s3_client() -> Any:
    """An S3 client that finds its credentials and region the usual way of the AWS SDK."""
    import boto3
    from botocore.config import Config

    config = Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 2, "mode": "standard"})
    return boto3.session.Session().client("s3", config=config)  # own session: the default one is not thread-safe


@dataclass(frozen=True)
class Fetcher:
    """Gets the bytes of https and s3 sources; the default `fetch` of `load_path`. Thread-safe.

    Keep one: it holds the certificate store and, once used, the S3 client. Environment proxies are not used, because a
    proxy would resolve the name again, after the check. The fields exist for tests and for other trust stores:
    `resolve(host, port)` gives the addresses of a name, `backend` opens TCP connections to addresses that were checked,
    `ssl_context` verifies certificates, `s3_client()` gives a boto3 client.
    """

    resolve: Callable[[str, int], Sequence[str]] = resolve_host
    backend: httpcore.NetworkBackend = field(default_factory=httpcore.SyncBackend)
    ssl_context: ssl.SSLContext = field(default_factory=httpcore.default_ssl_context)
    s3_client: Callable[[], Any] = field(default_factory=lambda: functools.lru_cache(maxsize=1)(_new_s3_client))

    def __call__(self, source: str, limits: MediaLimits) -> bytes:
        """The encoded bytes at `source`, 1 to `limits.max_bytes` of them. Raises MediaError."""
        deadline = _Deadline(limits.fetch_timeout_s)
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
        raise MediaError(INVALID_REQUEST, f"the picture's address redirects more than {_MAX_REDIRECTS} times")

    def _get(self, target: _Target, limits: MediaLimits, deadline: _Deadline) -> bytes | _Redirect:
        """One GET without following redirects; every way in which it can fail becomes a MediaError."""
        host = target.host
        try:
            return self._exchange(target, limits, deadline)
        except MediaError:
            raise
        except httpcore.TimeoutException:
            message = f"{host} did not deliver the picture within {limits.fetch_timeout_s:g} s"
        except httpcore.ConnectError as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                message = f"the certificate of {host} is not valid: {error.__cause__.verify_message}"
            elif isinstance(error.__cause__, ssl.SSLError):
                message = f"{host} does not speak TLS as wanted"
            else:
                message = f"{host} refused the connection or cannot be reached"
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError):
            message = f"{host} broke off or did not answer in HTTP"
        except Exception as error:
            message = f"the picture could not be fetched from {host}: {type(error).__name__}"
        raise MediaError(INVALID_REQUEST, message)

    def _exchange(self, target: _Target, limits: MediaLimits, deadline: _Deadline) -> bytes | _Redirect:
        backend = _CheckedBackend(self.resolve, self.backend, deadline)
        host = target.host.encode("ascii")
        # httpcore itself, not httpx: it knows no proxies, cookies, redirects or content decoding that would have to be
        # switched off, and its backend is where "connect to this address, verify that name" can be said.
        origin = httpcore.Origin(b"https", host, _HTTPS_PORT)
        url = httpcore.URL(scheme=b"https", host=host, port=_HTTPS_PORT, target=target.path_and_query)
        headers = [
            (b"Host", b"[" + host + b"]" if b":" in host else host),
            (b"Accept", b"image/png, image/jpeg, image/webp, image/gif, image/bmp, image/tiff"),  # image/* gets AVIF
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
            raise MediaError(INVALID_REQUEST, "the s3 URI is not valid, wanted s3://<bucket>/<key>")
        bucket, key = match.groups()
        if bucket not in limits.s3_buckets:
            raise MediaError(INVALID_REQUEST, f"the s3 bucket {bucket} is not served here")
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
            known = {"NoSuchKey": "does not exist", "404": "does not exist", "AccessDenied": "is not readable by us"}
            reason = known.get(code, f"cannot be read: {code or type(error).__name__}")
        raise MediaError(INVALID_REQUEST, f"the object in s3 bucket {bucket} {reason}")


@dataclass(frozen=True)
class _Target:
    """What an https URL points at. `host` is a lower-case name, or an address without brackets."""

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
        raise MediaError(INVALID_REQUEST, f"{host} answered {response.status}, wanted 200")
    if headers.get(b"content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise MediaError(INVALID_REQUEST, f"{host} sent the picture compressed, wanted it as it is")
    declared = headers.get(b"content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_bytes:
        raise MediaError(TOO_LARGE, f"the picture at {host} has more than the {limits.max_bytes} bytes that are wanted")
    data = bytearray()
    for chunk in response.iter_stream():
        data += chunk
        if len(data) > limits.max_bytes:  # what a server declares need not be what it sends
            raise MediaError(
                TOO_LARGE, f"the picture at {host} has more than the {limits.max_bytes} bytes that are wanted"
            )
    return bytes(data)


def _redirect_url(url: str, location: str, host: str) -> str:
    try:
        target = urljoin(url, location)
    except ValueError:
        target = ""
    if scheme_of(target) != "https" or len(target) > MAX_URL_CHARS:
        raise MediaError(INVALID_REQUEST, f"{host} redirects to an address that is not a valid https URL")
    return target


_AUTHORITY = re.compile(r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(?::(?P<port>[0-9]{0,5}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def _parse_https(url: str, limits: MediaLimits) -> _Target:
    """The one place where a URL is taken apart: what is checked here is what is connected to and asked for."""
    if re.search(r"[\x00-\x1f\x7f\\]", url):
        raise MediaError(INVALID_REQUEST, "the URL has control characters or a backslash, wanted a valid https URL")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise MediaError(INVALID_REQUEST, "the URL is not valid") from None
    if parts.scheme != "https":
        raise MediaError(INVALID_REQUEST, "the URL is not https")
    if "@" in parts.netloc:
        raise MediaError(INVALID_REQUEST, "the URL holds a user name or a password, which is not served")
    authority = _AUTHORITY.fullmatch(parts.netloc.lower()) if parts.netloc.isascii() else None
    if not authority:
        raise MediaError(INVALID_REQUEST, "the URL has no valid host name, wanted an ASCII name or an address")
    if authority["port"] and int(authority["port"]) != _HTTPS_PORT:
        raise MediaError(INVALID_REQUEST, f"the URL names port {int(authority['port'])}, only 443 is served")
    host = _checked_ipv6(authority["ipv6"]) if authority["ipv6"] else _checked_name(authority["name"])
    if limits.allowed_hosts and not any(_host_matches(host, pattern) for pattern in limits.allowed_hosts):
        raise MediaError(INVALID_REQUEST, f"pictures from {host} are not served here")
    path = parts.path or "/"
    printable = "".join(chr(code) for code in range(0x21, 0x7F))  # only what HTTP cannot carry is escaped
    path_and_query = quote(f"{path}?{parts.query}" if parts.query else path, safe=printable, errors="replace")
    return _Target(host, path_and_query.encode("ascii"))


def _checked_ipv6(text: str) -> str:
    try:
        return str(ipaddress.IPv6Address(text))
    except ValueError:
        raise MediaError(INVALID_REQUEST, "the URL's host is not a valid IPv6 address") from None


def _checked_name(text: str) -> str:
    """A host name without its final dot, or a dotted IPv4 address. Raises MediaError.

    Names that end in a number are IPv4 addresses to most resolvers, in octal, hexadecimal or shortened spellings that
    hide what they point at ("0177.1", "2130706433"); only the plain spelling is taken.
    """
    name = text.removesuffix(".")
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise MediaError(INVALID_REQUEST, "the URL's host name is not valid")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            ipaddress.IPv4Address(name)
        except ValueError:
            raise MediaError(INVALID_REQUEST, "the URL's host is not an IPv4 address in plain spelling") from None
    return name


def _host_matches(host: str, pattern: str) -> bool:
    pattern = pattern.lower().strip("[]")
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


class _CheckedBackend(httpcore.NetworkBackend):
    """Opens connections to public addresses only, under one deadline.

    The name is resolved once, here, and the address that was checked is the one connected to: a name server that
    answers differently the next time (DNS rebinding) has no next time. httpcore then does TLS with the name, so the
    certificate is verified against the name.
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
            # An address that swallows packets must leave time for the next one.
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
        # One private answer among public ones is no accident either.
        if not all(is_public_address(address) for address in addresses):
            raise MediaError(INVALID_REQUEST, f"{host} is not a public address, only public ones are served")
        return addresses


class _DeadlineStream(httpcore.NetworkStream):
    """A stream on which no operation outlives the deadline, so that a server cannot drip bytes for ever."""

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
    data = bytearray()
    with closing(answer["Body"]) as body:
        if answer.get("ContentLength", 0) > limits.max_bytes:
            raise MediaError(
                TOO_LARGE, f"the picture has {answer['ContentLength']} bytes, at most {limits.max_bytes} are wanted"
            )
        for chunk in body.iter_chunks(_CHUNK_BYTES):
            data += chunk
            if len(data) > limits.max_bytes:
                raise MediaError(TOO_LARGE, f"the picture has more than the {limits.max_bytes} bytes that are wanted")
    return bytes(data)
