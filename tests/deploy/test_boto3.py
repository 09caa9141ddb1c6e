"""Picture chats through boto3, under every way in which the platform may behave."""

from __future__ import annotations

import json
import re
import uuid

import httpx
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError

from deploy.serve.torchserve import TorchServe
from llava_sessions_client.lines import split_lines

from .conftest import NAME, Endpoint, ask, close_session, invoke, open_session, picture, runtime, under_one_corner

SHAPES, COUNT = "Which shapes are there?", "How many shapes are there?"
# botocore, sagemaker-runtime 2017-05-13: NewSessionResponseHeader
NEW_SESSION_ID = re.compile(
    r"^[a-zA-Z0-9](-*[a-zA-Z0-9])*;\sExpires=[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$"
)


def stream(client: BaseClient, session: str, text: str) -> list[dict]:
    """A streamed answer's lines. Parts are joined first: SageMaker may cut them anywhere."""
    body = {"type": "send_text_prompt", "prompt_text": text, "stream": True}
    reply = client.invoke_endpoint_with_response_stream(
        EndpointName=NAME, ContentType="application/json", Body=json.dumps(body), SessionId=session
    )
    wire = b"".join(event["PayloadPart"]["Bytes"] for event in reply["Body"])
    return [json.loads(line) for line in split_lines([wire])]


def refused(client: BaseClient, session: str, body: dict) -> dict:
    with pytest.raises(ClientError) as caught:
        invoke(client, body, session)
    return caught.value.response


@pytest.mark.parametrize("mode", ["legacy", "standard"])
def test_a_chat_from_open_to_close(endpoint: Endpoint, mode: str) -> None:
    client = runtime(endpoint, retries={"mode": mode})
    opened = invoke(client, {"type": "start_session", "image": picture(0)}, "NEW_SESSION")
    assert NEW_SESSION_ID.match(opened["NewSessionId"])
    session, _, expires = opened["NewSessionId"].partition("; Expires=")
    assert opened["Body"]["session_id"] == session
    assert opened["Body"]["expires"] == expires
    first = ask(client, session, SHAPES)
    assert first["session_id"] == session
    second = ask(client, session, COUNT)
    assert second["usage"]["cached_tokens"] > first["usage"]["prompt_tokens"], "the session was kept"
    closed = close_session(client, session)
    assert closed["ClosedSessionId"] == session
    assert closed["Body"]["success"] is True
    assert closed["ResponseMetadata"]["RetryAttempts"] == 0


@under_one_corner
def test_a_streamed_answer_says_what_a_whole_one_says(client: BaseClient) -> None:
    whole, streamed = open_session(client, 1), open_session(client, 1)
    for question in (SHAPES, COUNT):
        lines = stream(client, streamed, question)
        assert "".join(line["delta"] for line in lines) == ask(client, whole, question)["response_text"]
        assert lines[-1]["finish_reason"] == "stop"
    for session in (whole, streamed):
        close_session(client, session)


def test_closed_and_unknown_sessions_are_the_platforms_to_refuse(client: BaseClient) -> None:
    session = open_session(client, 2)
    close_session(client, session)
    for unknown in (session, "never-opened"):
        for body in ({"type": "send_text_prompt", "prompt_text": SHAPES}, {"type": "close_session"}):
            response = refused(client, unknown, body)
            assert response["Error"]["Code"] == "ValidationError"
            assert response["ResponseMetadata"]["HTTPStatusCode"] == 400
        with pytest.raises(client.exceptions.ValidationError):
            stream(client, unknown, SHAPES)


@under_one_corner
def test_what_the_handler_refuses_comes_as_a_model_error(client: BaseClient) -> None:
    session = open_session(client, 3)
    response = refused(client, session, {"type": "send_text_prompt", "prompt_text": " "})
    assert response["OriginalStatusCode"] == 400
    assert json.loads(response["OriginalMessage"])["error"]["code"] == "invalid_request"
    response = refused(client, "NEW_SESSION", {"type": "start_session"})
    assert response["OriginalStatusCode"] == 400
    close_session(client, session)


def test_a_session_that_the_container_has_forgotten(endpoint: Endpoint, client: BaseClient) -> None:
    session = open_session(client, 4)
    instance = endpoint.service.pins.find(session)
    behind = {"X-Amzn-SageMaker-Session-Id": session}
    httpx.post(
        f"{instance.url}/invocations", json={"type": "close_session"}, headers=behind, trust_env=False
    ).raise_for_status()
    response = refused(client, session, {"type": "send_text_prompt", "prompt_text": SHAPES})
    assert response["OriginalStatusCode"] == 404
    assert json.loads(response["OriginalMessage"])["error"]["code"] == "session_not_found"
    assert close_session(client, session)["ClosedSessionId"] == session


def test_new_sessions_go_where_the_fewest_are(instances: list[TorchServe]) -> None:
    with Endpoint(instances) as endpoint:
        client, pins = runtime(endpoint), endpoint.service.pins
        sessions = [open_session(client, index) for index in range(4)]
        assert pins.open_sessions() == {1: 2, 2: 2}
        for session in [session for session in sessions if pins.find(session).number == 2]:
            close_session(client, session)
            sessions.remove(session)
        sessions += [open_session(client, index) for index in range(2)]
        assert pins.open_sessions() == {1: 2, 2: 2}
        for session in sessions:
            close_session(client, session)


@under_one_corner
def test_a_call_that_is_sent_again_is_answered_once(client: BaseClient) -> None:
    """What a client's own retry does after a timeout; the InferenceId tells the container."""
    session, inference = open_session(client, 5), str(uuid.uuid4())
    body = {"type": "send_text_prompt", "prompt_text": SHAPES}
    first, again = (invoke(client, body, session, InferenceId=inference)["Body"] for _ in range(2))
    assert again == first
    later = ask(client, session, COUNT)
    turn = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    assert later["usage"]["cached_tokens"] <= turn
    close_session(client, session)


# --- payloads that others wrote ---


def test_the_aws_llava_sample(endpoint: Endpoint, client: BaseClient) -> None:
    """Requests and checks as in llava_stateful_deploy_infer.ipynb; the picture comes as a data URL."""

    def send_and_check_request(request: dict, seq_id: str) -> dict:
        response = client.invoke_endpoint(
            EndpointName=NAME, Body=json.dumps(request), ContentType="application/json", SessionId=seq_id
        )
        assert response["ResponseMetadata"]["HTTPStatusCode"] == 200
        return json.loads(response["Body"].readlines()[0])

    image_url = f"data:image/png;base64,{picture(6)}"
    opened = send_and_check_request({"type": "start_session", "path": image_url, "session_id": None}, "NEW_SESSION")
    session_id = opened["session_id"]
    if endpoint.corners.new_session != "literal":  # behind a literal one, TorchServe makes no id
        assert session_id.startswith("ts-seq-")
    for prompt in ("describe the picture", "is there a mountain in the picture, describe it"):
        request = {"type": "send_text_prompt", "session_id": session_id, "prompt_text": prompt}
        assert send_and_check_request(request, session_id)["response_text"]
    assert send_and_check_request({"type": "close_session", "session_id": session_id}, session_id)["success"]


def test_the_container_standards_payloads(client: BaseClient) -> None:
    opened = invoke(client, {"requestType": "NEW_SESSION", "image": picture(7)}, "NEW_SESSION")
    session = opened["NewSessionId"].split(";")[0]
    assert ask(client, session, SHAPES)["response_text"]
    closed = invoke(client, {"requestType": "CLOSE"}, session)
    assert closed["ClosedSessionId"] == session
