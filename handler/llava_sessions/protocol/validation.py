"""Validate the fields of a payload by the model of a request, and name every problem. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from ..config import RequestLimits
from ..errors import Refused, describe
from .constants import INFERENCE_HEADER, REQUEST_ID_PATTERN
from .fields import TOO_LARGE
from .requests import BaseRequest, PastTurn, RetriableRequest

Model = TypeVar("Model", bound=BaseRequest)

_LAST = "session_token"


@dataclass(frozen=True)
class Problem:
    """One reason to reject a payload. `field` "" precedes all fields. `param`: the client's name of the field."""

    field: str
    code: str
    message: str
    param: str | None = None


def validated(
    model: type[Model], fields: Mapping[str, Any], limits: RequestLimits, names: Mapping[str, str] | None = None
) -> tuple[Model | None, list[Problem]]:
    """Return the request, or one problem for each malformed field. `names`: the client's names of fields, if others."""
    try:
        return model.model_validate(fields, context=limits), []
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
    problems: dict[str, Problem] = {}
    for detail in details:
        field = str(detail["loc"][0])
        if field not in problems:
            code = TOO_LARGE if detail["type"] == TOO_LARGE else "invalid_request"
            param, message = _described(model, fields, limits, detail["loc"], names or {})
            problems[field] = Problem(field, code, message, param)
    return None, list(problems.values())


def _described(
    model: type[BaseRequest],
    fields: Mapping[str, Any],
    limits: RequestLimits,
    location: Sequence[int | str],
    names: Mapping[str, str],
) -> tuple[str, str]:
    """Return the client's name of a malformed field and the message. `location`: of pydantic's error."""
    field = str(location[0])
    name = names.get(field, field)
    template = model.expected.get(field)
    found: Any = fields.get(field)
    if field == "history" and len(location) > 1:  # of one of its turns
        index = int(location[1])
        turn = found[index]
        name = f"history[{index}]"
        template = "`{name}` must be an object with `prompt_text`, `response_text` and pictures, got {actual}"
        found = turn
        if len(location) > 2 and str(location[2]) in PastTurn.expected:
            field = str(location[2])
            name = f"{name}.{field}"
            template = PastTurn.expected[field]
            fields = turn
            found = turn.get(field)
    actual = "nothing" if template is not None and field not in fields and name == field else describe(found)
    return name, (template or "`{name}` is malformed, got {actual}").format(name=name, limits=limits, actual=actual)


def refusal(problems: Sequence[Problem], model: type[BaseRequest]) -> Refused:
    """Return one refusal for all problems, in the order of the fields. The session token, which all have, is last."""
    fields = [name for name in model.model_fields if name != _LAST]
    order = ["", *model.first, *fields, _LAST]
    ordered = sorted(problems, key=lambda problem: order.index(problem.field))
    message = "; ".join(problem.message for problem in ordered)
    return Refused(ordered[0].code, message, param=ordered[0].param or ordered[0].field or None)


def add_retry_key(
    request: RetriableRequest, headers: Mapping[str, object], content: Callable[[], Mapping[str, Any]]
) -> None:
    """Set the key by which a retry of the request is recognised. `content` returns what both have in common.

    With the content in the digest, another client with the same ID doesn't get this client's session.
    """
    request_id: str | None = getattr(request, "request_id", None)
    request.set_retry_key(_retry_key(request_id or _inference_id(headers), content), request_id is not None)


def _inference_id(headers: Mapping[str, object]) -> str | None:
    """Return SageMaker's own request ID if it has the form of a `request_id`."""
    value = headers.get(INFERENCE_HEADER.lower())
    return value if isinstance(value, str) and REQUEST_ID_PATTERN.fullmatch(value) else None


def _retry_key(request_id: str | None, content: Callable[[], Mapping[str, Any]]) -> str | None:
    """Return a digest of the request ID and the content; None without an ID."""
    if request_id is None:
        return None
    body = json.dumps(content(), sort_keys=True)
    return hashlib.sha256(f"{request_id} {body}".encode()).hexdigest()
