"""Hooks of schemathesis, which loads this module itself (tests/server/test_openapi.py).

Half of the requests to a named model name the served one. A session ID of the right form becomes that of the test's
session. Answers are short.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import schemathesis
import yaml
from jsonschema import Draft202012Validator

SESSION = os.environ["OPENAPI_TEST_SESSION"]  # set by the test
MAX_TOKENS = 1
_DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.yaml"
_COMPONENTS = yaml.safe_load(_DOCUMENT.read_text(encoding="utf-8"))["components"]
QUESTION = {"role": "user", "content": "How many shapes are there?"}
_SESSION = "X-Amzn-SageMaker-Session-Id"
_ID = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*")
_LIMITS = ("max_new_tokens", "max_completion_tokens", "max_tokens", "min_tokens")
_ABSENT_IF_MINUS_ONE = ("max_completion_tokens", "max_tokens")
_SERVED = {"name": "llava", "version": "1.0", "model": "llava"}
_PARTS = {
    "application/x-ndjson": ("AnswerPiece", "AnswerEnd", "ChatCompletionChunk", "Error", "OpenAIError"),
    "text/event-stream": ("ChatCompletionChunk", "OpenAIError"),
}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Change a request before it is sent."""
    for name, value in case.path_parameters.items():
        if len(str(value)) % 2 == 0:  # about half of them
            case.path_parameters[name] = _SERVED[name]
    if isinstance(case.body, dict):
        _shorten(case.body)
        _end_with_question(case.body.get("messages"))
    sent = case.headers.get(_SESSION)
    if _needs_session(case.body) if sent is None else _ID.fullmatch(str(sent)) and not _closes(case.body):
        case.headers[_SESSION] = SESSION


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Leave conversations to the examples and the fuzzing: there are 200 of them, and each is answered."""
    is_coverage = case.meta is not None and case.meta.phase.name.value == "coverage"
    return not (is_coverage and isinstance(case.body, dict) and "messages" in case.body)


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Close a session that the request has opened: others use the server too."""
    opened = response.headers.get(_SESSION.lower())
    if response.status_code == 200 and opened and "Expires=" in opened[0]:
        token = case.body.get("session_token")
        body = {"type": "close_session", **({} if token is None else {"session_token": token})}
        headers = {_SESSION: opened[0].partition(";")[0]}
        closed = requests.post(response.request.url, json=body, headers=headers, timeout=60)
        closed.raise_for_status()
        _validate(closed.json(), "Done")


@schemathesis.check
def stream_conformance(ctx: Any, response: Any, case: Any) -> None:
    """Check that each part of a stream has a schema of the document, and that the stream has an end."""
    content_type = response.headers.get("content-type", [""])[0].partition(";")[0]
    names = _PARTS.get(content_type)
    if names is None:
        return
    parts = list(_parts(response.content.decode(), content_type))
    for part in parts:
        _validate(part, *names)
    assert parts, "the stream is empty"


def _validate(value: Any, *names: str) -> None:
    """Raise `AssertionError` unless the value fits one of these schemas of the document."""
    any_of = [{"$ref": f"#/components/schemas/{name}"} for name in names]
    is_valid = Draft202012Validator({"components": _COMPONENTS, "anyOf": any_of}).is_valid(value)
    assert is_valid, f"the document has no such {' or '.join(names)}: {value}"


def _parts(text: str, content_type: str) -> Iterator[Any]:
    """Yield the JSON of each line or event."""
    if content_type == "application/x-ndjson":
        assert text.endswith("\n"), text
        yield from map(json.loads, text.splitlines())
        return
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], events[-2:]
    yield from (json.loads(event.removeprefix("data: ")) for event in events[:-2])


def _shorten(body: dict[str, Any]) -> None:
    """Lower the number of tokens. A malformed number stays as it is."""
    for name in _LIMITS:
        value = body.get(name, 0)
        is_absent = value is None or (value == -1 and name in _ABSENT_IF_MINUS_ONE)
        if is_absent or (type(value) is int and value > MAX_TOKENS):
            body[name] = MAX_TOKENS
    if "messages" in body:
        body.setdefault("max_completion_tokens", MAX_TOKENS)
    elif body.get("type") == "send_text_prompt":
        body.setdefault("max_new_tokens", MAX_TOKENS)


def _end_with_question(messages: Any) -> None:
    """Add a question to a conversation that ends with another message. Most generated ones do."""
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict) and "role" in messages[-1]:
        messages.append(QUESTION)


def _needs_session(body: Any) -> bool:
    return isinstance(body, dict) and body.get("type") in ("send_text_prompt", "cancel") and "session_id" not in body


def _closes(body: Any) -> bool:
    return isinstance(body, dict) and (body.get("type") == "close_session" or body.get("requestType") == "CLOSE")
