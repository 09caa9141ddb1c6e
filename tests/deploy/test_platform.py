"""What the platform does to requests and replies, seen from both ends: boto3 before it, a container behind it that
tells what it got and answers as it is told to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError, EventStreamError

from deploy.local_endpoint.contract import Corners, PlatformLimits
from deploy.serve.ports import free_ports
from deploy.serve.torchserve import TorchServe

from .conftest import ALL_CORNERS, NAME, Endpoint, invoke, runtime

SESSION = "X-Amzn-SageMaker-Session-Id"
NEW_SESSION = "X-Amzn-SageMaker-New-Session-Id"
CLOSED_SESSION = "X-Amzn-SageMaker-Closed-Session-Id"
EXPIRES = "2099-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def front(stand_in: TorchServe) -> Iterator[Endpoint]:
    """The platform with its usual corners and limits."""
    with Endpoint([stand_in]) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def platform(front: Endpoint) -> BaseClient:
    """boto3 on it."""
    return runtime(front)


def announce(session: str, header: str = SESSION, expires: str = EXPIRES) -> dict:
    """An order to the container: announce a session."""
    return {"headers": {header: f"{session}; Expires={expires}"}}


def open_session(client: BaseClient, session: str, expires: str = EXPIRES) -> dict:
    return invoke(client, announce(session, expires=expires), "NEW_SESSION")


def refused(client: BaseClient, body: dict, session: str | None = None, **members: str) -> dict:
    """The response of a call that fails; its exception's name is in Error.Code."""
    with pytest.raises(ClientError) as caught:
        invoke(client, body, session, **members)
    return caught.value.response


# --- headers ---


def test_the_container_sees_what_the_api_knows_and_nothing_else(front: Endpoint, platform: BaseClient) -> None:
    open_session(platform, "seen-1")
    members = {
        "Accept": "application/json",
        "CustomAttributes": "tenant=7",
        "TargetVariant": "AllTraffic",
        "InferenceId": "request-7",
    }
    told = invoke(platform, {}, "seen-1", **members)["Body"]["headers"]
    own = {name: value for name, value in told.items() if not name.startswith("ts_")}
    assert {name: value for name, value in own.items() if name.lower() not in ("host", "content-length", "body")} == {
        "Content-Type": "application/json",
        "X-Llava-Content-Type": "application/json",
        "Accept": "application/json",
        "X-Amzn-SageMaker-Custom-Attributes": "tenant=7",
        "X-Amzn-SageMaker-Target-Variant": "AllTraffic",
        "X-Amzn-SageMaker-Inference-Id": "request-7",
        "X-Amzn-SageMaker-Session-Id": "seen-1",
        "X-Amzn-SageMaker-Forwarded-Api": "InvokeEndpoint",
    }
    raw = httpx.post(
        f"{front.url}/endpoints/{NAME}/invocations", json={}, headers={"X-Mine": "1", "Cookie": "a=b"}, trust_env=False
    )
    assert not {"x-mine", "cookie", "user-agent"} & {name.lower() for name in raw.json()["headers"]}


def test_a_forgotten_content_type_reaches_the_container_as_json(front: Endpoint) -> None:
    url = f"{front.url}/endpoints/{NAME}/invocations"
    for content_type in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        reply = httpx.post(url, content=b'{"a": "=50%"}', headers={"Content-Type": content_type}, trust_env=False)
        told = {name.lower(): value for name, value in reply.json()["headers"].items()}
        assert (told["content-type"], told["x-llava-content-type"]) == ("application/json", content_type)


@pytest.mark.parametrize("path", [f"/endpoints/{NAME}/invocations", "/v1/chat/completions"])
def test_an_offer_of_http_2_is_ignored(front: Endpoint, path: str) -> None:
    """As each request of Java's HttpClient makes it."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAA"}
    with httpx.Client(base_url=front.url, trust_env=False) as http:
        token = {"Authorization": "Bearer any"}
        plain, offered = (http.post(path, json={"messages": []}, headers=token | headers) for headers in ({}, offer))
        assert plain.status_code == offered.status_code == 200
        assert "not JSON" not in offered.text
        assert "must be JSON" not in offered.text
        assert http.head("/ping").status_code == 200


def test_only_pages_of_allowed_origins_may_call(front: Endpoint, stand_in: TorchServe) -> None:
    origin = "https://a.example"
    asks = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    with Endpoint([stand_in], origins=[origin]) as allowing:
        for endpoint, allowed in ((allowing, origin), (front, None)):
            for path, method in (("/v1/chat/completions", "POST"), ("/v1/models", "GET")):
                asks |= {"Access-Control-Request-Method": method}
                reply = httpx.options(f"{endpoint.url}{path}", headers=asks, trust_env=False)
                assert reply.headers.get("Access-Control-Allow-Origin") == allowed
                assert reply.is_success == (allowed is not None)


def test_a_request_without_an_inference_id_gets_one(platform: BaseClient) -> None:
    ids = {invoke(platform, {})["Body"]["headers"]["X-Amzn-SageMaker-Inference-Id"] for _ in range(2)}
    assert len(ids) == 2


def test_the_client_sees_of_the_containers_headers_what_the_api_knows(front: Endpoint, platform: BaseClient) -> None:
    headers = {"X-Amzn-SageMaker-Custom-Attributes": "cost=1", "X-Mine": "1", "Set-Cookie": "a=b"}
    reply = invoke(platform, {"headers": headers, "say": '"done"', "content_type": "application/x-mine"})
    assert reply["CustomAttributes"] == "cost=1"
    assert reply["ContentType"] == "application/x-mine"
    assert reply["InvokedProductionVariant"] == "AllTraffic"
    assert reply["ResponseMetadata"]["RequestId"]
    assert not {"x-mine", "set-cookie", "x-request-id"} & set(reply["ResponseMetadata"]["HTTPHeaders"])


@pytest.mark.parametrize(
    ("corners", "seen"), [*zip(ALL_CORNERS, (None, "", "NEW_SESSION"), strict=True)], ids=("absent", "empty", "literal")
)
def test_new_session_reaches_the_container_as_the_switch_says(
    stand_in: TorchServe, corners: Corners, seen: str | None
) -> None:
    with Endpoint([stand_in], corners) as endpoint:
        assert invoke(runtime(endpoint), {}, "NEW_SESSION")["Body"]["headers"].get(SESSION) == seen


@pytest.mark.parametrize("first", [True, False], ids=["session", "new-session"])
def test_a_session_is_announced_in_the_header_that_the_switch_names(stand_in: TorchServe, first: bool) -> None:
    with Endpoint([stand_in], Corners(create_header="session" if first else "new-session")) as endpoint:
        client = runtime(endpoint)
        reply = invoke(client, announce("told-1", SESSION if first else NEW_SESSION), "NEW_SESSION")
        assert reply["NewSessionId"] == f"told-1; Expires={EXPIRES}"
        assert invoke(client, {}, "told-1")["Body"]["headers"][SESSION] == "told-1"
        other = invoke(client, announce("told-2", NEW_SESSION if first else SESSION), "NEW_SESSION")
        assert "NewSessionId" not in other
        assert refused(client, {}, "told-2")["Error"]["Code"] == "ValidationError"


# --- sessions ---


def test_a_session_ends_when_the_container_says_so(platform: BaseClient) -> None:
    open_session(platform, "ends-1")
    closed = invoke(platform, {"headers": {CLOSED_SESSION: "ends-1"}}, "ends-1")
    assert closed["ClosedSessionId"] == "ends-1"
    response = refused(platform, {}, "ends-1")
    assert response["Error"]["Code"] == "ValidationError"
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 400


def test_a_session_ends_at_its_expiry(stand_in: TorchServe) -> None:
    now = [1_700_000_000.0]  # 2023-11-14T22:13:20Z
    with Endpoint([stand_in], clock=lambda: now[0]) as endpoint:
        client = runtime(endpoint)
        open_session(client, "late-1", "2023-11-14T22:13:21Z")
        assert invoke(client, {}, "late-1")
        now[0] += 1
        assert refused(client, {}, "late-1")["Error"]["Code"] == "ValidationError"


def test_a_failed_open_leaves_nothing(platform: BaseClient) -> None:
    assert refused(platform, {**announce("failed-1"), "status": 429}, "NEW_SESSION")["OriginalStatusCode"] == 429
    assert refused(platform, {}, "failed-1")["Error"]["Code"] == "ValidationError"


@pytest.mark.parametrize("value", ["bare-id", "a b; Expires=2099-01-01T00:00:00Z", "id;Expires=2099-01-01T00:00:00Z"])
def test_what_the_api_does_not_take_for_a_session_is_none(platform: BaseClient, value: str) -> None:
    reply = invoke(platform, {"headers": {SESSION: value}}, "NEW_SESSION")
    assert "NewSessionId" not in reply


@pytest.mark.parametrize("session", ["has_underscore", "a b", "", "trailing-", "x" * 257])
def test_an_id_that_the_api_does_not_allow_is_refused(platform: BaseClient, session: str) -> None:
    response = refused(platform, {}, session)
    assert response["Error"]["Code"] == "ValidationError"
    assert "sessionId" in response["Error"]["Message"]


@pytest.mark.parametrize("member", [{"InferenceId": "x" * 65}, {"CustomAttributes": "x" * 1025}])
def test_a_header_that_is_too_long_is_refused(platform: BaseClient, member: dict) -> None:
    assert refused(platform, {}, **member)["Error"]["Code"] == "ValidationError"


def test_another_endpoints_name_is_refused(platform: BaseClient) -> None:
    with pytest.raises(ClientError, match="Endpoint other of account 000000000000 not found"):
        platform.invoke_endpoint(EndpointName="other", Body=b"{}")


def test_a_name_that_was_pointed_here_is_refused(front: Endpoint) -> None:
    reply = httpx.post(
        f"{front.url}/endpoints/{NAME}/invocations", json={}, headers={"Host": "evil.example"}, trust_env=False
    )
    assert reply.status_code == 400


def test_an_instance_that_answers_no_pings_gets_no_calls(stand_in: TorchServe) -> None:
    nobody = SimpleNamespace(url=f"http://127.0.0.1:{free_ports(1)[0]}", log_path="none")
    with Endpoint([stand_in, nobody]) as endpoint:
        second = endpoint.service.pins.instances[1]
        until = time.monotonic() + 20
        while not second.gone and time.monotonic() < until:
            time.sleep(0.02)
        assert second.gone
        client = runtime(endpoint)
        for number in range(4):
            open_session(client, f"pinged-{number}")
        assert endpoint.service.pins.open_sessions() == {1: 4, 2: 0}


# --- errors and limits ---


@pytest.mark.parametrize(
    ("status", "words"), [(404, "Received client error (404) from primary"), (503, "Received server error (503)")]
)
def test_a_containers_error_is_a_model_error(platform: BaseClient, status: int, words: str) -> None:
    said = json.dumps({"error": {"code": "x", "message": "told"}})
    with pytest.raises(platform.exceptions.ModelError) as caught:
        invoke(platform, {"status": status, "say": said})
    response = caught.value.response
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert response["ResponseMetadata"]["HTTPHeaders"]["x-amzn-errortype"] == "ModelError"
    assert response["OriginalStatusCode"] == status
    assert response["OriginalMessage"] == said
    assert response["LogStreamArn"].startswith("arn:aws:logs:")
    assert response["Message"].startswith(words)
    assert said in response["Message"]


def test_a_long_error_is_cut_where_the_api_cuts_it(platform: BaseClient) -> None:
    response = refused(platform, {"status": 500, "say": "é" * 5_000})
    assert len(response["OriginalMessage"]) <= 2_048
    assert len(response["Message"]) <= 2_048


def test_a_body_over_the_limit_is_refused_and_one_at_it_is_not(front: Endpoint) -> None:
    client = runtime(front)
    full = client.invoke_endpoint(EndpointName=NAME, Body=bytes(6_291_456))
    assert json.loads(full["Body"].read())["bytes"] == 6_291_456
    with pytest.raises(ClientError, match=r"\(413\).*exceeded 6291456 bytes"):
        client.invoke_endpoint(EndpointName=NAME, Body=bytes(6_291_457))


def test_the_larger_limit_of_the_newer_guide_can_be_configured(stand_in: TorchServe) -> None:
    with Endpoint([stand_in], limits=PlatformLimits(body_bytes=25_000_000)) as endpoint:
        reply = runtime(endpoint).invoke_endpoint(EndpointName=NAME, Body=bytes(25_000_000))
        assert json.loads(reply["Body"].read())["bytes"] == 25_000_000


def test_an_answer_that_takes_too_long_is_a_model_error_without_a_status(stand_in: TorchServe) -> None:
    with Endpoint([stand_in], limits=PlatformLimits(answer_s=0.2)) as endpoint:
        response = refused(runtime(endpoint), {"sleep_s": 1.0})
    assert response["Error"]["Code"] == "ModelError"
    assert response["OriginalStatusCode"] == 0
    assert "timed out while waiting for a response from container primary" in response["Message"]


@pytest.mark.parametrize("mode", ["legacy", "standard"])
def test_boto3_repeats_a_503_and_neither_a_400_nor_a_424(stand_in: TorchServe, mode: str) -> None:
    """What a client that takes the defaults does: two attempts here, so that the wait between them is short."""
    with Endpoint([stand_in], Corners(lost_instance="503")) as endpoint:
        client = runtime(endpoint, retries={"mode": mode, "total_max_attempts": 2})
        assert refused(client, {"status": 500})["ResponseMetadata"]["RetryAttempts"] == 0
        assert refused(client, {}, "never-opened")["ResponseMetadata"]["RetryAttempts"] == 0
        endpoint.service.pins.instances.clear()
        response = refused(client, {})
        assert response["Error"]["Code"] == "ServiceUnavailable"
        assert response["ResponseMetadata"]["RetryAttempts"] == 1


# --- streams ---


def stream(client: BaseClient, body: dict, **members: str) -> dict:
    return client.invoke_endpoint_with_response_stream(
        EndpointName=NAME, ContentType="application/json", Body=json.dumps(body), **members
    )


def test_a_streamed_answer_comes_in_parts(platform: BaseClient) -> None:
    open_session(platform, "streams-1")
    reply = stream(platform, {"parts": 3, "part_s": 0.05}, SessionId="streams-1", Accept="text/plain")
    assert reply["InvokedProductionVariant"] == "AllTraffic"
    parts = [event["PayloadPart"]["Bytes"] for event in reply["Body"]]
    assert len(parts) >= 3
    text = b"".join(parts).decode()
    assert text.startswith("part0;part1;part2;")
    told = json.loads(text.removeprefix("part0;part1;part2;"))["headers"]
    assert told["X-Amzn-SageMaker-Forwarded-Api"] == "InvokeEndpointWithResponseStream"
    assert told["Accept"] == "text/plain"
    assert told[SESSION] == "streams-1"


def test_a_streams_content_type_is_the_containers(platform: BaseClient) -> None:
    reply = stream(platform, {"say": "hello", "content_type": "text/x-mine"})
    assert reply["ContentType"] == "text/x-mine"
    assert [event["PayloadPart"]["Bytes"] for event in reply["Body"]] == [b"hello"]


def test_a_stream_opens_no_session(platform: BaseClient) -> None:
    with pytest.raises(ClientError) as caught:
        stream(platform, announce("streamed-1"), SessionId="NEW_SESSION")
    assert caught.value.response["Error"]["Code"] == "ValidationError"


def test_an_error_before_a_streams_first_part_is_a_model_error(platform: BaseClient) -> None:
    with pytest.raises(platform.exceptions.ModelError) as caught:
        stream(platform, {"status": 409, "say": "busy"})
    assert caught.value.response["OriginalStatusCode"] == 409


def test_a_stream_that_takes_too_long_ends_in_an_error(stand_in: TorchServe) -> None:
    with Endpoint([stand_in], limits=PlatformLimits(stream_s=0.5)) as endpoint:
        began = time.monotonic()
        events = stream(runtime(endpoint), {"parts": 8, "part_s": 0.2})["Body"]
        with pytest.raises(EventStreamError, match=r"ModelStreamError.*within the time allowed"):
            list(events)
        assert time.monotonic() - began < 10


def test_a_stream_that_breaks_ends_in_an_error(platform: BaseClient) -> None:
    """The last of the file: the stand-in has lost its worker then, and needs a moment for another one."""
    seen, events = [], stream(platform, {"parts": 2, "part_s": 0.1, "dies": True})["Body"]
    with pytest.raises(EventStreamError, match="ModelStreamError"):
        seen.extend(event["PayloadPart"]["Bytes"] for event in events)
    assert seen == [b"part0;"]
