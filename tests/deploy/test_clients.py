"""Unmodified clients of the OpenAI route at `make serve`: every answer equals `generate` on the conversation sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import Outcome, cached, check, check_all, run_program
from tests.support.serving import Served


@pytest.fixture(scope="module")
def url(shapes_store: Path) -> Iterator[str]:
    """Run what `make serve` runs; return the URL that a user gives to a client."""
    with Served(shapes_store) as served:
        yield f"{served.url}/v1"


@pytest.fixture(scope="module")
def gpt(url: str) -> Outcome:
    """Run all scenarios of the package openai."""
    return run_program("openai_package", "openai-3", url=url)


def test_five_turns_use_the_cache_more_and_more(gpt: Outcome) -> None:
    turns = check_all(gpt, "five_turns")
    assert len(turns) == 5
    for turn, count in zip(turns, cached(turns), strict=True):
        assert turn["finish_reason"] == "stop"
        assert count < turn["usage"]["prompt_tokens"]
    for before, count in zip(turns, itertools.islice(cached(turns), 1, None), strict=False):
        assert count >= before["usage"]["prompt_tokens"]
    whole, streamed = turns[::2], turns[1::2]
    for turn in whole:
        assert (turn["object"], turn["model"]) == ("chat.completion", "llava")
        assert turn["fingerprint"]
    for turn in streamed:
        assert turn["role"] == "assistant"
        assert turn["choices_of_usage"] == 0
        assert set(turn["reasons"]) == {None}


def test_edited_and_regenerated_answers(gpt: Outcome) -> None:
    turns = check_all(gpt, "edited_and_regenerated")
    assert turns[2]["answer"] == turns[3]["answer"]
    counts = list(cached(turns))
    assert counts[3] >= turns[1]["usage"]["prompt_tokens"], "regenerated"
    assert counts[4] >= turns[0]["usage"]["prompt_tokens"], "edited"


def test_a_stream_is_stopped_and_half_its_answer_kept(gpt: Outcome) -> None:
    turns = check_all(gpt, "stopped")
    for count in itertools.islice(cached(turns), 1, None):
        assert count >= turns[0]["usage"]["prompt_tokens"]


def test_odd_conversations(gpt: Outcome) -> None:
    assert len(check_all(gpt, "odd_conversations", 40)) == 9


def test_a_title_request_leaves_the_chat_in_the_cache(gpt: Outcome) -> None:
    first, title, second = gpt.of("a_title_next_to_a_chat")
    check(first)
    check(title, 8)
    check(second)
    assert next(iter(cached([second]))) >= first["usage"]["prompt_tokens"]


def test_options_take_effect_or_are_ignored(gpt: Outcome) -> None:
    short, *others = gpt.of("options")
    assert check(short, 3).token_ids
    assert (short["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 3)
    for turn in others:
        check(turn)
    first, second = gpt.of("sampled")
    assert first["answer"] == second["answer"]
    assert "." not in first["answer"]


def test_two_conversations_at_once_by_the_async_client(gpt: Outcome) -> None:
    assert len(check_all(gpt, "asynchronous")) == 6


def test_the_list_of_models(gpt: Outcome) -> None:
    assert [model["id"] for model in gpt.of("models")] == ["llava"]


def test_refusals_are_the_packages_exceptions(gpt: Outcome) -> None:
    long, context, several, tools, logprobs, form, last, empty, *pictures = gpt.of("errors")
    assert (long["status_code"], long["code"], long["param"]) == (413, "too_large", "messages")
    assert (context["status_code"], context["code"]) == (400, "context_length_exceeded")
    for error, param in ((several, "n"), (tools, "tools"), (logprobs, "logprobs"), (form, "response_format")):
        assert "BadRequestError" in error["names"]
        assert (error["status_code"], error["code"], error["param"]) == (400, "invalid_request", param)
        assert f"`{param}`" in error["text"]
    for error in (last, empty):
        assert (error["status_code"], error["param"]) == (400, "messages")
    for error in pictures:
        assert "APIStatusError" in error["names"], error
        assert error["code"], error


@pytest.fixture(scope="module")
def litellm(url: str) -> Outcome:
    """Run LiteLLM as `openai/...`."""
    return run_program("litellm_package", "openai-3", url=url)


def test_litellm(litellm: Outcome) -> None:
    turns = check_all(litellm, "four_turns", 40)
    assert [turn["finish_reason"] for turn in turns] == ["stop"] * 4
    for error in litellm.of("errors"):
        assert "BadRequestError" in error["names"], error


def test_langchain_openai(url: str) -> None:
    outcome = run_program("langchain_packages", "openai-3", url=url, scenarios=["chat_openai"])
    assert len(check_all(outcome, "chat_openai", 40)) == 4
    (error,) = outcome.of("chat_openai_errors")
    assert (error["status_code"], error["code"]) == (400, "invalid_request")


def test_pydantic_ai_with_instructions(url: str) -> None:
    outcome = run_program("pydantic_ai_package", "openai-3", url=url)
    assert len(check_all(outcome, "four_turns", 40)) == 4
    (error,) = outcome.of("errors")
    assert "ModelHTTPError" in error["names"]
    assert (error["status_code"], error["body"]["param"]) == (400, "n")


def test_strands_agents(url: str) -> None:
    outcome = run_program("strands_agents", "openai-2", url=url, scenarios=["openai_model"])
    turns = check_all(outcome, "openai_model", 40)
    assert [turn["finish_reason"] for turn in turns] == ["end_turn"] * 3
    (error,) = outcome.of("openai_model_errors")
    assert "`n`" in error["text"]
