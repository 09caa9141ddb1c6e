"""tests.support.wire against a stand-in for the server: the requests it sends, and how it reads the replies."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable

import httpx
import pytest
from PIL import Image

from llava_sessions_client.lines import split_lines
from tests.support.server_metrics import read_metrics, wait_for_metrics
from tests.support.wire import SESSION_HEADER, Answer, ApiError, ChatSession

OPENED = {SESSION_HEADER: "abc-1; Expires=2030-01-01T00:00:00Z"}
Respond = Callable[[httpx.Request], httpx.Response]


def http(respond: Respond) -> httpx.Client:
    return httpx.Client(base_url="http://server", transport=httpx.MockTransport(respond))


def session(respond: Respond) -> ChatSession:
    return ChatSession(http(respond), "abc-1", "")


def lines(*events: dict) -> httpx.Response:
    return httpx.Response(200, text="".join(f"{json.dumps(event)}\n" for event in events))


def test_lines_end_at_lf_only_and_parts_may_end_anywhere() -> None:
    events = [{"delta": word} for word in ("Es ", "grün", " 🟩", "a\u2028b\u2029c\x85d\x0be", ".")]
    data = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events).encode()
    for cut in range(len(data) + 1):
        assert [json.loads(line) for line in split_lines([data[:cut], data[cut:]])] == events
    assert list(session(lambda _: httpx.Response(200, content=data)).stream("Hm?")) == events
    assert list(split_lines([data[:-1]]))[-1] == b'{"delta": "."}', "a body that ends without LF"


@pytest.mark.parametrize("picture", [b"encoded", Image.new("RGB", (3, 2), "red")])
def test_an_open_sends_the_picture_and_keeps_id_and_expiry(picture: bytes | Image.Image) -> None:
    bodies: list[dict] = []

    def respond(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, headers=OPENED, json={})

    opened = ChatSession.open(http(respond), picture)
    assert (opened.session_id, opened.expires) == ("abc-1", "2030-01-01T00:00:00Z")
    assert bodies[0]["type"] == "start_session"
    sent = base64.b64decode(bodies[0]["image"])
    if isinstance(picture, bytes):
        assert sent == picture
    else:
        assert Image.open(io.BytesIO(sent)).size == (3, 2)


def test_ask_and_close_name_the_session_and_pass_options() -> None:
    requests: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json={"response_text": "A circle."})

    chat = session(respond)
    assert chat.ask("Which shape?", max_new_tokens=5) == {"response_text": "A circle."}
    chat.close()
    assert [request.headers[SESSION_HEADER] for request in requests] == ["abc-1", "abc-1"]
    assert [json.loads(request.content) for request in requests] == [
        {"type": "send_text_prompt", "prompt_text": "Which shape?", "max_new_tokens": 5},
        {"type": "close_session"},
    ]


def test_a_streamed_answer_grows_and_ends_with_its_facts() -> None:
    chat = session(lambda _: lines({"delta": "A "}, {"delta": "circle."}, {"delta": "", "finish_reason": "stop"}))
    answer = Answer()
    texts = []
    for delta, answer in chat.stream_answer("Which shape?"):
        texts.append((delta, answer.text))
    assert texts == [("A ", "A "), ("circle.", "A circle."), ("", "A circle.")]
    assert answer.facts["finish_reason"] == "stop"
    assert 0 < answer.ttft_s <= answer.total_s


def test_an_error_after_status_200_is_raised() -> None:
    late = httpx.Response(200, json={"error": {"code": "internal", "message": "cause"}})
    with pytest.raises(ApiError, match="200 internal: cause"):
        session(lambda _: late).ask("Which shapes?")


def test_an_error_line_in_a_stream_is_raised() -> None:
    chat = session(lambda _: lines({"delta": "A"}, {"error": {"code": "engine_restarting", "message": "Ask again."}}))
    with pytest.raises(ApiError, match="engine_restarting: Ask again"):
        list(chat.stream_answer("Which shape?"))


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (
            httpx.Response(404, json={"error": {"code": "session_not_found", "message": "Gone."}}),
            "session_not_found",
        ),
        (httpx.Response(502, text="<html>"), "unexpected_reply"),
        (httpx.Response(500, json=["error"]), "unexpected_reply"),
        (httpx.Response(500, json={"error": {"code": "x"}}), "unexpected_reply"),
    ],
)
def test_an_error_reply_is_raised_with_status_and_code(reply: httpx.Response, code: str) -> None:
    for call in (lambda chat: chat.ask("?"), lambda chat: list(chat.stream("?")), lambda chat: chat.close()):
        with pytest.raises(ApiError) as raised:
            call(session(lambda _: httpx.Response(reply.status_code, content=reply.content)))
        assert (raised.value.status, raised.value.code) == (reply.status_code, code)


def test_metrics_are_read_from_the_prometheus_page(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([1, 1, 2])
    urls: list[str] = []

    def get(url: str, **_: object) -> httpx.Response:
        urls.append(url)
        text = (
            f'# TYPE llava_open_sessions gauge\nllava_open_sessions{{Level="Model"}} {next(values)}\nother{{a="b"}} 5\n'
        )
        return httpx.Response(200, text=text, request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "get", get)
    assert read_metrics("http://server:8082") == {"llava_open_sessions": 1.0}
    assert wait_for_metrics("http://server:8082/metrics", llava_open_sessions=2) == {"llava_open_sessions": 2.0}
    assert set(urls) == {"http://server:8082/metrics"}
