"""The Python client against the local endpoint: boto3's calls, two instances, and every way to lose a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.serve.torchserve import TorchServe
from llava_sessions_client import AsyncEndpoint, ContextLengthExceeded, InvalidRequest, SessionLost
from llava_sessions_client import Endpoint as Target
from models.shapes.scenes import make_scene
from tests.support.local_endpoint import NAME, Endpoint
from tests.support.python_chats import OPTIONS, QUESTIONS, chat_async, chat_sync
from tests.support.server_metrics import wait_for_metrics

from .conftest import ALL_CORNERS, close_session, runtime, seed_of, under_one_corner

FIRST, SECOND = (make_scene(seed_of(index)).draw() for index in (90, 91))


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what boto3 needs to sign a call."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")


@pytest.fixture
def nothing_is_left(instances: list[TorchServe]) -> Iterator[None]:
    """Check that the test leaves no session open."""
    yield
    for instance in instances:
        metrics = wait_for_metrics(instance.metrics_url, llava_open_sessions=0)
        assert metrics["llava_open_sessions"] == 0


def test_a_conversation_is_the_same_as_over_http(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, nothing_is_left: None
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", endpoint.url)
    client = runtime(endpoint)

    def lose(session_id: str) -> None:
        close_session(client, session_id)

    seen = chat_sync(Target(NAME), FIRST, SECOND, lose)
    assert [answer.replayed for answer in seen.answers] == [False] * 6 + [True]
    assert ["".join(pieces) for pieces in seen.pieces] == [seen.answers[1].text, seen.answers[4].text]
    assert all(answer.timings.total_ms > 0 for answer in seen.answers)
    if endpoint.corners == ALL_CORNERS[0]:  # the corners differ for the platform only
        assert chat_async(AsyncEndpoint(NAME, endpoint_url=endpoint.url), FIRST, SECOND, lose).facts == seen.facts


@under_one_corner
def test_errors_of_the_container_have_their_class(endpoint: Endpoint, nothing_is_left: None) -> None:
    with Target(NAME, endpoint_url=endpoint.url).open(FIRST) as chat:
        with pytest.raises(InvalidRequest, match=r"400 invalid_request: `temperature`"):
            chat.ask(QUESTIONS[0], temperature=-1.0)
        with pytest.raises(ContextLengthExceeded) as raised:
            chat.ask("word " * 4_000)
        assert raised.value.status == 422
        assert chat.ask(QUESTIONS[0], **OPTIONS).text
        close_session(runtime(endpoint), chat.session_id)
        for ask in (chat.ask, lambda text: list(chat.stream(text))):
            with pytest.raises(SessionLost):
                ask(QUESTIONS[0])
    with pytest.raises(InvalidRequest, match="ValidationError"):
        Target("other", endpoint_url=endpoint.url).open(FIRST)
