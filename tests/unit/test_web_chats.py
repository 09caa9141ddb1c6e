"""The chats of the page's server: their pictures, their limits and their ends. The model server is scripted."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from llava_sessions_client import (
    Answer,
    AnswerChanged,
    Chat,
    ChatClosed,
    ConnectionFailed,
    Endpoint,
    NotConfigured,
    Timeouts,
    Turn,
)
from llava_sessions_client.conversation import Conversation
from llava_sessions_client.effects import Limits
from llava_sessions_client.wire import Reply, Request
from tests.support.client_script import lines, settings
from tests.support.pictures import PNG
from web.answering import events
from web.application import make_app
from web.chats import Chats, Comparison, WebChat, alone
from web.command import hosts_of
from web.pictures import StoredPicture, is_clip, render
from web.problems import Problem, in_words


class Streamed:
    """A transport whose reply is one streamed answer. `during` is called before the parts are read."""

    def __init__(self, *parts: bytes, during: Callable[[], None] = lambda: None) -> None:
        self.parts = [*parts]
        self.during = during
        self.bodies: list[dict[str, Any]] = []

    def start(self, request: Request, limits: Limits) -> tuple[Reply, Any]:
        self.bodies.append(request.body)
        return Reply(200), self

    def read(self) -> bytes:
        self.during()
        return self.parts.pop(0)

    def finish(self) -> None:
        pass

    def abort(self) -> None:
        pass


def encoded(mode: str = "RGB", kind: str = "PNG", colour: Any = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 8), colour).save(buffer, kind)
    return buffer.getvalue()


class ModelServer:
    """A model server for a real client: it opens and closes sessions. `during` is called in each open."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.opens: list[dict[str, Any]] = []
        self.numbers = itertools.count()
        self.during: Callable[[], object] = lambda: None
        self.closing: Callable[[], object] = lambda: None

    def reply(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if body["type"] == "close_session":
            self.closing()
            self.open.remove(request.headers["X-Amzn-SageMaker-Session-Id"])
            return httpx.Response(200, json={"success": True})
        session_id = f"session-{next(self.numbers)}"
        self.opens.append(body)
        self.during()
        self.open.add(session_id)
        announced = f"{session_id}; Expires=2030-01-01T00:00:00Z"
        return httpx.Response(200, json={}, headers={"X-Amzn-SageMaker-Session-Id": announced})

    def endpoint(self) -> Endpoint:
        client = httpx.Client(transport=httpx.MockTransport(self.reply))
        return Endpoint("http://127.0.0.1:9", http_client=client, timeout_s=Timeouts(close_s=60))

    def chats(self, **limits: Any) -> Chats:
        return Chats(self.endpoint(), lambda _: self.endpoint(), **limits)


def attach(chat: WebChat, data: bytes) -> None:
    chat.attach(data, *render(data))


def chat_of(transport: object) -> WebChat:
    session = Chat(Conversation(settings(), (), session_id="abc-1"), transport, None, lambda _: None)  # type: ignore[arg-type]
    return WebChat("one", session, [StoredPicture(0, PNG, *render(PNG))])


@pytest.mark.parametrize(
    ("host", "port", "allowed", "named"),
    [
        ("127.0.0.1", 80, [], "localhost"),
        ("::1", 80, [], "[::1]"),
        ("0.0.0.0", 8100, ["192.0.2.7"], "192.0.2.7:8100"),
        ("127.0.0.1", 8100, ["Chat.example.com:443"], "chat.example.com"),
    ],
)
def test_a_host_is_known_as_browsers_name_it(host: str, port: int, allowed: list[str], named: str) -> None:
    hosts = hosts_of(host, port, allowed)
    assert named in hosts
    assert {"localhost:8101", "evil.example", f"evil.example:{port}", ""} & hosts == set()


def test_an_unknown_host_is_refused_with_the_option_that_allows_it() -> None:
    app = make_app("http://127.0.0.1:9", hosts_of("0.0.0.0", 8100, []))

    async def get(host: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}") as http:
            return await http.get("/")

    refused = asyncio.run(get("192.0.2.7:8100"))
    assert refused.status_code == 403
    assert "--allow-host" in refused.json()["problem"]["advice"]
    assert asyncio.run(get("localhost:8100")).status_code == 200


def test_a_removed_picture_leaves_its_number_to_no_other() -> None:
    chat = chat_of(None)
    attach(chat, PNG)
    chat.detach(1)
    attach(chat, encoded())
    assert [one.number for one in chat.pictures] == [0, 2]


def refused(work: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(Problem) as raised:
        work(*arguments)
    return raised.value.code


def test_the_memory_of_all_pictures_is_limited() -> None:
    one = StoredPicture(0, PNG, *render(PNG)).held_bytes
    assert one >= len(PNG) * 7 // 3, "the client has a copy in base64"
    chats = ModelServer().chats(max_bytes=2 * one)
    first = chats.open(PNG)
    second = chats.open(PNG)
    assert refused(chats.attach, first, PNG) == refused(chats.open, PNG) == "too_many_pictures"
    chats.close(second)
    chats.attach(first, PNG)
    assert refused(chats.open, PNG) == "too_many_pictures"
    first.detach(1)
    chats.open(PNG)


def test_chats_that_are_being_opened_count() -> None:
    server = ModelServer()
    chats = server.chats(most=2)
    codes: list[str] = []

    def second() -> None:
        server.during = third
        chats.open(PNG)

    def third() -> None:
        server.during = lambda: None
        codes.append(refused(chats.open, PNG))

    server.during = second
    chats.open(PNG)
    assert codes == ["too_many_chats"]
    assert len(chats.all()) == len(server.open) == 2


def test_an_open_that_fails_leaves_its_room() -> None:
    chats = ModelServer().chats(most=1)
    assert refused(chats.open, b"no picture") == "invalid_picture"
    chats._endpoint = Endpoint("http://127.0.0.1:9", retries=0)
    with pytest.raises(ConnectionFailed):
        chats.open(PNG)
    chats._endpoint = ModelServer().endpoint()
    chats.open(PNG)


def test_the_chat_unused_longest_makes_room_for_another() -> None:
    server = ModelServer()
    chats = server.chats(most=2, unused_s=0)
    first = chats.open(PNG)
    second = chats.open(PNG)
    chats.find(first.id)
    third = chats.open(PNG)
    assert chats.all() == [first, third]
    assert server.open == {first.session.session_id, third.session.session_id}
    assert refused(chats.find, second.id) == "chat_not_found"
    with alone(first):
        fourth = chats.open(PNG)
        assert chats.all() == [first, fourth]
        with alone(fourth):
            assert refused(chats.open, PNG) == "too_many_chats"
    assert chats.all() == [first, fourth]


def test_a_picture_takes_the_memory_of_an_unused_chat() -> None:
    server = ModelServer()
    chats = server.chats(max_bytes=2 * StoredPicture(0, PNG, *render(PNG)).held_bytes, unused_s=0)
    chats.open(PNG)
    used = chats.open(PNG)
    chats.attach(used, PNG)
    assert chats.all() == [used]
    assert server.open == {used.session.session_id}


def test_a_picture_does_not_close_its_own_chat() -> None:
    server = ModelServer()
    chats = server.chats(max_bytes=StoredPicture(0, PNG, *render(PNG)).held_bytes, unused_s=0)
    chat = chats.open(PNG)
    assert refused(chats.attach, chat, PNG) == "too_many_pictures"
    assert chats.all() == [chat]
    assert server.open == {chat.session.session_id}


def test_a_closed_chat_accepts_no_picture() -> None:
    chats = ModelServer().chats()
    chat = chats.open(PNG)
    chats.close(chat)
    assert refused(chats.attach, chat, PNG) == "chat_not_found"
    assert len(chat.pictures) == 1


def test_all_chats_are_closed_at_the_same_time() -> None:
    server = ModelServer()
    chats = server.chats()
    barrier = threading.Barrier(3)
    server.closing = lambda: barrier.wait(20)
    for _ in range(3):
        chats.open(PNG)
    chats.close_all()
    assert server.open == set()
    assert not barrier.broken


def test_a_chat_that_is_closed_while_it_opens_again_leaves_no_session() -> None:
    server = ModelServer()
    chats = server.chats()
    chat = chats.open(PNG)
    server.during = lambda: chats.close(chat)
    assert refused(chats.reopen, chat) == "chat_not_found"
    assert server.open == set()


def test_a_chat_that_opens_while_all_are_closed_leaves_no_session() -> None:
    server = ModelServer()
    chats = server.chats()
    server.during = chats.close_all
    assert refused(chats.open, PNG) == "chat_not_found"
    assert server.open == set()


def test_the_comparison_of_a_turn_that_is_gone_is_dropped() -> None:
    chat = chat_of(Streamed(lines("Red."), lines("Blue.")))
    ask(chat)
    [turn] = chat.turns
    chat.comparisons = {turn: Comparison(1.0, 2), Turn("Gone?", Answer("Yes.")): Comparison(1.0, 2)}
    ask(chat)
    assert [*chat.comparisons] == [turn]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_kind_of_picture_is_shown(kind: str) -> None:
    shown, _ = render(encoded("RGB", kind, (255, 0, 0)))
    red, green, blue = Image.open(io.BytesIO(shown)).convert("RGB").getpixel((4, 4))
    assert red > 250 > 5 >= max(green, blue)


@pytest.mark.parametrize(
    ("mode", "colour"),
    [
        ("CMYK", (0, 0, 0, 128)),
        ("LAB", (127, 128, 128)),
        ("F", 127.0),
        ("I", 127),
        ("I;16", 127 << 8),
        ("LA", (0, 128)),
    ],
)
def test_a_picture_is_shown_as_the_model_sees_it(mode: str, colour: Any) -> None:
    shown, _ = render(encoded(mode, "TIFF", colour))
    assert Image.open(io.BytesIO(shown)).convert("RGB").getpixel((4, 4)) == pytest.approx((127, 127, 127), abs=10)


def ask(chat: WebChat) -> list[str]:
    """Ask a question, and return the names of the events of its answer."""

    async def names() -> list[str]:
        stream = events(chat, lambda: chat.ask("Which?", {}), len(chat.turns))
        return [event.split("\n")[0].removeprefix("event: ") async for event in stream]

    return asyncio.run(names())


def test_a_picture_that_is_attached_during_an_answer_waits_for_the_next_question() -> None:
    transport = Streamed(lines("Red."), lines("Blue."))
    chat = chat_of(transport)
    attach(chat, encoded())

    def during() -> None:
        transport.during = lambda: None
        attach(chat, encoded("L"))
        with pytest.raises(Problem, match="being sent"):
            chat.detach(1)

    transport.during = during
    assert ask(chat) == ["piece", "end"]
    assert [(one.number, one.turn, one.pending) for one in chat.pictures[1:]] == [(1, 0, False), (2, None, True)]
    assert ask(chat) == ["piece", "end"]
    assert [(one.number, one.turn) for one in chat.pictures[1:]] == [(1, 0), (2, 1)]


MP4 = b"\x00\x00\x00\x20ftypisom" + bytes(100)


@pytest.mark.parametrize(
    ("begin", "expected"),
    [
        (MP4, True),
        (b"\x00\x00\x00\x14ftypqt  ", True),
        (b"\x1a\x45\xdf\xa3", True),
        (b"\x00\x00\x00\x20ftypheic", False),
        (PNG, False),
        (b"", False),
    ],
)
def test_a_clip_is_known_by_its_content(begin: bytes, expected: bool) -> None:
    assert is_clip(begin) == expected


def test_a_clip_is_shown_with_its_question_beside_pictures() -> None:
    transport = Streamed(lines("Red."), lines("Blue."))
    chat = chat_of(transport)
    attach(chat, MP4)
    attach(chat, PNG)
    with pytest.raises(Problem, match="at most one clip"):
        attach(chat, MP4)

    def during() -> None:
        transport.during = lambda: None
        attach(chat, MP4)  # waits for the next question

    transport.during = during
    assert ask(chat) == ["piece", "end"]
    assert ask(chat) == ["piece", "end"]
    assert [("image" in body, "video" in body) for body in transport.bodies] == [(True, True), (False, True)]
    assert [(one.number, one.turn) for one in chat.pictures[1:]] == [(1, 0), (2, 0), (3, 1)]
    assert chat.pictures[1].media_type == "image/png"
    Image.open(io.BytesIO(chat.pictures[1].shown)).load()


def test_a_chat_is_opened_again_on_its_clip() -> None:
    server = ModelServer()
    chats = server.chats()
    chat = chats.open(MP4)
    chats.reopen(chat)
    assert chat.session.clip is not None
    assert ["video" in body for body in server.opens] == [True, True]
    assert server.opens[0]["video"] == server.opens[1]["video"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotConfigured("no region"), "not_configured"),
        (ChatClosed("closed"), "chat_closed"),
        (AnswerChanged(Answer("B")), "answer_changed"),
    ],
)
def test_errors_of_the_client_have_words(error: Exception, code: str) -> None:
    assert in_words(error).code == code


def test_a_changed_answer_ends_with_the_turn() -> None:
    chat = chat_of(Streamed(lines("A", end=False), b"", lines("B")))
    assert ask(chat) == ["piece", "end"]
    assert [turn.answer.text for turn in chat.turns] == ["B"]
