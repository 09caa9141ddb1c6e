"""fetch: https and s3. A test listens on and connects to loopback only."""

from __future__ import annotations

import hashlib
import io
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpcore
import pytest
from PIL import Image

from llava_sessions.config import MediaLimits
from llava_sessions.media.fetch import Fetcher, resolve_host
from llava_sessions.media.limits import clip_file_limits
from tests.support.pictures import LIMITS, PATIENCE_S, PNG, encode, load_path, rejected
from tests.support.private_hosts import PRIVATE_HOSTS
from tests.support.tls_server import (
    NAME,
    PUBLIC,
    Rerouted,
    TlsServer,
    certificates,
    fetcher,
    ok,
    redirect,
    route,
    server,
)

__all__ = ["certificates", "fetcher", "route", "server"]


# ---- https
# ------------------------------------------------------------------------------------------------------------


def test_an_https_picture_is_fetched(server: TlsServer, route: Rerouted, fetcher: Fetcher) -> None:
    server.answers["/a%20b.png?size=%C3%A4"] = ok(PNG)
    picture = load_path("https://Pictures.Example./a b.png?size=ä#part", LIMITS, fetcher)
    assert picture.sha256 == hashlib.sha256(PNG).hexdigest()
    assert route.dialled == [(PUBLIC, 443)]
    assert server.names == [NAME]
    head = server.requests[0].lower()
    assert head.startswith("get /a%20b.png?size=%c3%a4 http/1.1\r\n")
    assert f"host: {NAME}\r\n" in head
    assert "accept-encoding: identity\r\n" in head
    assert "cookie" not in head
    assert "authorization" not in head


@pytest.mark.parametrize("host", [PUBLIC, "[2606:2800:21f:cb07:6820:80da:af6b:8b2c]"])
def test_a_public_address_in_the_url_is_connected_to(
    host: str, server: TlsServer, route: Rerouted, fetcher: Fetcher
) -> None:
    server.answers["/a.png"] = ok(PNG)
    assert load_path(f"https://{host}:443/a.png", LIMITS, fetcher).width == 24
    assert route.dialled == [(host.strip("[]"), 443)]
    assert f"Host: {host}\r\n" in server.requests[0]


def test_the_certificate_must_be_for_the_name_and_from_a_known_authority(server: TlsServer, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = ok(PNG)
    error = rejected("invalid_request", "certificate", lambda: fetcher("https://other.example/a.png", LIMITS))
    assert "ostname mismatch" in error.message
    strict = replace(fetcher, ssl_context=httpcore.default_ssl_context())
    rejected("invalid_request", "certificate", lambda: strict(f"https://{NAME}/a.png", LIMITS))
    assert server.connections == 2
    assert server.requests == []


def test_proxies_of_the_environment_are_not_used(server, fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["/a.png"] = ok(PNG)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetcher(f"https://{NAME}/a.png", LIMITS) == PNG


def test_many_threads_fetch_and_decode_at_once(server: TlsServer, fetcher: Fetcher) -> None:
    bodies = {f"/{i}": encode(Image.new("RGB", (10 + i, 10)), "PNG") for i in range(24)}
    server.answers.update({path: ok(body) for path, body in bodies.items()})
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(lambda path: load_path(f"https://{NAME}{path}", LIMITS, fetcher), bodies))
    assert [picture.width for picture in pictures] == [10 + i for i in range(24)]


# ---- https: addresses
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_private_addresses_are_rejected_in_any_spelling(
    host: str, server: TlsServer, route: Rerouted, fetcher: Fetcher
) -> None:
    real = replace(fetcher, resolve=resolve_host)  # numbers and localhost need no name server
    server.answers["/latest/meta-data"] = ok(PNG)
    rejected("invalid_request", "", lambda: load_path(f"https://{host}/latest/meta-data", LIMITS, real))
    assert route.dialled == []
    assert server.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        f"https://user@{NAME}/a.png",
        f"https://user:secret@{NAME}/a.png",
        f"https://{NAME}@127.0.0.1/a.png",
        f"https://127.0.0.1\\@{NAME}/a.png",
        f"https://{NAME}\\@127.0.0.1/a.png",
        f"https://{NAME}:8443/a.png",
        f"https://{NAME}:80/a.png",
        f"https://{NAME}:0/a.png",
        f"https://{NAME}:99999/a.png",
        f"https://{NAME}:x/a.png",
        f"https://{NAME}:443:443/a.png",
        f"https://[{NAME}]/a.png",
        f"https://[::1]{NAME}/a.png",
        "https://[::1/a.png",
        "https://[::1.png",
        "https:///a.png",
        "https://",
        "https:a.png",
        "https://./a.png",
        "https://a..example/a.png",
        f"https://{'a' * 64}.example/a.png",
        f"https://{'a.' * 130}example/a.png",
        "https://%31%32%37.0.0.1/a.png",
        "https://pictures.example%00.evil.example/a.png",
        "https://-a.example/a.png",
        f"https://{NAME}/a.png\r\nX-Injected: 1",
        f"https://{NAME}/a\tb.png",
        f"https://{NAME} /a.png",
        "https://pictures\u2024example/a.png",
    ],
)
def test_bad_urls_are_rejected_without_a_connection(
    url: str, server: TlsServer, route: Rerouted, fetcher: Fetcher
) -> None:
    error = rejected("invalid_request", "", lambda: load_path(url, LIMITS, fetcher))
    assert route.dialled == []
    assert server.connections == 0
    assert "secret" not in error.message
    assert "a.png" not in error.message


def test_a_name_with_one_private_address_is_rejected(server: TlsServer, route: Rerouted, fetcher: Fetcher) -> None:
    for answers in ([PUBLIC, "10.0.0.7"], ["::1", PUBLIC], [PUBLIC, "fe80::1%eth0"], [PUBLIC, "nonsense"]):
        mixed = replace(fetcher, resolve=lambda _host, _port, answers=answers: answers)
        error = rejected(
            "invalid_request", "public addresses only", lambda mixed=mixed: mixed(f"https://{NAME}/a", LIMITS)
        )
        assert "10.0.0.7" not in error.message  # private addresses stay secret
    assert route.dialled == []
    assert server.connections == 0


def test_a_name_is_resolved_once(server: TlsServer, route: Rerouted, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = ok(PNG)
    answers = [[PUBLIC], ["127.0.0.1"]]
    rebinding = replace(fetcher, resolve=lambda _host, _port: answers.pop(0))
    assert rebinding(f"https://{NAME}/a.png", LIMITS) == PNG
    assert route.dialled == [(PUBLIC, 443)]
    assert answers == [["127.0.0.1"]]


def test_a_name_that_is_not_found_is_rejected(fetcher: Fetcher) -> None:
    def unknown(_host: str, _port: int) -> list[str]:
        raise socket.gaierror("no such name")

    for resolve in (unknown, lambda _host, _port: []):
        error = rejected(
            "invalid_request",
            "not found",
            lambda resolve=resolve: replace(fetcher, resolve=resolve)(f"https://{NAME}/a.png?token=secret", LIMITS),
        )
        assert NAME in error.message
        assert "secret" not in error.message


class Unreachable(Rerouted):
    """The first `dead` addresses time out."""

    dead = 1
    timeout_s: float | None = None

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *_: object) -> httpcore.NetworkStream:
        if len(self.dialled) < self.dead:
            self.dialled.append((host, port))
            self.timeout_s = timeout
            raise httpcore.ConnectTimeout("dead")
        return super().connect_tcp(host, port, timeout)


def test_after_a_dead_address_the_next_one_is_tried(server: TlsServer, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = ok(PNG)
    route = Unreachable(server.port)
    two = replace(fetcher, backend=route, resolve=lambda _host, _port: ["2606:4700::1111", PUBLIC])
    assert two(f"https://{NAME}/a.png", LIMITS) == PNG
    assert route.dialled == [("2606:4700::1111", 443), (PUBLIC, 443)]
    assert route.timeout_s is not None
    assert 0 < route.timeout_s <= LIMITS.fetch_timeout_s / 2  # time is left for the next


def test_a_refused_connection_and_a_server_without_tls_are_named(server: TlsServer, fetcher: Fetcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    refusing = replace(fetcher, backend=Rerouted(port))
    rejected("invalid_request", "refused the connection", lambda: refusing(f"https://{NAME}/a.png", LIMITS))
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def answer_without_tls() -> None:
            connection, _ = plain.accept()
            with connection, suppress(OSError):
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1000)

        threading.Thread(target=answer_without_tls, daemon=True).start()
        wrong = replace(fetcher, backend=Rerouted(plain.getsockname()[1]))
        rejected("invalid_request", "TLS", lambda: wrong(f"https://{NAME}/a.png", LIMITS))


# ---- https: allowed hosts
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        (NAME, True),
        ("PICTURES.example.", True),
        ("a.cdn.example", True),
        ("cdn.example", False),
        ("evilcdn.example", False),
        ("x.pictures.example", False),
        ("pictures.example.evil.example", False),
        (PUBLIC, False),
    ],
)
def test_only_allowed_hosts_are_fetched_from(host: str, allowed: bool, server: TlsServer, fetcher: Fetcher) -> None:
    limits = MediaLimits(allowed_hosts=("Pictures.example", "*.cdn.example"))
    server.answers["/a.png"] = ok(PNG)
    if allowed:
        assert fetcher(f"https://{host}/a.png", limits) == PNG
    else:
        rejected("invalid_request", "this server allows", lambda: fetcher(f"https://{host}/a.png", limits))
        assert server.connections == 0


def test_an_allowed_host_must_still_be_public(server: TlsServer, fetcher: Fetcher) -> None:
    private = replace(fetcher, resolve=lambda _host, _port: ["10.1.2.3"])
    limits = MediaLimits(allowed_hosts=(NAME, "127.0.0.1"))
    rejected("invalid_request", "public addresses only", lambda: private(f"https://{NAME}/a.png", limits))
    rejected("invalid_request", "public addresses only", lambda: private("https://127.0.0.1/a.png", limits))
    assert server.connections == 0


# ---- https: redirects
# -------------------------------------------------------------------------------------------------


def test_three_redirects_are_followed_and_four_are_not(server: TlsServer, route: Rerouted, fetcher: Fetcher) -> None:
    server.answers["/1"] = redirect("/2", 301)
    server.answers["/2"] = redirect(f"https://{NAME}/3?x=1", 307)
    server.answers["/3?x=1"] = redirect("//a.cdn.example/4", 308)
    server.answers["/4"] = ok(PNG)
    assert fetcher(f"https://{NAME}/1", LIMITS) == PNG
    assert server.names == [NAME, NAME, NAME, "a.cdn.example"]
    server.answers["/0"] = redirect("/1", 303)
    rejected("invalid_request", "at most 3 times", lambda: fetcher(f"https://{NAME}/0", LIMITS))
    server.answers["/loop"] = redirect("/loop")
    before = server.connections
    rejected("invalid_request", "at most 3 times", lambda: fetcher(f"https://{NAME}/loop", LIMITS))
    assert server.connections - before == 4


@pytest.mark.parametrize(
    "location",
    [
        "https://127.0.0.1/x",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/x",
        "https://[::ffff:127.0.0.1]/x",
        "https://2130706433/x",
        "https://inside.example/x",
        "http://pictures.example/x",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "s3://bucket/key",
        "https://user:secret@pictures.example/x",
        "https://pictures.example:8443/x",
        "https://[::1",
        "/" + "x" * 9000,
    ],
)
def test_redirects_to_forbidden_addresses_are_rejected(
    location: str, server: TlsServer, route: Rerouted, fetcher: Fetcher
) -> None:
    server.answers["/a.png"] = redirect(location)
    inside = {"inside.example": ["10.0.0.1"]}
    careful = replace(fetcher, resolve=lambda host, _port: inside.get(host, [PUBLIC]))
    error = rejected("invalid_request", "", lambda: careful(f"https://{NAME}/a.png", LIMITS))
    assert route.dialled == [(PUBLIC, 443)]
    assert server.connections == 1
    assert "secret" not in error.message


def test_an_error_names_the_wrong_part_of_the_url(server: TlsServer, fetcher: Fetcher) -> None:
    rejected("invalid_request", "user name", lambda: fetcher(f"https://user:secret@{NAME}/a.png", LIMITS))
    rejected("invalid_request", "port must be 443, got 8443", lambda: fetcher(f"https://{NAME}:8443/a.png", LIMITS))
    rejected("invalid_request", "four decimal numbers", lambda: fetcher("https://0177.0.0.1/a.png", LIMITS))
    rejected("invalid_request", "backslash", lambda: fetcher(f"https://{NAME}\\a.png", LIMITS))
    server.answers["/a.png"] = redirect("http://pictures.example/x")
    rejected("invalid_request", f"{NAME} must redirect to", lambda: fetcher(f"https://{NAME}/a.png", LIMITS))


def test_a_redirect_to_a_host_that_is_not_allowed_is_rejected(server: TlsServer, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = redirect("https://a.cdn.example/b.png")
    server.answers["/b.png"] = ok(PNG)
    limits = MediaLimits(allowed_hosts=(NAME,))
    rejected("invalid_request", "a.cdn.example", lambda: fetcher(f"https://{NAME}/a.png", limits))
    assert server.connections == 1


# ---- https: answers
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "got 404"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "got 500"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 0\r\n\r\n", "got 206"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "got 302"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "got 204"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "closed the connection early"),
        (b"", "closed the connection early"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nfew", "closed the connection early"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "closed the connection early"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "closed the connection early"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 40_000, "closed the connection early"),
        (ok(b""), "empty"),
        (ok(zlib.compress(PNG), "Content-Encoding: deflate"), "uncompressed"),
        (ok(PNG, "Content-Encoding: br"), "uncompressed"),
    ],
)
def test_responses_without_a_picture_are_rejected(
    answer: bytes, words: str, server: TlsServer, fetcher: Fetcher
) -> None:
    server.answers["/a.png?token=secret"] = answer
    url = f"https://{NAME}/a.png?token=secret"
    assert "secret" not in rejected("invalid_request", words, lambda: load_path(url, LIMITS, fetcher)).message


def test_an_html_page_is_unsupported(server: TlsServer, fetcher: Fetcher) -> None:
    server.answers["/a.png"] = ok(b"<!doctype html><title>Log in</title>")
    rejected("unsupported_media", "PNG", lambda: load_path(f"https://{NAME}/a.png", LIMITS, fetcher))


def test_a_body_without_a_length_is_read(server: TlsServer, fetcher: Fetcher) -> None:
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(PNG[i : i + 50]), PNG[i : i + 50]) for i in range(0, len(PNG), 50))
    server.answers["/chunked"] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n"
    server.answers["/closed"] = b"HTTP/1.0 200 OK\r\n\r\n" + PNG
    for path in ("/chunked", "/closed"):
        assert fetcher(f"https://{NAME}{path}", LIMITS) == PNG


def send_endlessly(connection: ssl.SSLSocket, stopped: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    try:
        while True:
            connection.sendall(b"10000\r\n" + bytes(65_536) + b"\r\n")
    finally:
        stopped.set()


def test_a_body_that_is_too_long_is_aborted_while_it_streams(server: TlsServer, fetcher: Fetcher) -> None:
    stopped = threading.Event()
    server.answers["/a.png"] = lambda connection: send_endlessly(connection, stopped)
    limits = MediaLimits(max_bytes=200_000)
    rejected("too_large", "200000 bytes", lambda: fetcher(f"https://{NAME}/a.png", limits))
    assert stopped.wait(PATIENCE_S), "the connection is still open"


def test_a_clip_is_fetched_by_the_rules_of_pictures(server: TlsServer, fetcher: Fetcher) -> None:
    limits = clip_file_limits(MediaLimits(max_bytes=10, max_clip_bytes=1000))
    server.answers["/a.mp4"] = ok(bytes(1000))
    assert fetcher(f"https://{NAME}/a.mp4", limits) == bytes(1000)
    assert "\r\nAccept: video/mp4, " in server.requests[-1]
    server.answers["/b.mp4"] = ok(bytes(1001))
    rejected("too_large", "the clip must be at most 1000 bytes", lambda: fetcher(f"https://{NAME}/b.mp4", limits))
    server.answers["/moved"] = redirect("https://169.254.169.254/a.mp4")
    rejected("invalid_request", "public addresses only", lambda: fetcher(f"https://{NAME}/moved", limits))
    rejected("invalid_request", "must be one that this server allows", lambda: fetcher("s3://other/a.mp4", limits))
    other = clip_file_limits(MediaLimits(allowed_hosts=("other.example",)))
    rejected("invalid_request", "this server allows", lambda: fetcher(f"https://{NAME}/a.mp4", other))


def test_a_declared_length_is_used_only_to_reject_early(server: TlsServer, fetcher: Fetcher) -> None:
    limits = MediaLimits(max_bytes=1000)
    server.answers["/much"] = b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n"  # without a body
    started = time.perf_counter()
    rejected("too_large", "1000 bytes", lambda: fetcher(f"https://{NAME}/much", limits))
    assert time.perf_counter() - started < PATIENCE_S
    server.answers["/huge"] = b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 19 + b"\r\n\r\n"
    rejected("too_large", "1000 bytes", lambda: fetcher(f"https://{NAME}/huge", limits))
    # Bytes beyond the declared length are not part of the response.
    server.answers["/less"] = b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n" + PNG
    assert fetcher(f"https://{NAME}/less", limits) == PNG[:40]
    rejected("invalid_request", "damaged", lambda: load_path(f"https://{NAME}/less", limits, fetcher))
    server.answers["/exact"] = ok(bytes(1000))
    assert len(fetcher(f"https://{NAME}/exact", limits)) == 1000


# ---- https: time
# ------------------------------------------------------------------------------------------------------


class FakeClock:
    """A clock that a test's server moves."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def drip(connection: ssl.SSLSocket, head: bytes, piece: bytes, clock: FakeClock) -> None:
    """Send a piece every half second of `clock`: each single read is in time."""
    connection.sendall(head)
    while True:
        connection.sendall(piece)
        clock.now_s += 0.5
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X-More: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "headers", "chunks", "interim answers"],
)
def test_a_dripping_server_hits_the_deadline(
    head: bytes, piece: bytes, server: TlsServer, fetcher: Fetcher, clock: FakeClock
) -> None:
    server.answers["/a.png"] = lambda connection: drip(connection, head, piece, clock)
    timed = replace(fetcher, clock=clock)
    limits = MediaLimits(fetch_timeout_s=6)
    started = time.perf_counter()
    rejected("invalid_request", "within 6 s", lambda: timed(f"https://{NAME}/a.png", limits))
    assert clock.now_s >= 1006
    assert time.perf_counter() - started < PATIENCE_S


def test_a_slow_server_and_its_redirects_share_one_deadline(
    server: TlsServer, fetcher: Fetcher, clock: FakeClock
) -> None:
    def redirect_slowly(connection: ssl.SSLSocket) -> None:
        clock.now_s += 3.5
        connection.sendall(redirect("/a.png"))

    server.answers["/a.png"] = redirect_slowly
    timed = replace(fetcher, clock=clock)
    limits = MediaLimits(fetch_timeout_s=8)
    started = time.perf_counter()
    rejected("invalid_request", "within 8 s", lambda: timed(f"https://{NAME}/a.png", limits))
    assert clock.now_s >= 1007
    assert time.perf_counter() - started < PATIENCE_S
    assert server.connections in (2, 3)  # the redirects were followed and did not extend the deadline


def test_a_handshake_that_never_comes_hits_the_deadline(fetcher: Fetcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = replace(fetcher, backend=Rerouted(mute.getsockname()[1]))
        limits = MediaLimits(fetch_timeout_s=0.2)
        started = time.perf_counter()
        rejected("invalid_request", "within 0.2 s", lambda: silent(f"https://{NAME}/a.png", limits))
        assert 0.15 < time.perf_counter() - started < PATIENCE_S


def test_a_name_server_that_never_answers_hits_the_deadline(fetcher: Fetcher) -> None:
    release = threading.Event()

    def stuck(_host: str, _port: int) -> list[str]:
        release.wait(2 * PATIENCE_S)
        return [PUBLIC]

    limits = MediaLimits(fetch_timeout_s=0.2)
    started = time.perf_counter()
    rejected("invalid_request", "within 0.2 s", lambda: replace(fetcher, resolve=stuck)(f"https://{NAME}/a", limits))
    assert 0.15 < time.perf_counter() - started < PATIENCE_S
    release.set()


# ---- s3: botocore's stub
# ----------------------------------------------------------------------------------------------


S3_LIMITS = MediaLimits(s3_buckets=("my-pictures",))


@pytest.fixture(scope="module")
def s3_client() -> Any:
    boto3 = pytest.importorskip("boto3")
    session = boto3.session.Session(aws_access_key_id="id", aws_secret_access_key="not-a-key", region_name="us-east-1")
    return session.client("s3")


@pytest.fixture
def s3(s3_client: Any) -> Iterator[tuple[Any, Fetcher]]:
    """A stub of S3, which fails on an unexpected call, and a Fetcher that uses it."""
    from botocore.stub import Stubber

    with Stubber(s3_client) as stub:
        yield stub, Fetcher(s3_client=lambda: s3_client)
        stub.assert_no_pending_responses()


def s3_object(data: bytes, declared: int | None = None) -> dict:
    from botocore.response import StreamingBody

    length = len(data) if declared is None else declared
    return {"Body": StreamingBody(io.BytesIO(data), length), "ContentLength": length}


@pytest.mark.parametrize("key", ["a.png", "a b/ä?x#y.png", "a%20b.png"])
def test_an_s3_picture_is_fetched(key: str, s3) -> None:
    stub, fetcher = s3
    stub.add_response("get_object", s3_object(PNG), {"Bucket": "my-pictures", "Key": key})
    assert load_path(f"s3://my-pictures/{key}", S3_LIMITS, fetcher).width == 24


def test_s3_is_rejected_unless_the_bucket_is_allowed(s3) -> None:
    _, fetcher = s3
    rejected("invalid_request", "this server allows", lambda: load_path("s3://my-pictures/a.png", LIMITS, fetcher))
    for url in ("s3://other/a.png", "s3://my-pictures.evil/a.png", "s3://my-picture/a.png"):
        rejected("invalid_request", "this server allows", lambda url=url: load_path(url, S3_LIMITS, fetcher))
    for url in ("s3://my-pictures", "s3://my-pictures/", "s3://", "s3:my-pictures/a", "s3:///a", "s3://MY/a"):
        rejected("invalid_request", "s3 URI", lambda url=url: load_path(url, S3_LIMITS, fetcher))


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("NoSuchKey", 404, "does not exist"),
        ("AccessDenied", 403, "not readable"),
        ("NoSuchBucket", 404, "NoSuchBucket"),
        ("InternalError", 400, "InternalError"),
    ],
)
def test_s3_errors_are_named(code: str, status: int, words: str, s3) -> None:
    stub, fetcher = s3
    stub.add_client_error("get_object", code, "secret detail", http_status_code=status)
    error = rejected("invalid_request", words, lambda: load_path("s3://my-pictures/key-x", S3_LIMITS, fetcher))
    assert "secret" not in error.message
    assert "key-x" not in error.message


def test_s3_objects_that_are_too_large_are_rejected_by_declared_and_by_actual_size(s3) -> None:
    stub, fetcher = s3
    limits = MediaLimits(s3_buckets=("my-pictures",), max_bytes=1000)
    stub.add_response("get_object", s3_object(bytes(1001)))
    rejected("too_large", "1001 bytes", lambda: fetcher("s3://my-pictures/a", limits))
    wrong = s3_object(bytes(5000))
    wrong["ContentLength"] = 10
    stub.add_response("get_object", wrong)
    rejected("too_large", "1000 bytes", lambda: fetcher("s3://my-pictures/a", limits))
    stub.add_response("get_object", s3_object(bytes(10), declared=900))
    rejected("invalid_request", "IncompleteRead", lambda: fetcher("s3://my-pictures/a", limits))
    stub.add_response("get_object", s3_object(b""))
    rejected("invalid_request", "empty", lambda: fetcher("s3://my-pictures/a", limits))


def test_s3_hits_the_deadline_and_boto3_may_be_missing() -> None:
    release = threading.Event()
    stuck = Fetcher(s3_client=lambda: release.wait(2 * PATIENCE_S))
    limits = MediaLimits(s3_buckets=("my-pictures",), fetch_timeout_s=0.2)
    started = time.perf_counter()
    rejected("invalid_request", "within 0.2 s", lambda: stuck("s3://my-pictures/a", limits))
    assert time.perf_counter() - started < PATIENCE_S
    release.set()

    def no_boto3() -> object:
        raise ModuleNotFoundError("No module named 'boto3'")

    rejected("invalid_request", "boto3", lambda: Fetcher(s3_client=no_boto3)("s3://my-pictures/a", S3_LIMITS))


def test_the_default_s3_client_is_created_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fetcher = Fetcher()
    assert fetcher.s3_client() is fetcher.s3_client()
