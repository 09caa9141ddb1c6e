"""Bytes, base64, data URLs, https, s3 and local paths -> one decoded RGB picture, safely.

This module owns everything between a client's words about a picture and the picture: where it may be fetched from, how
many bytes and pixels it may have, how long it may take, and which formats are decoded. Pictures and addresses come from
strangers, so each limit is checked before the cost it limits is paid, and every failure is a `MediaError`.

It must not know sessions, payloads, tensors or TorchServe: it imports no other module of this package, no torch, no ts.
It holds no state between calls and changes no setting of Pillow, so any number of threads may call it at once.

Pillow 13 or later is expected: earlier versions can be made to read overlapping EXIF or TIFF entries without bound, and
to fill memory from one BMP or GIF. What Pillow 13 leaves open (measured) is closed here: see `_check_jpeg_scans`
and `_check_tiff_layout`.
"""

from __future__ import annotations

import base64
import binascii
import concurrent.futures
import functools
import hashlib
import io
import ipaddress
import os
import re
import socket
import ssl
import stat
import struct
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

import httpcore
from PIL import Image

INVALID_REQUEST = "invalid_request"
TOO_LARGE = "too_large"
UNSUPPORTED_MEDIA = "unsupported_media"

_FORMATS_TEXT = "PNG, JPEG, WEBP, GIF, BMP or TIFF"
_MAX_URL_CHARS = 8192
_MAX_REDIRECTS = 3
_MAX_CONNECT_ATTEMPTS = 4  # of the addresses one name resolves to
_CHUNK_BYTES = 65_536
_HTTPS_PORT = 443

# Pillow warns in words that hold numbers of the file, and Python remembers every warning it has shown, for ever:
# pictures made for it would grow that memory and the log. What matters in those warnings is an error here anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class MediaLimits:
    """What one picture may cost and where it may come from."""

    max_bytes: int = 10 * 2**20  # of one encoded picture
    max_pixels: int = 40_000_000  # of one decoded picture, by its header; above 178 million Pillow refuses by itself
    fetch_timeout_s: float = 10.0  # the whole fetch: name look-up, redirects, headers, body
    allowed_hosts: tuple[str, ...] = ()  # empty: any public https host; else exact names or "*.suffix"
    s3_buckets: tuple[str, ...] = ()  # exact names; empty: s3:// is refused
    local_roots: tuple[str, ...] = ()  # directories; empty: local paths are refused
    max_aspect: float = 100.0  # longer side / shorter side: a model's resize by the shorter side multiplies it


class MediaError(Exception):
    """A picture that cannot be had.

    `code` is one of "invalid_request", "too_large", "unsupported_media". `message` is one sentence for the client; it
    holds no picture bytes, no credentials, no path and no query string.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Picture:
    """A decoded picture: RGB, upright, opaque; `width` and `height` in pixels as it is seen."""

    image: Image.Image
    sha256: str  # hex, of the encoded bytes
    format: str  # of the encoded bytes: PNG, JPEG, WEBP, GIF, BMP or TIFF
    width: int
    height: int


Fetch = Callable[[str, MediaLimits], bytes]


# ---- the doors -------------------------------------------------------------------------------------------------------


def load_base64(text: str, limits: MediaLimits) -> Picture:
    """The picture in `text`: base64 (standard or URL-safe, white space and missing padding tolerated) or a data URL.

    Raises MediaError.
    """
    return load_bytes(read_base64(text, limits), limits)


def load_path(source: str, limits: MediaLimits, fetch: Fetch | None = None) -> Picture:
    """The picture at `source`: a data URL, an https URL, an s3:// URI, or a local path or file:// URL.

    `fetch` gets the bytes of remote sources; without one a `Fetcher` is made for this call, so keep a `Fetcher` where
    many pictures are loaded. Blocks for up to `limits.fetch_timeout_s` seconds. Raises MediaError.
    """
    return load_bytes(read_path(source, limits, fetch), limits)


def load_bytes(data: bytes, limits: MediaLimits) -> Picture:
    """The picture encoded in `data`, its format judged by content. Raises MediaError.

    Only the first frame of an animated file is decoded. Transparent pixels are laid on white. ICC profiles are ignored.
    """
    _check_size(len(data), limits)
    picture_format = _sniff_format(data)
    try:
        image = _decode(data, picture_format, limits)
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaError(
            TOO_LARGE, f"the picture declares too many pixels, at most {limits.max_pixels} are wanted"
        ) from None
    except Exception as error:  # Pillow raises nearly everything: SyntaxError, struct.error, OSError, ValueError...
        message = f"the picture is damaged: its {picture_format} data cannot be decoded"
        raise MediaError(INVALID_REQUEST, message) from error
    return Picture(image, hashlib.sha256(data).hexdigest(), picture_format, image.width, image.height)


def read_base64(text: str, limits: MediaLimits) -> bytes:
    """The encoded bytes in `text`, as for `load_base64`, not decoded. Raises MediaError."""
    if not isinstance(text, str):
        raise MediaError(INVALID_REQUEST, f"the picture is {_kind_of(text)}, wanted a base64 string or a data URL")
    payload = text.lstrip()
    if payload[:5].lower() == "data:":
        payload = _data_url_payload(payload)
    return _decode_base64(payload, limits)


def read_path(source: str, limits: MediaLimits, fetch: Fetch | None = None) -> bytes:
    """The encoded bytes at `source`, as for `load_path`, not decoded. Raises MediaError."""
    if not isinstance(source, str) or not source.strip():
        raise MediaError(INVALID_REQUEST, f"the path is {_kind_of(source)}, wanted an https, s3 or data URL")
    source = source.strip()
    scheme = _scheme_of(source)
    if scheme == "data":
        return read_base64(source, limits)
    if len(source) > _MAX_URL_CHARS:
        raise MediaError(INVALID_REQUEST, f"the path has {len(source)} characters, at most {_MAX_URL_CHARS} are wanted")
    if is_remote(source):
        return (fetch or Fetcher())(source, limits)
    if scheme in ("", "file"):
        return _read_local(source, limits)
    raise MediaError(INVALID_REQUEST, "the path has a scheme that is not served, wanted an https, s3 or data URL")


def is_remote(source: str) -> bool:
    """Whether loading `source` goes over the network (https or s3), and so may block for seconds."""
    return isinstance(source, str) and _scheme_of(source.strip()) in ("https", "s3")


def is_public_address(address: str) -> bool:
    """Whether `address` (IPv4 or IPv6 text, as a resolver gives it) belongs to the public Internet.

    IPv4 inside IPv6 (mapped, NAT64) is judged by the IPv4 address; 6to4 and Teredo are never public. Source of the
    tables: the IANA special-purpose address registries for IPv4 and IPv6.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _NOT_PUBLIC_IPV4)
    if parsed.scope_id is not None:
        return False
    if parsed.ipv4_mapped is not None:
        return is_public_address(str(parsed.ipv4_mapped))
    if parsed in _NAT64:
        return is_public_address(str(ipaddress.IPv4Address(int(parsed) & 0xFFFF_FFFF)))
    return parsed in _GLOBAL_UNICAST_IPV6 and not any(parsed in network for network in _NOT_PUBLIC_IPV6)


# Own tables instead of `ipaddress.is_global`, whose answers differ between patch releases of Python 3.11.
_NOT_PUBLIC_IPV4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",  # multicast and reserved
        "168.63.129.16/32",  # formally public, yet every Azure machine reaches its host's metadata service there
    )
)
_GLOBAL_UNICAST_IPV6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_IPV6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, with Teredo (2001::/32)
        "2001:db8::/32",
        "2002::/16",  # 6to4: routes to the IPv4 address inside
        "3fff::/20",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


# ---- bytes from text -------------------------------------------------------------------------------------------------


def _kind_of(value: object) -> str:
    return "empty" if isinstance(value, str) else f"of type {type(value).__name__}"


def _scheme_of(source: str) -> str:
    """The lower-case URL scheme of `source`, "" where it has none."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", source)
    return match[1].lower() if match else ""


def _check_size(size_bytes: int, limits: MediaLimits) -> None:
    if size_bytes > limits.max_bytes:
        raise MediaError(TOO_LARGE, f"the picture has {size_bytes} bytes, at most {limits.max_bytes} are wanted")
    if size_bytes == 0:
        raise MediaError(INVALID_REQUEST, "the picture is empty")


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
    _check_size(1 if len(digits) == 1 else len(digits) * 3 // 4, limits)  # one digit is no byte, yet not "empty" either
    try:
        standard = digits.encode("ascii").translate(bytes.maketrans(b"-_", b"+/"))
        return base64.b64decode(standard + b"=" * (-len(standard) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise MediaError(INVALID_REQUEST, "the picture is not valid base64") from None


# ---- bytes from a local file -----------------------------------------------------------------------------------------


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
    if _scheme_of(source) != "file":
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
        _check_size(status.st_size, limits)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limits.max_bytes + 1)
    finally:
        os.close(descriptor)
    _check_size(len(data), limits)
    return data


# ---- bytes from the network ------------------------------------------------------------------------------------------


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
        read = self._read_s3 if _scheme_of(source) == "s3" else self._read_https
        data = read(source, limits, deadline)
        _check_size(len(data), limits)
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
    if _scheme_of(target) != "https" or len(target) > _MAX_URL_CHARS:
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


# ---- a picture from bytes --------------------------------------------------------------------------------------------

_BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)  # of the DIB header that follows: "BM" alone is also a word
_TIFF_MAGIC = (b"II*\0", b"MM\0*")


def _sniff_format(data: bytes) -> str:
    """The format by its signature. Only that one decoder of Pillow gets to see the bytes. Raises MediaError."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    if data[:4] in _TIFF_MAGIC:
        return "TIFF"
    raise MediaError(UNSUPPORTED_MEDIA, f"the bytes are not a picture in a known format, wanted {_FORMATS_TEXT}")


def _decode(data: bytes, picture_format: str, limits: MediaLimits) -> Image.Image:
    if picture_format == "JPEG":
        _check_jpeg_scans(data)
    elif picture_format == "TIFF":
        _check_tiff_layout(data, limits)
    with Image.open(io.BytesIO(data), formats=[picture_format]) as image:
        _check_dimensions(image.width, image.height, limits)
        image.load()
        orientation = _orientation(image)  # after load(): Pillow turns TIFF by itself there, and forgets the tag
        upright = _to_rgb(image)
    method = _TRANSPOSE.get(orientation)
    return upright if method is None else upright.transpose(method)


def _check_dimensions(width: int, height: int, limits: MediaLimits) -> None:
    if width < 1 or height < 1:
        raise MediaError(INVALID_REQUEST, "the picture is damaged: it has no pixels")
    if width * height > limits.max_pixels:
        raise MediaError(
            TOO_LARGE, f"the picture is {width} x {height} pixels, at most {limits.max_pixels} in all are wanted"
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise MediaError(
            TOO_LARGE, f"the picture is {width} x {height} pixels, a shape of at most {limits.max_aspect:g}:1 is wanted"
        )


_MAX_JPEG_SCANS = 64  # encoders write about 10, the thriftiest about 20
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # neither a stuffed 0xFF, nor fill, nor a restart marker


def _check_jpeg_scans(data: bytes) -> None:
    """Refuse progressive files of very many scans: each costs a few bytes to send and a pass over all pixels to decode.

    Measured: 1 000 scans of 61 bytes over 40 million grey pixels keep Pillow busy for 15 seconds, 10 MiB of them for
    40 minutes. Reads markers as libjpeg does, up to the end of the first picture.
    """
    position, scans = 2, 0
    while (match := _JPEG_MARKER.search(data, position)) and scans <= _MAX_JPEG_SCANS:
        marker, position = data[match.end() - 1], match.end()
        if marker == 0xD9:  # end of image; cameras append other things
            break
        if marker in (0x01, 0xD8):  # no length follows
            continue
        scans += marker == 0xDA
        position += int.from_bytes(data[position : position + 2], "big")
    if scans > _MAX_JPEG_SCANS:
        raise MediaError(TOO_LARGE, f"the JPEG picture has more than {_MAX_JPEG_SCANS} scans")


_MAX_TIFF_PARTS = 100_000
_TIFF_PART_TAGS = (273, 324)  # StripOffsets, TileOffsets
_TIFF_TILE_TAGS = (322, 323)  # TileWidth, TileLength


def _check_tiff_layout(data: bytes, limits: MediaLimits) -> None:
    """Refuse what costs memory before or besides the pixels: very many strips, very large tiles.

    Measured: 10 MB that declare 9.9 million one-byte strip offsets make Pillow allocate 2.3 GB in Image.open; one tile
    of 16384 x 16384 in a picture of 16 x 16 has libtiff allocate 268 MB. Layout: TIFF 6.0, section 2.
    Raises MediaError, and struct.error where the directory is cut off.
    """
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    (entries,) = struct.unpack_from(f"{order}H", data, directory)
    tile_sides = dict.fromkeys(_TIFF_TILE_TAGS, 0)
    for index in range(entries):
        entry = directory + 2 + 12 * index
        tag, kind, count = struct.unpack_from(f"{order}HHI", data, entry)
        if tag in _TIFF_PART_TAGS and count > _MAX_TIFF_PARTS:
            raise MediaError(TOO_LARGE, f"the TIFF picture has {count} parts, at most {_MAX_TIFF_PARTS} are wanted")
        if tag in _TIFF_TILE_TAGS:
            code = {1: "B", 3: "H", 4: "I"}.get(kind)  # BYTE, SHORT, LONG: all that can hold a side in the entry itself
            if code is None or count != 1:
                raise MediaError(INVALID_REQUEST, "the picture is damaged: its TIFF tile size is not a number")
            (side,) = struct.unpack_from(f"{order}{code}", data, entry + 8)
            tile_sides[tag] = max(tile_sides[tag], side)  # of a tag given twice, whichever a decoder takes is covered
    if tile_sides[322] * tile_sides[323] > limits.max_pixels:
        raise MediaError(TOO_LARGE, f"the TIFF picture has tiles of more than {limits.max_pixels} pixels")


_TRANSPOSE = {  # EXIF 2.32, tag 0x0112: how to turn what is stored into what was seen
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none.

    Not ImageOps.exif_transpose: it writes all EXIF entries again, however many there are.
    """
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """`image` as opaque RGB: transparent pixels on white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit values at 255 on conversion; only mode "I" can be scaled.
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise MediaError(
            UNSUPPORTED_MEDIA, f"the picture has pixels of mode {image.mode}, wanted grey, palette, RGB(A) or CMYK"
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGB", layer.size, "white")
        paper.paste(layer, mask=layer.getchannel("A"))
        return paper
    # Pillow may hand back the very object it has just decoded; the copy outlives the file it was read from.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()
