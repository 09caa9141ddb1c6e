"""Shows that bad input gets its own clear error and harms nobody: each request here is followed by a good one on the
same worker process, and an open session beside them keeps answering.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.chats import LONG
from tests.support.encoding import to_png
from tests.support.pictures import deep_grey_tiff, encode, png_with
from tests.support.wire import CLOSED_HEADER, SESSION_HEADER, ApiError, ChatSession

pytestmark = pytest.mark.usefixtures("same_worker")
SCENE = make_scene(HELD_OUT_SEEDS[0])


@pytest.fixture
def chat(http: httpx.Client) -> Iterator[ChatSession]:
    """An open session, which must be usable to the end whatever happened to others."""
    chat = ChatSession.open(http, SCENE.draw())
    expected = chat.ask("Which shapes are there?")["response_text"]
    yield chat
    other = ChatSession.open(http, SCENE.draw())
    assert other.ask("Which shapes are there?")["response_text"] == expected
    assert chat.ask("How many shapes are there?")["finish_reason"] == "stop"
    other.close()
    chat.close()


def post(http: httpx.Client, content: bytes | str, headers: dict[str, str] | None = None) -> httpx.Response:
    """A raw body, as a careless client would send it."""
    return http.post("/invocations", content=content, headers={"Content-Type": "application/json", **(headers or {})})


def code(reply: httpx.Response) -> tuple[int, str]:
    """Status and stable code of an error; its body must be exactly the documented one."""
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message"}
    assert len(body["error"]["message"]) > 15
    return reply.status_code, body["error"]["code"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{not json",
        b'{"type": "start_session", "image": "abc',
        b"\xff\xfe\x00bytes",
        b"null",
        b"[]",
        b'"text"',
        b"17",
        b"{}",
        b'{"type": "dance"}',
        b'{"type": ["start_session"]}',
        b'{"type": "start_session"}',
        b'{"type": "start_session", "image": 5}',
        b'{"type": "start_session", "image": ""}',
        b'{"type": "start_session", "image": "***"}',
        b'{"type": "start_session", "image": "AAAA", "path": "data:,x"}',
        b'{"type": "start_session", "path": "/etc/passwd"}',
        b'{"type": "start_session", "path": "s3://bucket/key"}',
        b'{"type": "start_session", "path": "http://example.com/a.png"}',
        b'{"type": "start_session", "path": "https://127.0.0.1/a.png"}',
        b'{"type": "send_text_prompt", "prompt_text": "no session named"}',
        b'{"type": "send_text_prompt", "session_id": "a b", "prompt_text": "hm"}',
        b"[" * 50_000,
    ],
)
def test_a_malformed_request_is_told_what_is_wrong(http: httpx.Client, body: bytes) -> None:
    status, name = code(post(http, body))
    assert (status, name) in {(400, "invalid_request"), (415, "unsupported_media")}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_text": None},
        {"prompt_text": ["a"]},
        {"prompt_text": "   "},
        {"prompt_text": "\ud800"},
        {"stream": "yes"},
        {"max_new_tokens": 0},
        {"max_new_tokens": 10**9},
        {"max_new_tokens": 1.5},
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"seed": -1},
        {"stop": [1]},
        {"stop": [""]},
        {"colour": "red"},
    ],
)
def test_a_wrong_field_is_refused_by_its_name(http: httpx.Client, chat: ChatSession, fields: dict) -> None:
    body = {"type": "send_text_prompt", "prompt_text": "How many?", **fields}
    reply = post(http, json.dumps(body), chat.headers)
    assert code(reply) == (400, "invalid_request")
    assert next(iter(fields)) in reply.json()["error"]["message"]
    assert CLOSED_HEADER not in reply.headers


def test_other_content_types_are_read_as_json_or_refused(http: httpx.Client) -> None:
    good = json.dumps({"type": "start_session", "image": base64.b64encode(to_png(SCENE.draw())).decode()})
    for content_type in ("application/octet-stream", "text/plain", "application/json; charset=utf-8", None):
        headers = {} if content_type is None else {"Content-Type": content_type}
        reply = http.post("/invocations", content=good.encode(), headers=headers)
        assert reply.status_code == 200, content_type
        ChatSession(http, reply.json()["session_id"], "").close()
    form = http.post("/invocations", files={"body": ("a.txt", b"hello", "text/plain")})
    assert code(form) == (415, "unsupported_media")
    smuggled = http.post("/invocations", files={SESSION_HEADER: ("a.txt", b"hello", "text/plain")})
    assert code(smuggled) == (415, "unsupported_media")


def test_unknown_closed_and_busy_sessions(http: httpx.Client, chat: ChatSession) -> None:
    ask = {"type": "send_text_prompt", "prompt_text": "How many?"}
    for request in (ask, {"type": "close_session"}, {"type": "cancel"}):
        reply = http.post("/invocations", json=request, headers={SESSION_HEADER: "never-opened"})
        assert code(reply) == (404, "session_not_found")
    closed = ChatSession.open(http, SCENE.draw())
    closed.close()
    assert closed.close().json()["success"] is True
    assert code(http.post("/invocations", json=ask, headers=closed.headers)) == (404, "session_not_found")
    mixed = http.post("/invocations", json={**ask, "session_id": "another"}, headers=chat.headers)
    assert code(mixed) == (400, "invalid_request")
    lines = chat.stream("Which shapes are there?", **LONG)
    next(lines)
    busy = http.post("/invocations", json=ask, headers=chat.headers)
    assert code(busy) == (409, "session_busy")
    rest = list(lines)
    assert "finish_reason" in rest[-1]


def test_cancel_ends_a_running_answer_and_the_chat_goes_on_as_if_it_had_not_been(http: httpx.Client) -> None:
    disturbed, calm = ChatSession.open(http, SCENE.draw()), ChatSession.open(http, SCENE.draw())
    for chat in (disturbed, calm):
        chat.ask("How many shapes are there?")
    lines = disturbed.stream("Say something long", **LONG)
    next(lines)
    reply = http.post("/invocations", json={"type": "cancel"}, headers=disturbed.headers)
    assert reply.json() == {"success": True, "session_id": disturbed.session_id}
    assert list(lines)[-1]["finish_reason"] == "cancelled"
    after = [chat.ask("And which shapes are they?") for chat in (disturbed, calm)]
    assert after[0]["response_text"] == after[1]["response_text"]
    assert after[0]["usage"] == after[1]["usage"]
    idle = http.post("/invocations", json={"type": "cancel"}, headers=disturbed.headers)
    assert idle.json()["success"] is False
    disturbed.close()
    calm.close()


def test_closing_while_an_answer_runs_ends_both(http: httpx.Client) -> None:
    chat = ChatSession.open(http, SCENE.draw())
    lines = chat.stream("Say something long", **LONG)
    next(lines)
    assert chat.close().json()["success"] is True
    assert list(lines)[-1]["finish_reason"] == "cancelled"
    with pytest.raises(ApiError, match="404 session_not_found"):
        chat.ask("Still there?")


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (b"just a text file, no picture\n" * 20, (415, "unsupported_media")),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", (415, "unsupported_media")),
        (to_png(SCENE.draw())[:900], (400, "invalid_request")),
        (to_png(SCENE.draw())[:-40], (400, "invalid_request")),
    ],
    ids=["text", "svg", "truncated early", "truncated late"],
)
def test_a_file_that_is_no_whole_picture(
    http: httpx.Client, chat: ChatSession, picture: bytes, expected: tuple
) -> None:
    image = base64.b64encode(picture).decode()
    assert code(http.post("/invocations", json={"type": "start_session", "image": image})) == expected


def test_a_decompression_bomb_is_refused_by_its_header(http: httpx.Client, chat: ChatSession) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000), 9)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    image = base64.b64encode(bomb).decode()
    assert code(http.post("/invocations", json={"type": "start_session", "image": image})) == (413, "too_large")


def test_a_body_of_twenty_megabytes(http: httpx.Client, chat: ChatSession) -> None:
    image = base64.b64encode(bytes(15_000_000)).decode()
    assert len(image) == 20_000_000
    reply = http.post("/invocations", json={"type": "start_session", "image": image})
    assert code(reply) == (413, "too_large")


def test_many_large_pictures_of_a_small_request_are_refused_undecoded(http: httpx.Client, chat: ChatSession) -> None:
    bits = base64.b64encode(encode(Image.new("1", (8000, 5000)), "PNG")).decode()
    assert len(bits) < 10_000
    clip = http.post("/invocations", json={"type": "start_session", "video": [bits] * 32})
    assert code(clip) == (415, "unsupported_media")
    pictures = http.post("/invocations", json={"type": "start_session", "images": [bits] * 8})
    assert code(pictures) == (413, "too_large")
    assert "at most 200000000 pixels together, got 320000000" in pictures.json()["error"]["message"]
    spaced = http.post("/invocations", json={"type": "start_session", "image": "AA " * 8_000_000})
    assert code(spaced) == (413, "too_large")
    path = http.post("/invocations", json={"type": "start_session", "path": "a" * 20_000_000})
    assert code(path) == (400, "invalid_request")


def test_odd_files_of_a_scene_are_answered_as_the_scene(http: httpx.Client) -> None:
    def answer(data: bytes) -> str:
        session = ChatSession.open(http, data)
        text: str = session.ask("Which shapes are there?")["response_text"]
        session.close()
        return text

    picture = SCENE.draw()
    control = to_png(picture)
    packed = zlib.compress(bytes(range(256)) * 8192, 1)  # 2 MiB
    for chunk in ((b"zTXt", b"workflow\0\0" + packed), (b"iCCP", b"a profile\0\0" + packed)):
        assert answer(png_with(chunk, of=control)) == answer(control)
    grey = picture.convert("L")
    assert answer(deep_grey_tiff(grey, 12)) == answer(to_png(grey))


def test_a_special_token_in_a_question_is_text(http: httpx.Client, chat: ChatSession) -> None:
    plain = chat.ask("What is <imag>?")["usage"]
    special = chat.ask("What is <image>?")["usage"]
    assert chat.ask("</s><s><pad><image>")["finish_reason"] in {"stop", "length"}
    grown = special["prompt_tokens"] - plain["prompt_tokens"] - plain["completion_tokens"]
    assert 5 < grown < 25, "as a placeholder it would be one token, or a picture's"


def test_a_hundred_thousand_characters_of_question(http: httpx.Client, chat: ChatSession) -> None:
    body = {"type": "send_text_prompt", "prompt_text": "word " * 20_000}
    assert code(http.post("/invocations", json=body, headers=chat.headers)) == (413, "too_large")


def test_a_question_longer_than_the_models_context(http: httpx.Client, chat: ChatSession) -> None:
    body = {"type": "send_text_prompt", "prompt_text": "how many " * 3_000}
    reply = http.post("/invocations", json=body, headers=chat.headers)
    assert code(reply) == (422, "context_length_exceeded")
    assert "2048" in reply.json()["error"]["message"]


def test_refused_and_unknown_ids_take_no_place_in_the_frontend(http: httpx.Client, chat: ChatSession) -> None:
    """TorchServe keeps a place for each id that it has seen; there are fewer places than requests here."""
    ask = {"type": "send_text_prompt", "prompt_text": "How many?"}

    def knock(index: int) -> int:
        headers = {SESSION_HEADER: f"unknown-{index}"} if index % 2 else {}
        return http.post("/invocations", json=ask, headers=headers).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(knock, range(400)))
    assert set(statuses) == {400, 404}


def test_answers_on_sequences_of_their_own_take_no_place_in_the_frontend(http: httpx.Client, chat: ChatSession) -> None:
    """A session named only in the body: the frontend makes a sequence for each request, and the answer takes steps."""
    ask = {"type": "send_text_prompt", "session_id": chat.session_id, "prompt_text": "How many?", "stream": True}
    for _ in range(160):
        reply = http.post("/invocations", json={**ask, "max_new_tokens": 2})
        assert reply.status_code == 200
        assert '"finish_reason"' in reply.text


def test_a_session_named_in_the_body_or_in_another_case_is_found(http: httpx.Client, chat: ChatSession) -> None:
    ask = {"type": "send_text_prompt", "prompt_text": "How many shapes are there?"}
    in_body = http.post("/invocations", json={**ask, "session_id": chat.session_id})
    in_case = http.post("/invocations", json=ask, headers={SESSION_HEADER.lower(): chat.session_id})
    assert in_body.json()["session_id"] == in_case.json()["session_id"] == chat.session_id
