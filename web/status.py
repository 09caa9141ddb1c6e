"""Whether the model server answers."""

from __future__ import annotations

import os
from dataclasses import dataclass

import httpx

_TIMEOUT_S = 2.0
_WAIT = "The page goes on by itself when it is back."
ENDPOINT_URL_VARIABLE = "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"


@dataclass(frozen=True)
class Status:
    """`state`: "ready", "starting", "unreachable", or "unknown" for an endpoint without a health check."""

    state: str
    title: str = ""
    advice: str = ""


def is_url(name: str) -> bool:
    """Return whether a model server is named by its URL. Otherwise the name is that of a SageMaker endpoint."""
    return name.lower().startswith(("http://", "https://"))


async def status_of(http: httpx.AsyncClient, endpoint: str) -> Status:
    """Return the status of the server at a URL, or of a SageMaker endpoint by its name.

    SageMaker Runtime has no health check. Of a local endpoint, any reply shows that it runs.
    """
    if is_url(endpoint):
        return await _ping(http, f"{endpoint.rstrip('/')}/ping")
    local = os.environ.get(ENDPOINT_URL_VARIABLE)
    if local is None:
        return Status("unknown")
    try:
        await http.get(local, timeout=_TIMEOUT_S)
    except httpx.HTTPError:
        return Status("unreachable", "The local endpoint does not answer.", f"Check that `make endpoint` runs. {_WAIT}")
    return Status("unknown")


async def _ping(http: httpx.AsyncClient, url: str) -> Status:
    try:
        reply = await http.get(url, timeout=_TIMEOUT_S)
    except httpx.HTTPError:
        return Status("unreachable", "The model server does not answer.", f"Check that it runs. {_WAIT}")
    if reply.is_success:
        return Status("ready")
    if reply.status_code == httpx.codes.NOT_FOUND:
        return Status("starting", "The model server is about to stop.", _WAIT)
    return Status("starting", "The model server is starting.", _WAIT)
