"""What the page's server accepts: its own host and origin, bounded bodies, and a chat by its ID only."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.support.browser import PICTURE, REPO, PageServer, WebCommand

PAGE = REPO / "web" / "page"
BYTES = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def http(web: WebCommand) -> Iterator[httpx.Client]:
    """Make a client of the page's server."""
    with httpx.Client(base_url=web.url, timeout=120, trust_env=False) as client:
        yield client


def problem(reply: httpx.Response) -> dict[str, str]:
    found: dict[str, str] = reply.json()["problem"]
    assert found["title"].endswith(".")
    return found


def opened(http: httpx.Client, data: bytes | None = None) -> str:
    reply = http.post("/api/chats", content=data or PICTURE.read_bytes(), headers=BYTES)
    assert reply.status_code == 201
    chat_id: str = reply.json()["chat"]["id"]
    return chat_id


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8100"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=lambda headers: " ".join(f"{name} {value}" for name, value in headers.items()),
)
def test_requests_of_other_sites_are_refused(http: httpx.Client, headers: dict[str, str]) -> None:
    for reply in (http.get("/api/status", headers=headers), http.post("/api/chats", content=b"x", headers=headers)):
        assert reply.status_code == 403
        assert problem(reply)["code"] == "forbidden"


def test_every_reply_forbids_other_hosts_scripts_and_frames(http: httpx.Client) -> None:
    for path in ("/", "/page/main.js", "/api/status", "/api/chats/unknown", "/nowhere"):
        headers = http.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_the_page_names_no_other_host() -> None:
    """Chromium blocks such requests too. This also finds those that no test causes."""
    for path in [one for one in PAGE.rglob("*") if one.suffix in (".html", ".js", ".css", ".svg")]:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|innerHTML|eval\(", text), path
        assert len(text.splitlines()) <= 400, path


def test_a_picture_is_served_to_its_chat_only_and_without_metadata(http: httpx.Client) -> None:
    picture = Image.open(PICTURE)
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    data = io.BytesIO()
    picture.save(data, "JPEG", exif=exif)
    first = opened(http, data.getvalue())
    second = opened(http)
    shown = http.get(f"/api/chats/{first}/pictures/0")
    assert shown.headers["content-type"] == "image/jpeg"
    assert b"secret" not in shown.content
    assert http.get(f"/api/chats/{second}/pictures/1").status_code == 404
    assert http.get(f"/api/chats/{first[:-1]}/pictures/0").status_code == 404
    for chat in (first, second):
        assert http.delete(f"/api/chats/{chat}").status_code == 204
        assert problem(http.get(f"/api/chats/{chat}"))["code"] == "chat_not_found"


def test_bad_bodies_are_refused_in_words(http: httpx.Client) -> None:
    chat = opened(http)
    questions = f"/api/chats/{chat}/questions"
    for body in (b"", b"{", b"[]", b'{"text": 5}', b'{"text": " "}', b"[" * 50_000, b"\xff"):
        reply = http.post(questions, content=body, headers={"Content-Type": "application/json"})
        assert (reply.status_code, problem(reply)["code"]) == (400, "no_question")
    long = http.post(questions, json={"text": "x" * 5000})
    assert problem(long)["code"] == "too_large"
    large = http.post(questions, json={"text": "x" * 100_000})
    assert (large.status_code, problem(large)["code"]) == (413, "too_large")
    for path in ("turns/5/edit", "turns/0/comparison", "retry"):
        reply = http.post(f"/api/chats/{chat}/{path}", json={"text": "Why?"})
        assert (reply.status_code, problem(reply)["code"]) == (404, "turn_not_found")
    assert http.post(f"/api/chats/{chat}/stop").json() == {"stopped": False}
    http.delete(f"/api/chats/{chat}")


@pytest.mark.parametrize("kind", ["text", "cut", "too many pixels", "too narrow", "empty"])
def test_files_that_are_no_pictures_open_nothing(http: httpx.Client, kind: str) -> None:
    def encoded(width: int, height: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("1", (width, height)).save(buffer, "PNG")
        return buffer.getvalue()

    data = {
        "text": lambda: b"<svg onload=alert(1)>",
        "cut": lambda: PICTURE.read_bytes()[:500],
        "too many pixels": lambda: encoded(8000, 8000),
        "too narrow": lambda: encoded(2000, 2),
        "empty": lambda: b"",
    }[kind]()
    reply = http.post("/api/chats", content=data, headers=BYTES)
    assert reply.status_code in (413, 415)
    assert problem(reply)["code"] in ("invalid_picture", "too_large")


def test_a_body_above_the_limit_is_refused_with_and_without_its_length(http: httpx.Client) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 1_000_000

    for content in (b"x" * 26_000_000, parts()):
        reply = http.post("/api/chats", content=content, headers=BYTES)
        assert (reply.status_code, problem(reply)["code"]) == (413, "too_large")


def test_a_server_that_cannot_be_reached_is_named_in_words() -> None:
    with PageServer("http://127.0.0.1:9") as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        status = http.get("/api/status").json()
        assert (status["state"], status["title"]) == ("unreachable", "The model server does not answer.")
        reply = http.post("/api/chats", content=PICTURE.read_bytes(), headers=BYTES, timeout=60)
        assert (reply.status_code, problem(reply)["code"]) == (503, "unreachable")


def test_the_command_prints_one_line_with_the_address_and_names_a_port_in_use(web: WebCommand, tmp_path: Path) -> None:
    assert len(web.lines) == 2, web.lines
    assert web.lines[0] == "starting the model server ..."
    port = web.url.rpartition(":")[2]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "web", *options]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)

    taken = run("--port", port, "--check")
    assert taken.returncode == 1
    assert re.fullmatch(rf"python -m web: error: port {port} .* choose another --port\n", taken.stderr)
    unpacked = run("--port", "0", "--model-store", str(tmp_path))
    assert unpacked.returncode == 1
    assert "Traceback" not in unpacked.stderr
    assert "error: " in unpacked.stderr
