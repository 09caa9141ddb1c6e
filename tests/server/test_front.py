"""What HAProxy makes of requests in front of the real server: the rules of sessions.cfg, and chats through them.

Headers that only a handler sees are looked at in test_launch.py.
"""

from __future__ import annotations

import base64
import csv
import gzip
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from bench import conversations, harness, route
from bench.peers.clients import NativeChat, OpenAIChat, run_chats
from bench.peers.worker import Chat, Job
from deploy.serve.configuration import CORS_VARIABLE
from deploy.serve.haproxy import HAProxy, find_haproxy
from deploy.serve.ports import free_ports
from deploy.serve.processes import Guard, ServeError
from deploy.serve.torchserve import TorchServe
from llava_sessions.config import MAX_REQUEST_BYTES as LIMIT
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.chats import LONG
from tests.support.encoding import to_png
from tests.support.server_metrics import wait_for_metrics
from tests.support.wire import CLOSED_HEADER, SESSION_HEADER, ChatSession

NEW_HEADER = "X-Amzn-SageMaker-New-Session-Id"
ROOT = Path(__file__).parents[2]
SCENE = make_scene(HELD_OUT_SEEDS[0])
QUESTION = "How many shapes are there?"
ORIGINS = "https://a.example http://localhost:3000"
FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HAProxy's folder for its sockets and its log."""
    home = tmp_path_factory.mktemp("f")
    (home / "logs").mkdir()
    return home


@pytest.fixture(scope="module")
def url(server: TorchServe, home: Path) -> Iterator[str]:
    """Run HAProxy in front of the shared server."""
    guard = Guard()
    port = free_ports(1)[0]
    front = HAProxy(find_haproxy(), home, guard, port=port, target=int(server.url.rsplit(":", 1)[1]))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(CORS_VARIABLE, ORIGINS)
        front.start()
    front.open()
    yield f"http://127.0.0.1:{port}"
    front.stop()
    guard.release()


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def chat(http: httpx.Client) -> Iterator[ChatSession]:
    chat = ChatSession.open(http, SCENE.draw())
    yield chat
    chat.close()


def test_the_reason_why_haproxy_does_not_start_is_printed(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    guard = Guard()
    front = HAProxy(find_haproxy(), tmp_path, guard, port=free_ports(1)[0], target=1, host="192.0.2.1")
    with pytest.raises(ServeError, match="cannot bind socket"):
        front.start()
    front.stop()
    guard.release()


def raw(url: str, request: bytes) -> tuple[int, list[str], bytes]:
    """Status, header lines and body of the answer to a request that is sent as it stands."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), lines, body


def post(url: str, body: dict, *headers: str) -> tuple[int, list[str], dict]:
    """A request whose headers are spelled as given."""
    data = json.dumps(body).encode()
    lines = ["POST /invocations HTTP/1.1", "Host: x", "Connection: close", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(data)}", *headers, "", ""])
    status, lines, answer = raw(url, head.encode() + data)
    return status, lines, json.loads(answer)


def test_a_session_is_the_same_in_any_spelling_of_its_header(url: str, chat: ChatSession) -> None:
    body = {"type": "send_text_prompt", "prompt_text": QUESTION}
    seen = 0
    for name in (SESSION_HEADER, SESSION_HEADER.lower(), SESSION_HEADER.upper()):
        status, _, answer = post(url, body, f"{name}: {chat.session_id}")
        assert status == 200
        assert answer["usage"]["prompt_tokens"] > seen, "a later turn of one chat"
        seen = answer["usage"]["prompt_tokens"]


def statistics(home: Path) -> dict[str, dict[str, str]]:
    """HAProxy's figures of each backend and server."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(home / "admin.sock"))
        connection.sendall(b"show stat\n")
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    rows = csv.DictReader(text.removeprefix("# ").splitlines())
    return {f"{row['pxname']}/{row['svname']}": row for row in rows}


def test_a_few_large_bodies_run_at_a_time_and_the_others_wait(http: httpx.Client, home: Path) -> None:
    padded = to_png(SCENE.draw()) + bytes(1_500_000)
    body = {"type": "start_session", "image": base64.b64encode(padded).decode()}
    before = statistics(home)["large/local"]
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda _: http.post("/invocations", json=body), range(20)))
    assert [reply.status_code for reply in replies] == [200] * 20, replies[0].text
    after = statistics(home)["large/local"]
    assert int(after["stot"]) - int(before["stot"]) == 20, "no other request took this way"
    assert int(after["smax"]) <= int(after["slim"]) == 16
    for reply in replies:
        ChatSession(http, reply.json()["session_id"], "").close()


def test_a_small_chunked_body_takes_no_place_of_the_large_ones(http: httpx.Client, home: Path) -> None:
    """Many clients send each body in chunks. Eight streams would hold all places until their last lines."""

    def passed_as_large(size: int) -> int:
        before = int(statistics(home)["large/local"]["stot"])
        reply = http.post("/invocations", content=iter([b"{", b" " * size, b"}"]))
        assert reply.status_code == 400
        return int(statistics(home)["large/local"]["stot"]) - before

    assert [passed_as_large(size) for size in (10, 32_000, 70_000, 1 << 20)] == [0, 0, 1, 1]


@pytest.mark.parametrize("header", ["", ": NEW_SESSION", ":", "lower: NEW_SESSION"])
def test_an_open_gets_a_session_of_its_own(url: str, http: httpx.Client, header: str) -> None:
    name = SESSION_HEADER.lower() if header.startswith("lower") else SESSION_HEADER
    headers = [name + header.removeprefix("lower")] if header else []
    body = {"type": "start_session", "image": base64.b64encode(to_png(SCENE.draw())).decode()}
    status, lines, opened = post(url, body, *headers)
    assert status == 200
    value = f"{opened['session_id']}; Expires={opened['expires']}"
    assert {f"{SESSION_HEADER}: {value}", f"{NEW_HEADER}: {value}"} <= set(lines), "in the spelling that AWS documents"
    assert opened["session_id"].startswith("ts-seq-"), "TorchServe saw no id: it made this one, and routes by it"
    ChatSession(http, opened["session_id"], "").close()


@pytest.mark.parametrize("bad", ["a;b", "a b", "a,b", "a_b", "-a", "a-", "a" * 257, "../x", "NEW_SESSION; x"])
def test_an_id_that_cannot_be_one_is_refused(url: str, chat: ChatSession, bad: str) -> None:
    status, _, answer = post(url, {"type": "close_session"}, f"{SESSION_HEADER}: {bad}")
    assert (status, answer["error"]["code"]) == (400, "invalid_request")
    status, _, answer = post(
        url, {"type": "close_session"}, f"{SESSION_HEADER}: {chat.session_id}", f"{SESSION_HEADER}: {bad}"
    )
    assert (status, answer["error"]["code"]) == (400, "invalid_request")


def test_the_longest_id_reaches_the_handler(url: str) -> None:
    status, _, answer = post(url, {"type": "close_session"}, f"{SESSION_HEADER}: {'a' * 226}")
    assert (status, answer["error"]["code"]) == (404, "session_not_found")


def test_a_clients_close_header_closes_nothing(http: httpx.Client, chat: ChatSession) -> None:
    body = {"type": "send_text_prompt", "prompt_text": QUESTION}
    for _ in range(2):
        assert http.post("/invocations", json=body, headers={**chat.headers, CLOSED_HEADER: chat.session_id}).is_success


def test_inference_alone_passes(http: httpx.Client, chat: ChatSession) -> None:
    assert http.get("/ping").status_code == 200
    for path in (
        "/",
        "/models",
        "/models/llava",
        "/metrics",
        "/api-description",
        "/v2/models",
        "/predictions/a/../../models",
        "/v1/completions",
        "/v1/models/a/b",
        "/predictions/llava/v1/models",
    ):
        for reply in (http.get(path), http.post(path, json={})):
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found"), path
    for path in ("/invocations", "/v1/chat/completions", "/predictions/llava/1.0/v1/chat/completions"):
        reply = http.get(path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (405, "method_not_allowed")
        assert reply.headers["Allow"] == "POST"
    for path in ("/v1/models", "/v1/models/llava", "/predictions/llava/1.0/v1/models"):
        reply = http.post(path, json={})
        assert (reply.status_code, reply.json()["error"]["code"]) == (405, "method_not_allowed")
        assert reply.headers["Allow"] == "GET, HEAD"
    for path in ("/predictions/llava", "/predictions/llava/1.0", "/invocations?model_name=llava"):
        asked = {"type": "send_text_prompt", "prompt_text": QUESTION}
        assert http.post(path, json=asked, headers=chat.headers).is_success, path


def test_a_body_over_the_limit_is_refused_in_words(url: str, http: httpx.Client) -> None:
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: {LIMIT + 1}\r\n\r\n"
    status, _, body = raw(url, head.encode())
    assert (status, json.loads(body)["error"]["code"]) == (413, "too_large")
    # Within the limit it is the handler who judges.
    status, _, answer = post(url, {"type": "start_session", "image": "A" * (LIMIT - 1000)})
    assert (status, answer["error"]["code"]) == (413, "too_large")
    assert "picture" in answer["error"]["message"]


@pytest.mark.parametrize("more_mib", [0, 8])
def test_a_body_of_no_known_length_is_refused_in_words(url: str, more_mib: int) -> None:
    """The client sends all of the body before it reads."""
    head = "POST /invocations HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    body = chunk * ((LIMIT >> 20) + more_mib) + b"20000\r\n" + b" " * (1 << 17) + b"\r\n0\r\n\r\n"
    status, _, answer = raw(url, head.encode() + body)
    assert (status, json.loads(answer)["error"]["code"]) == (413, "too_large")


def test_json_is_read_whatever_its_content_type_says(http: httpx.Client, chat: ChatSession) -> None:
    """As `curl -d` sends it. TorchServe's decoder of forms fails at a per cent sign behind an equals sign."""
    image = base64.b64encode(to_png(SCENE.draw())).decode()
    for content_type in (FORM, "multipart/mixed-up", "text/plain", "", "application/json; charset=latin-1"):
        headers = {**chat.headers, "Content-Type": content_type}
        body = json.dumps({"type": "send_text_prompt", "prompt_text": "Is a=50% of it red?", "max_new_tokens": 3})
        reply = http.post("/invocations?model=50%", content=body, headers=headers)
        if content_type.startswith("multipart"):
            assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media")
        else:
            assert reply.status_code == 200, content_type
        opened = http.post(
            "/invocations", content=f'{{"type":"start_session","image":"{image}"}}', headers={"Content-Type": FORM}
        )
        ChatSession(http, opened.json()["session_id"], "").close()
    for wrong in (b"a=50%", b"a=&" * (2 << 20)):  # six megabytes cost what they cost as JSON
        reply = http.post("/invocations", content=wrong, headers={"Content-Type": FORM})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_request")
        assert FORM in reply.json()["error"]["message"]
    packed = http.post("/invocations", content=gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"})
    assert (packed.status_code, packed.json()["error"]["code"]) == (415, "unsupported_media")


def test_common_habits_of_clients(url: str, http: httpx.Client, chat: ChatSession) -> None:
    """An offer of HTTP/2, an expected 100, an unknown expectation, chunks, HTTP/1.0, HEAD, a whole announced value."""
    body = json.dumps({"type": "send_text_prompt", "prompt_text": QUESTION}).encode()
    session = f"{SESSION_HEADER}: {chat.session_id}; Expires={chat.expires}"
    answers = set()
    for version, *headers in (
        ("1.1", "Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAA"),
        ("1.1", "Connection: close", "Expect: magic"),
        ("1.0",),
    ):
        head = [
            f"POST /invocations HTTP/{version}",
            "Host: x",
            session,
            f"Content-Length: {len(body)}",
            *headers,
            "",
            "",
        ]
        status, _, answer = raw(url, "\r\n".join(head).encode() + body)
        assert status == 200, headers
        answers.add(json.loads(answer)["response_text"])
    with http.stream("POST", "/invocations", content=iter([body[:9], body[9:]]), headers=chat.headers) as reply:
        answers.add(json.loads(reply.read())["response_text"])
    assert len(answers) == 1
    assert b" 100 Continue" in expecting(url, session, body).partition(b"\r\n")[0]
    for path, status in (("/ping", 200), ("/invocations", 405), ("/other", 404)):
        reply = http.head(path)
        assert (reply.status_code, reply.content) == (status, b"")
    assert http.options("/invocations").status_code == 405


def expecting(url: str, session: str, body: bytes) -> bytes:
    """The answer to a client that waits for a 100 (Continue) before it sends the body."""
    host, port = url.removeprefix("http://").split(":")
    head = ["POST /invocations HTTP/1.1", "Host: x", session, f"Content-Length: {len(body)}", "Connection: close"]
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall("\r\n".join([*head, "Expect: 100-continue", "", ""]).encode())
        first = connection.recv(65536)
        connection.sendall(body)
        return first + b"".join(iter(lambda: connection.recv(65536), b""))


def test_only_pages_of_allowed_origins_may_call(http: httpx.Client) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": f"content-type,{SESSION_HEADER}"}
    for origin, path in zip(ORIGINS.split(), ("/invocations", "/v1/chat/completions"), strict=True):
        preflight = http.options(path, headers={"Origin": origin, **asks})
        assert preflight.status_code == 204
        assert preflight.headers["Access-Control-Allow-Methods"] == "POST"
        assert preflight.headers["Access-Control-Allow-Origin"] == origin
        assert SESSION_HEADER in preflight.headers["Access-Control-Allow-Headers"]
        refused = http.post("/invocations", json={}, headers={"Origin": origin})
        assert refused.headers["Access-Control-Allow-Origin"] == origin
        assert SESSION_HEADER in refused.headers["Access-Control-Expose-Headers"]
    asks_to_get = {"Origin": ORIGINS.split()[0], "Access-Control-Request-Method": "GET"}
    preflight = http.options("/v1/models", headers=asks_to_get)
    assert (preflight.status_code, preflight.headers["Access-Control-Allow-Methods"]) == (204, "GET, HEAD")
    for origin in ("https://b.example", "null", "*", ""):
        preflight = http.options("/invocations", headers={"Origin": origin, **asks})
        assert preflight.status_code == 405
        assert not [name for name in preflight.headers if name.startswith("access-control")]


def test_an_answered_request_logs_no_error(http: httpx.Client, server: TorchServe) -> None:
    """HAProxy closes a connection to TorchServe with a reset, which TorchServe logs as an ERROR: 22 without the fix.

    Requests of other tests that were refused or left may log a few at any time.
    """
    chat = ChatSession.open(http, SCENE.draw())
    before = server_errors(server)
    for _ in range(10):
        chat.ask(QUESTION, max_new_tokens=2)
        list(chat.stream(QUESTION, max_new_tokens=2))
    chat.close()
    wait_for_metrics(server.metrics_url, llava_open_sessions=0)
    assert server_errors(server) < before + 11


def test_torchserves_own_errors_have_the_form_of_all_others(http: httpx.Client) -> None:
    for path in ("/predictions/other", "/predictions/other/1.0/v1/chat/completions"):
        reply = http.post(path, json={})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


def test_an_error_of_haproxy_is_read_by_the_openai_package(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/predictions/other/1.0/v1", api_key="any", max_retries=0) as gpt:
        with pytest.raises(openai.NotFoundError) as caught:
            gpt.chat.completions.create(model="llava", messages=[])
        with pytest.raises(openai.NotFoundError):
            gpt.models.list()
    assert (caught.value.code, caught.value.type, caught.value.param) == ("not_found", "invalid_request_error", None)
    rules = (ROOT / "deploy" / "serve" / "sessions.cfg").read_text()
    errors = re.findall(r"""status (\d+) content-type application/json string '(\{"error".*?\})'""", rules)
    assert len(errors) > 15
    for status, body in errors:
        kinds = {"429": "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= "500" else "invalid_request_error")
        assert json.loads(body)["error"].items() >= {"type": kind, "param": None}.items(), body


def test_the_openai_package_gets_the_same_answer_on_each_route(url: str, server: TorchServe, chat: ChatSession) -> None:
    data = base64.b64encode(to_png(SCENE.draw())).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}]
    answer = chat.ask(QUESTION)["response_text"]
    for base in (f"{url}/v1", f"{url}/predictions/llava/1.0/v1", server.openai_url):
        with openai.OpenAI(base_url=base, api_key="any", max_retries=0) as gpt:
            model = gpt.models.list().data[0].id
            assert gpt.models.retrieve(model).id == model
            whole = gpt.chat.completions.create(model=model, messages=messages)
            assert whole.choices[0].message.content == answer
            chunks = list(gpt.chat.completions.create(model=model, messages=messages, stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer


def test_the_clients_of_the_comparison_get_the_same_answers(url: str) -> None:
    questions = [QUESTION, "And on the right?"]
    job = Job("", 6, [Chat(to_png(make_scene(seed).draw()), questions) for seed in HELD_OUT_SEEDS[:2]])
    native = run_chats(job, lambda chat: NativeChat(url, chat))
    other = run_chats(job, lambda chat: OpenAIChat(url, chat, "llava"))
    answers = [[[turn.answer for turn in chat] for chat in outcome.chats] for outcome in (native, other)]
    assert answers[0] == answers[1]
    turns = [turn for outcome in (native, other) for chat in outcome.chats for turn in chat]
    assert all(turn.tokens == job.tokens and 0 < turn.ttft_ms <= turn.total_ms for turn in turns)


def server_errors(server: TorchServe) -> int:
    log = server.log_path.with_name("ts_log.log")
    return log.read_text().count("[ERROR]")


def test_what_is_not_http_is_refused(url: str, chat: ChatSession) -> None:
    assert raw(url, b"GARBAGE\r\n\r\n")[0] == 400
    assert raw(url, b"POST /invocations HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n")[0] == 400
    for header in (f"X-Long: {'a' * 9_000}", f"X-Long: {'a' * 50_000}"):
        status, _, answer = post(url, {}, header)
        assert (status, answer["error"]["code"]) == (400, "invalid_request")
    many = [f"X-{number}: 1" for number in range(300)]
    assert post(url, {"type": "close_session"}, f"{SESSION_HEADER}: unknown", *many)[0] == 404
    assert chat.ask(QUESTION)["finish_reason"] == "stop"


def test_a_streamed_answer_is_the_one_that_is_given_whole(chat: ChatSession) -> None:
    lines = list(chat.stream(QUESTION, temperature=0))
    assert lines[-1]["finish_reason"] == "stop"
    assert "".join(line["delta"] for line in lines) == chat.ask(QUESTION)["response_text"]


def test_a_client_that_leaves_in_mid_stream_is_missed(url: str, server: TorchServe, chat: ChatSession) -> None:
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as own:
        lines = ChatSession(own, chat.session_id, chat.expires).stream("Say something long", **LONG)
        for _ in range(3):
            next(lines)
    figures = wait_for_metrics(server.metrics_url, timeout_s=20, llava_running_turns=0)
    assert figures["llava_running_turns"] == 0


def test_the_bench_of_the_way_runs(url: str, server: TorchServe, tmp_path: Path) -> None:
    options = route.parse(["--smoke", "--out", str(tmp_path)])
    run = harness.Run(options)
    taken = route.measure(options, run, (server.url, url))
    run.finish(route.report(taken, conversations.measure(run, url)), route.paint)
    document = json.loads((tmp_path / "route.json").read_text())
    ways = [row for row in document["rows"] if row["request"] in route.KINDS]
    assert len(ways) == 6
    assert all(row["requests"] == 2 for row in ways)
    assert all(row["requests"] > 0 for row in document["rows"])
    assert len(document["rows"]) > len(ways)
    assert (tmp_path / "route.png").is_file()
