"""Fixtures of the deploy tests: real TorchServes, local endpoints in front of them, and boto3.

All tests share two instances of the demo model, and one instance of a stand-in that returns what reached it. An
endpoint starts in milliseconds, so there is one for each way in which the platform may behave.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.client import BaseClient
from botocore.config import Config

from deploy.local_endpoint.contract import Corners
from deploy.serve.torchserve import TorchServe
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.encoding import to_png
from tests.support.local_endpoint import NAME, Endpoint
from tests.support.serving import pack, running

ROOT = Path(__file__).parents[2]
# Every value of every switch.
ALL_CORNERS = (
    Corners(new_session="absent", lost_instance="400", create_header="session"),
    Corners(new_session="empty", lost_instance="503", create_header="new-session"),
    Corners(new_session="literal", lost_instance="reroute", create_header="session"),
)
STAND_IN = '''
import json, os, time

from ts.handler_utils.utils import send_intermediate_predict_response


class Handler:
    """Tells what reached it; the body may say with which status and headers, when, and in how many parts."""

    def initialize(self, ctx):
        pass

    def handle(self, rows, ctx):
        body = rows[0].get("body", b"")
        order = body if isinstance(body, dict) else {}
        ctx.set_response_content_type(0, order.get("content_type", "application/json"))
        for part in range(order.get("parts", 0)):
            send_intermediate_predict_response(["part%d;" % part], ctx.request_ids, "Intermediate", 200, ctx)
            time.sleep(order.get("part_s", 0))
            if order.get("dies"):
                os._exit(1)
        time.sleep(order.get("sleep_s", 0))
        for name, value in order.get("headers", {}).items():
            ctx.set_response_header(0, name, value)
        if "status" in order:
            ctx.set_response_status(order["status"], "As Ordered", 0)
        told = {"headers": ctx.get_all_request_header(0), "bytes": len(body)}
        return [order.get("say", json.dumps(told))]
'''
STAND_IN_CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 1\nmaxBatchDelay: 1\nresponseTimeout: 60\n"


@pytest.fixture(scope="session")
def shapes_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack the demo model with a journal that all its instances share."""
    return pack(tmp_path_factory.mktemp("packed"), journal_dir=tmp_path_factory.mktemp("journal"))


@pytest.fixture(scope="package")
def instances(shapes_store: Path) -> Iterator[list[TorchServe]]:
    """Run two instances of the demo model. Tests close the sessions that they open."""
    with running(TorchServe(shapes_store), TorchServe(shapes_store)) as servers:
        yield servers


@pytest.fixture(scope="package")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """Run an instance of the stand-in."""
    store = tmp_path_factory.mktemp("stand-in")
    model = store / "stand-in"
    (model / "MAR-INF").mkdir(parents=True)
    (model / "stand_in.py").write_text(STAND_IN)
    (model / "model-config.yaml").write_text(STAND_IN_CONFIG)
    details = {"modelName": "stand-in", "handler": "stand_in.py", "modelVersion": "1.0"}
    manifest = {"model": {**details, "configFile": "model-config.yaml"}, "runtime": "python", "archiverVersion": "0"}
    (model / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    with running(TorchServe(store, "stand-in")) as (server,):
        yield server


@pytest.fixture(scope="package", params=ALL_CORNERS, ids=lambda corners: f"{corners.new_session}")
def endpoint(request: pytest.FixtureRequest, instances: list[TorchServe]) -> Iterator[Endpoint]:
    """The endpoint over both instances, under each way in which the platform may behave.

    The first of them, which most tests use, also cuts streams inside lines and characters.
    """
    with Endpoint(instances, request.param, cut_parts=request.param == ALL_CORNERS[0]) as endpoint:
        yield endpoint


# For tests that open no session in a way of their own: the switches matter at an open and where an instance is lost.
under_one_corner = pytest.mark.parametrize(
    "endpoint", ALL_CORNERS[:1], ids=lambda corners: corners.new_session, indirect=True
)


@functools.cache
def _session() -> boto3.Session:
    return boto3.Session("any", "any", region_name="us-west-2")


def runtime(endpoint: Endpoint, **config: Any) -> BaseClient:
    """boto3's client, unmodified; one attempt unless `retries` says otherwise."""
    config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 50, **config}
    return _session().client("sagemaker-runtime", endpoint_url=endpoint.url, config=Config(**config))


@pytest.fixture(scope="package")
def client(endpoint: Endpoint) -> BaseClient:
    """boto3 on the endpoint."""
    return runtime(endpoint)


def seed_of(index: int) -> int:
    """Of a picture that training has never seen; none is used twice in the other tests."""
    return HELD_OUT_SEEDS[5_000 + index]


def picture(index: int) -> str:
    """A picture as base64."""
    return base64.b64encode(to_png(make_scene(seed_of(index)).draw())).decode()


def invoke(client: BaseClient, body: dict, session: str | None = None, **members: Any) -> dict:
    """One `invoke_endpoint`; the reply with its body read and parsed."""
    if session is not None:
        members["SessionId"] = session
    reply = client.invoke_endpoint(EndpointName=NAME, ContentType="application/json", Body=json.dumps(body), **members)
    return {**reply, "Body": json.loads(reply["Body"].read())}


def open_session(client: BaseClient, index: int) -> str:
    """Open a session on a picture; its id."""
    reply = invoke(client, {"type": "start_session", "image": picture(index)}, "NEW_SESSION")
    return reply["NewSessionId"].split(";")[0]


def ask(client: BaseClient, session: str, text: str, **options: Any) -> dict:
    """One question; the answer's body."""
    return invoke(client, {"type": "send_text_prompt", "prompt_text": text, **options}, session)["Body"]


def close_session(client: BaseClient, session: str) -> dict:
    """Close a session; the reply."""
    return invoke(client, {"type": "close_session"}, session)
