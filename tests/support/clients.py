"""Run a client program (tests/deploy/clients) in its environment, and compare its answers with `generate`."""

from __future__ import annotations

import base64
import functools
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.encoding import to_png
from tests.support.reference import Generated, Reference

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "deploy" / "clients"
ENVIRONMENTS = ROOT / ".venv-clients"
MODEL = "llava"
QUESTIONS = (
    *("Which shapes are there?", "How many shapes are there?", "Is there a circle?"),
    *("What is in the picture?", "Count the shapes."),
)
SCENES = {"first": HELD_OUT_SEEDS[5_100], "second": HELD_OUT_SEEDS[5_101]}
# Names in the environment of a program that is not this project's: no look-up outside this machine, and keys for AWS.
SETTINGS = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "AWS_ACCESS_KEY_ID": "any",
    "AWS_SECRET_ACCESS_KEY": "any",
    "AWS_DEFAULT_REGION": "us-west-2",
    "AWS_REGION": "us-west-2",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_MAX_ATTEMPTS": "1",
    "LANGSMITH_TRACING": "false",
    "OTEL_SDK_DISABLED": "true",
}
TIMEOUT_S = 600.0
# Where a program sets no limit: model-config.yaml's default.
DEFAULT_NEW_TOKENS = 256


class Outcome:
    """The exchanges of a program by scenario."""

    def __init__(self, printed: dict[str, Any]) -> None:
        self._exchanges = printed["exchanges"]
        self._failures = printed["failures"]

    def of(self, scenario: str) -> list[dict[str, Any]]:
        """Return the exchanges of a scenario. Fail with its traceback if it failed."""
        failures = [
            text for name, text in self._failures.items() if name == scenario or scenario not in self._exchanges
        ]
        if failures:
            pytest.fail("\n".join(failures))
        return self._exchanges[scenario]


def environment(name: str) -> Path:
    """Return the Python of an environment."""
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        pytest.fail(f"run scripts/clients.sh {name} first (make test does)")
    return python


def run_program(name: str, environment_name: str, **job: object) -> Outcome:
    """Run a program against servers; `job` has their addresses."""
    pictures = {key: base64.b64encode(to_png(make_scene(seed).draw())).decode() for key, seed in SCENES.items()}
    job = {"model": MODEL, "endpoint": MODEL, "questions": QUESTIONS, "pictures": pictures, **job}
    command = [environment(environment_name), PROGRAMS / f"{name}.py"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "OPENAI_", "PYTHON"))}
    settings = {**kept, **SETTINGS}
    if runtime_url := job.get("runtime_url"):
        settings["AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"] = str(runtime_url)
    options = {"input": json.dumps(job), "text": True, "env": settings, "timeout": TIMEOUT_S}
    run = subprocess.run(command, capture_output=True, check=False, **options)
    if run.returncode:
        pytest.fail(f"{name} ended with {run.returncode}:\n{run.stderr}")
    # A client may print lines of its own.
    return Outcome(json.loads(run.stdout.splitlines()[-1]))


@functools.cache
def reference() -> Reference:
    """Return `generate` with the programs' pictures."""
    return Reference({name: make_scene(seed).draw() for name, seed in SCENES.items()})


def check(exchange: Mapping[str, Any], max_new_tokens: int = DEFAULT_NEW_TOKENS) -> Generated:
    """Check an answer, and the usage if the program has it. Return the expected one."""
    expected = reference().answer(exchange["sent"], max_new_tokens)
    assert expected.matches(exchange["answer"].strip()), (exchange, expected.text)
    usage = exchange.get("usage")
    if usage:
        assert usage["prompt_tokens"] == expected.prompt_tokens, exchange
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], exchange
        if exchange["answer"].strip() == expected.text:
            assert usage["completion_tokens"] == len(expected.token_ids), exchange
    return expected


def check_all(outcome: Outcome, scenario: str, max_new_tokens: int = DEFAULT_NEW_TOKENS) -> list[dict[str, Any]]:
    """Check every answer of a scenario. Return its exchanges."""
    exchanges = outcome.of(scenario)
    for exchange in exchanges:
        check(exchange, max_new_tokens)
    return exchanges


def cached(exchanges: list[dict[str, Any]]) -> Iterator[int]:
    """Yield how many tokens of each prompt were in a KV cache."""
    for exchange in exchanges:
        yield exchange["usage"]["prompt_tokens_details"]["cached_tokens"]
