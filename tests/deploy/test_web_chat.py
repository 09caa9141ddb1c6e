"""The server of the web chat in front of the local endpoint, through boto3 as in front of SageMaker."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from deploy.local_endpoint.contract import REGION
from tests.support.browser import PICTURE, PageServer
from tests.support.local_endpoint import NAME, Endpoint

from .conftest import under_one_corner


def events(reply: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    """Return the server-sent events of a reply."""
    blocks = [block.split("\n", 1) for block in reply.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


@under_one_corner
def test_a_chat_goes_on_through_the_endpoint(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", endpoint.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    with PageServer(NAME, region=REGION) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        http.timeout = httpx.Timeout(120)
        assert http.get("/api/status").json()["state"] == "unknown"
        opened = http.post("/api/chats", content=PICTURE.read_bytes()).json()["chat"]
        path = f"/api/chats/{opened['id']}"
        for turns in (1, 2):
            found = events(http.post(f"{path}/questions", json={"text": "Which shapes are there?"}))
            name, data = found[-1]
            assert (name, len(data["chat"]["turns"])) == ("end", turns)
            assert (
                "".join(piece["text"] for kind, piece in found if kind == "piece")
                == (data["chat"]["turns"][-1]["answer"])
            )
        where = http.get(f"{path}/session").json()
        assert where["place"] == "resident"
        assert where["memory"]["kv_bytes"] > 0
        measured = http.post(f"{path}/turns/1/comparison").json()["chat"]["turns"][1]
        assert measured["comparison"]["prompt_tokens"] == measured["prompt_tokens"]
        name, data = events(http.post(f"{path}/turns/0/edit", json={"text": "Is there a star?"}))[-1]
        assert (name, len(data["chat"]["turns"])) == ("end", 1)
        assert http.delete(path).status_code == 204
