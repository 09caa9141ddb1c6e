"""The `openai` package, unmodified, on the endpoint: it keeps no session, and gets the answers of one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import openai
import pytest
from botocore.client import BaseClient

from deploy.serve.torchserve import TorchServe

from .conftest import Endpoint, ask, close_session, open_session, picture, runtime, under_one_corner

QUESTIONS = ["Which shapes are there?", "How many shapes are there?", "Is there a circle?"]


@pytest.fixture(scope="module")
def gpt(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with connect(endpoint) as client:
        yield client


def connect(endpoint: Endpoint, path: str = "/v1") -> openai.OpenAI:
    """The package's client, as anyone makes it."""
    return openai.OpenAI(base_url=endpoint.url + path, api_key="any", max_retries=0)


def user(text: str, index: int | None = None) -> dict:
    """A user's message, with a picture where there is one."""
    if index is None:
        return {"role": "user", "content": text}
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture(index)}"}}
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


def complete(gpt: openai.OpenAI, messages: list[dict], **options: object) -> openai.types.chat.ChatCompletion:
    return gpt.chat.completions.create(model="llava", messages=messages, **options)


def told(client: BaseClient, index: int) -> list[str]:
    """What a session says to the questions."""
    session = open_session(client, index)
    answers = [ask(client, session, question)["response_text"] for question in QUESTIONS]
    close_session(client, session)
    return answers


def test_a_conversation_is_a_session(gpt: openai.OpenAI, client: BaseClient) -> None:
    messages, answers, usages = [], [], []
    for number, question in enumerate(QUESTIONS):
        messages.append(user(question, None if number else 10))
        reply = complete(gpt, messages)
        assert reply.choices[0].finish_reason == "stop"
        answers.append(reply.choices[0].message.content)
        usages.append(reply.usage)
        messages.append({"role": "assistant", "content": answers[-1]})
    assert answers == told(client, 10)
    for before, after in itertools.pairwise(usages):
        # The last token of an answer is not computed before the next question comes.
        assert after.prompt_tokens_details.cached_tokens >= before.total_tokens - 1


def test_a_streamed_conversation_says_the_same(gpt: openai.OpenAI, client: BaseClient) -> None:
    messages, answers = [], []
    for number, question in enumerate(QUESTIONS):
        messages.append(user(question, None if number else 11))
        chunks = list(complete(gpt, messages, stream=True, stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage.completion_tokens > 0
        answers.append("".join(chunk.choices[0].delta.content for chunk in chunks[:-1]))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert answers == told(client, 11)


@under_one_corner
def test_a_question_that_is_asked_again_and_one_that_branches_off(gpt: openai.OpenAI) -> None:
    messages = [user(QUESTIONS[0], 12)]
    first = complete(gpt, messages).choices[0].message.content
    messages += [{"role": "assistant", "content": first}, user(QUESTIONS[1])]
    second = complete(gpt, messages).choices[0].message.content
    assert complete(gpt, messages).choices[0].message.content == second, "asked again"
    branch = [*messages[:2], user(QUESTIONS[2])]
    other = complete(gpt, branch).choices[0].message.content
    longer = [*messages, {"role": "assistant", "content": second}, user(QUESTIONS[2])]
    assert complete(gpt, longer).choices[0].message.content
    assert other != second


def test_a_conversation_whose_session_is_lost_goes_on(
    endpoint: Endpoint, client: BaseClient, gpt: openai.OpenAI
) -> None:
    messages = [user(QUESTIONS[0], 13)]
    first = complete(gpt, messages).choices[0].message.content
    calm = complete(gpt, [*messages, {"role": "assistant", "content": first}, user(QUESTIONS[1])])
    assert complete(gpt, messages).choices[0].message.content == first
    for session in endpoint.service.pins.session_ids:
        close_session(client, session)
    again = complete(gpt, [*messages, {"role": "assistant", "content": first}, user(QUESTIONS[1])])
    assert again.choices[0].message.content == calm.choices[0].message.content


@under_one_corner
def test_a_history_that_was_never_said_is_refused(gpt: openai.OpenAI) -> None:
    messages = [user(QUESTIONS[0], 14), {"role": "assistant", "content": "A mountain."}, user(QUESTIONS[1])]
    with pytest.raises(openai.BadRequestError) as caught:
        complete(gpt, messages)
    assert caught.value.code == "history_differs"


@under_one_corner
def test_options_reach_the_model(gpt: openai.OpenAI) -> None:
    short = complete(gpt, [user(QUESTIONS[0], 15)], max_tokens=3)
    assert short.usage.completion_tokens == 3
    assert short.choices[0].finish_reason == "length"
    warm = [
        complete(gpt, [user(QUESTIONS[0], 15)], temperature=2.0, top_p=0.9, seed=seed, stop=["."])
        .choices[0]
        .message.content
        for seed in (7, 7)
    ]
    assert warm[0] == warm[1]
    assert "." not in warm[0]


@under_one_corner
@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([user("What is there?")], {}, "must have a picture"),
        ([], {}, "alternate"),
        ([{"role": "system", "content": "Be brief."}, user("What?")], {}, "operator sets"),
        ([user("a"), user("b")], {}, "alternate"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], {}, "'image_url' parts"),
        ([user("a")], {"n": 2}, "'n' must be 1"),
        ([user("a")], {"logprobs": True}, "logprobs"),
    ],
)
def test_what_can_not_be_done_is_told(gpt: openai.OpenAI, messages: list, options: dict, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        complete(gpt, messages, **options)


@under_one_corner
def test_what_the_handler_refuses_keeps_its_status_and_code(gpt: openai.OpenAI) -> None:
    damaged = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    message = {"role": "user", "content": [damaged, {"type": "text", "text": "What?"}]}
    with pytest.raises(openai.APIStatusError) as caught:
        complete(gpt, [message])
    assert (caught.value.status_code, caught.value.code) == (415, "unsupported_media")
    with pytest.raises(openai.BadRequestError):
        complete(gpt, [user(QUESTIONS[0], 15)], max_tokens=10**9)


@under_one_corner
def test_it_is_served_under_the_endpoints_path_too(endpoint: Endpoint) -> None:
    with connect(endpoint, "/endpoints/llava/openai/v1") as client:
        assert complete(client, [user(QUESTIONS[0], 15)]).choices[0].message.content


def test_a_conversation_that_waits_makes_room_for_a_new_one(instances: list[TorchServe]) -> None:
    with Endpoint([instances[0]]) as endpoint, connect(endpoint) as gpt:
        assert complete(gpt, [user(QUESTIONS[0], 16)]).choices[0].message.content
        client = runtime(endpoint)
        taken: list[str] = []
        with pytest.raises(client.exceptions.ModelError, match="capacity"):
            fill(client, taken)
        assert complete(gpt, [user(QUESTIONS[0], 17)]).choices[0].message.content
        for session in taken:
            close_session(client, session)


def fill(client: BaseClient, taken: list[str]) -> None:
    """Open sessions until one is refused."""
    while True:
        taken.append(open_session(client, 16))
