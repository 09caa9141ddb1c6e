"""docs/openapi.yaml is the generator's output and a valid OpenAPI document, and agrees with the code."""

from __future__ import annotations

from pathlib import Path

import openapi_spec_validator
import yaml

from llava_sessions.errors import STATUS_OF_CODE
from llava_sessions.protocol.parsing import MODEL_OF_REQUEST_TYPE, MODEL_OF_TYPE
from scripts import openapi_document

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "openapi.yaml").read_text(encoding="utf-8")
DOCUMENT = yaml.safe_load(PAGE)


def test_the_document_is_up_to_date() -> None:
    assert openapi_document.page() == PAGE


def test_the_document_is_valid() -> None:
    openapi_spec_validator.validate(DOCUMENT)


def test_every_action_has_a_request() -> None:
    bodies = DOCUMENT["paths"]["/invocations"]["post"]["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    requests = [DOCUMENT["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]] for body in bodies]
    for field, models in (("type", MODEL_OF_TYPE), ("requestType", MODEL_OF_REQUEST_TYPE)):
        actions = [request["properties"][field].get("const") for request in requests if field in request["required"]]
        assert sorted(actions) == sorted(models)


def test_every_error_code_has_its_status_in_both_forms() -> None:
    responses = DOCUMENT["components"]["responses"]
    for code, status in STATUS_OF_CODE.items():
        for form in ("Native", "OpenAI"):
            is_moved = form == "OpenAI" and code == "context_length_exceeded"
            _, only = responses[f"{form}{400 if is_moved else status}"]["content"]["application/json"]["schema"][
                "allOf"
            ]
            assert code in only["properties"]["error"]["properties"]["code"]["enum"]
