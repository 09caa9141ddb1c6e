"""Unmodified clients that speak AWS, and the package openai, at a local endpoint with two instances."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.serve.torchserve import TorchServe
from tests.support.clients import MODEL, check_all, run_program

from .conftest import Endpoint


@pytest.fixture(scope="module")
def runtime_url(instances: list[TorchServe]) -> Iterator[str]:
    """Run the endpoint; return the URL of SageMaker Runtime."""
    with Endpoint(instances) as endpoint:
        yield endpoint.url


def test_the_package_openai_at_the_endpoints_path(runtime_url: str) -> None:
    url = f"{runtime_url}/endpoints/{MODEL}/openai/v1"
    names = ["five_turns", "edited_and_regenerated", "odd_conversations", "asynchronous", "errors"]
    outcome = run_program("openai_package", "openai-3", url=url, scenarios=names)
    for name in names[:-1]:
        check_all(outcome, name)
    for error in outcome.of("errors"):
        assert "APIStatusError" in error["names"], error
        assert error["status_code"] < 500, error


def test_litellm(runtime_url: str) -> None:
    outcome = run_program("litellm_package", "openai-3", runtime_url=runtime_url)
    turns = check_all(outcome, "four_turns", 40)
    assert [turn["finish_reason"] for turn in turns] == ["stop"] * 4
    for error in outcome.of("errors"):
        assert "APIError" in error["names"] or "APIStatusError" in error["names"], error


def test_langchain_aws(runtime_url: str) -> None:
    outcome = run_program("langchain_packages", "openai-3", runtime_url=runtime_url, scenarios=["chat_sagemaker"])
    for scenario in ("chat_sagemaker", "chat_sagemaker_in_a_session"):
        assert len(check_all(outcome, scenario, 40)) == 4
    (closed,) = outcome.of("closed")
    assert closed["closed"] == closed["opened"]
    (error,) = outcome.of("chat_sagemaker_errors")
    assert "ModelError" in error["names"]


def test_strands_agents(runtime_url: str) -> None:
    scenarios = ["sagemaker_model", "sagemaker_model_in_a_session"]
    outcome = run_program("strands_agents", "openai-2", runtime_url=runtime_url, scenarios=scenarios)
    for scenario in ("sagemaker_model", "sagemaker_model_whole", "sagemaker_model_in_a_session"):
        turns = check_all(outcome, scenario, 40)
        assert [turn["finish_reason"] for turn in turns] == ["end_turn"] * 3


def test_sagemaker_core(runtime_url: str) -> None:
    outcome = run_program("sagemaker_core", "openai-2", runtime_url=runtime_url)
    check_all(outcome, "native")
    check_all(outcome, "messages", 40)
    (closed,) = outcome.of("closed")
    assert closed["closed"] == closed["opened"]
    (error,) = outcome.of("errors")
    assert "ModelError" in error["names"]
    assert "`n`" in error["text"]
