"""The OpenAI-compatible path: requests reach the container's /v1/..., and its replies come back as they are."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import httpx
import openai
import pytest

from deploy.local_endpoint import scrape
from deploy.local_endpoint.contract import Corners, PlatformLimits
from deploy.local_endpoint.routing import Router
from deploy.serve.torchserve import TorchServe

from .conftest import NAME, Endpoint, invoke, runtime

BASES = [f"/endpoints/{NAME}/openai/v1", f"/endpoints/{NAME}/inference-components/part/openai/v1", "/v1"]
TOKEN = {"Authorization": "Bearer any"}
SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=any/20261126/us-west-2/sagemaker/aws4_request, Signature=0"}


@pytest.fixture(scope="module")
def front(stand_in: TorchServe) -> Iterator[Endpoint]:
    """An endpoint in front of the stand-in, which answers with what reached it."""
    with Endpoint([stand_in]) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def client(front: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=front.url, headers=TOKEN, timeout=60, trust_env=False) as client:
        yield client


@pytest.mark.parametrize("base", BASES)
def test_a_request_reaches_the_containers_path(client: httpx.Client, base: str) -> None:
    headers = {"X-Amzn-SageMaker-Session-Id": "some-session", "X-Mine": "1", "url_path": "v1/other"}
    for method, path in (("POST", "chat/completions"), ("GET", "models"), ("GET", "models/llava")):
        reply = client.request(method, f"{base}/{path}", headers=headers)
        told = {name.lower(): value for name, value in reply.json()["headers"].items()}
        assert told["url_path"] == f"v1/{path}"
        assert reply.headers["x-amzn-RequestId"]
        assert not {"authorization", "x-amzn-sagemaker-session-id", "x-mine"} & told.keys(), "no sessions on this path"
    assert client.get(f"{base}/chat/completions").status_code == 405
    assert client.post(f"{base}/models").status_code == 405


@pytest.mark.parametrize("headers", [{}, {"Authorization": "any"}, {"Authorization": "Basic any"}])
def test_a_request_without_a_token_is_refused(front: Endpoint, headers: dict) -> None:
    url = f"{front.url}{BASES[0]}/chat/completions"
    reply = httpx.post(url, json={}, headers=headers, trust_env=False)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "AccessDeniedException")
    assert httpx.post(url, json={}, headers=SIGNED, trust_env=False).status_code == 200


def test_an_error_of_the_container_is_passed_as_it_is(front: Endpoint) -> None:
    error = {"message": "too long", "type": "invalid_request_error", "param": "messages", "code": "context_exceeded"}
    order = {"status": 400, "say": json.dumps({"error": error}), "headers": {"Retry-After": "7", "X-Mine": "1"}}
    with openai.OpenAI(base_url=front.url + BASES[0], api_key="any", max_retries=0) as gpt:
        with pytest.raises(openai.BadRequestError) as caught:
            gpt.chat.completions.create(model="", messages=[], extra_body=order)
        assert (caught.value.code, caught.value.param) == ("context_exceeded", "messages")
        assert caught.value.response.headers["Retry-After"] == "7"
        assert "X-Mine" not in caught.value.response.headers
        with pytest.raises(openai.BadRequestError, match="Endpoint other of account"):
            gpt.with_options(base_url=f"{front.url}/endpoints/other/openai/v1").models.list()


def test_the_limits_are_those_of_invocations(stand_in: TorchServe) -> None:
    with Endpoint([stand_in], limits=PlatformLimits(body_bytes=1000, answer_s=0.2)) as endpoint:
        url = f"{endpoint.url}{BASES[0]}/chat/completions"
        large = httpx.post(url, content=b" " * 1001, headers=TOKEN, trust_env=False)
        late = httpx.post(url, json={"sleep_s": 1.0}, headers=TOKEN, trust_env=False)
    assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")
    assert (late.status_code, late.json()["error"]["type"]) == (424, "server_error")


@pytest.mark.parametrize("cut", [False, True])
def test_a_stream_comes_in_the_containers_parts(stand_in: TorchServe, cut: bool) -> None:
    order = {"parts": 3, "part_s": 0.05, "say": "end", "content_type": "text/event-stream"}
    with Endpoint([stand_in], cut_parts=cut) as endpoint:
        url = f"{endpoint.url}{BASES[0]}/chat/completions"
        with httpx.stream("POST", url, json=order, headers=TOKEN, trust_env=False) as reply:
            assert reply.headers["Content-Type"] == "text/event-stream"
            parts = list(reply.iter_raw())
    assert b"".join(parts) == b"part0;part1;part2;end"
    assert (b"part0;" in parts) == (not cut)


# --- instances -------------------------------------------------------------------------------------------------------


class Container(http.server.BaseHTTPRequestHandler):
    """A container that says which one it is, and whether it drains."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply(200, str(self.server.server_address[1]))

    def do_GET(self) -> None:
        draining = self.path == "/ping" and getattr(self.server, "draining", False)
        self._reply(404 if draining else 200, f"llava_open_sessions {self.server.server_address[1]}")

    def _reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        if status == 200 and self.headers["X-Amzn-SageMaker-Custom-Attributes"]:
            self.send_header("X-Amzn-SageMaker-Session-Id", self.headers["X-Amzn-SageMaker-Custom-Attributes"])
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def containers() -> Iterator[list[http.server.ThreadingHTTPServer]]:
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Container) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


def instance(server: http.server.ThreadingHTTPServer) -> SimpleNamespace:
    return SimpleNamespace(url=f"http://127.0.0.1:{server.server_address[1]}", log_path="log")


def served_by(http_client: httpx.Client, text: str, **options: object) -> str:
    body = {"messages": [{"role": "user", "content": text}], **options}
    reply = http_client.post(f"{BASES[0]}/chat/completions", json=body)
    assert reply.status_code == 200
    return reply.text


def connect(endpoint: Endpoint) -> httpx.Client:
    return httpx.Client(base_url=endpoint.url, headers=TOKEN, trust_env=False)


def test_by_default_a_conversation_has_no_instance_of_its_own(containers: list) -> None:
    with Endpoint([instance(server) for server in containers]) as endpoint, connect(endpoint) as gpt:
        assert len({served_by(gpt, "Which shapes are there?") for _ in range(2)}) == 2


def test_prefix_aware_sends_equal_text_to_one_instance(containers: list) -> None:
    servers = [instance(server) for server in containers]
    with Endpoint(servers, router=Router("PREFIX_AWARE")) as endpoint, connect(endpoint) as gpt:
        assert len({served_by(gpt, "Which shapes are there?") for _ in range(4)}) == 1
        assert len({served_by(gpt, f"Question {number}") for number in range(20)}) == 2
        tenants = [str(number) for number in range(20)]
        assert len({served_by(gpt, "Which?", prompt_cache_key=tenant) for tenant in tenants}) == 2
        client = runtime(endpoint)

        def invoked(tenant: str) -> int:
            return invoke(client, {}, PrefixAwareId=tenant)["Body"]

        assert len({invoked("one") for _ in range(4)}) == 1
        assert len({invoked(tenant) for tenant in tenants}) == 2


def test_a_draining_instance_gets_no_requests_and_a_replaced_one_does(containers: list) -> None:
    first, second = (str(server.server_address[1]) for server in containers)
    servers = [instance(server) for server in containers]
    with Endpoint(servers, Corners(lost_instance="reroute")) as endpoint, connect(endpoint) as gpt:
        client = runtime(endpoint)
        announced = "moves-1; Expires=2099-01-01T00:00:00Z"
        home = str(invoke(client, {}, "NEW_SESSION", CustomAttributes=announced)["Body"])
        assert str(invoke(client, {}, "moves-1")["Body"]) == home
        (drains,) = [server for server in containers if str(server.server_address[1]) == home]
        (other,) = {first, second} - {home}
        drains.draining = True
        wait_for(lambda: {served_by(gpt, "?") for _ in range(2)} == {other})
        assert str(invoke(client, {}, "moves-1")["Body"]) == other, "under the same ID"
        drains.draining = False
        wait_for(lambda: {served_by(gpt, "?") for _ in range(2)} == {first, second})
        lost = endpoint.service.pins.instances[0]
        lost.gone = True
        wait_for(lambda: endpoint.service.pins.instances[0] is not lost)
        assert {served_by(gpt, "?") for _ in range(2)} == {first, second}


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_scrape_prints_what_sagemaker_would_read(containers: list, capsys: pytest.CaptureFixture[str]) -> None:
    with Endpoint([instance(server) for server in containers]) as endpoint:
        assert scrape.main(["--port", endpoint.url.rpartition(":")[2]]) == 0
        containers[1].draining = True
        assert httpx.get(f"{endpoint.url}/instances/3/metrics", trust_env=False).status_code == 404
    printed = capsys.readouterr().out.splitlines()
    ports = [server.server_address[1] for server in containers]
    assert printed[1::2] == [f"llava_open_sessions {port}" for port in ports]
    assert printed[0] == f"# instance 1: http://127.0.0.1:{ports[0]}/metrics, status 200"
    assert scrape.main(["--port", endpoint.url.rpartition(":")[2]]) == 1
    assert "no endpoint on port" in capsys.readouterr().err
