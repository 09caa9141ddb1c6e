"""`llava-deploy push` with the real buildah, into a registry on loopback that keeps what it is sent as ECR would."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.support.cloud import REGION

from .conftest import Cloud, Done

ACCOUNT = "123456789012"
HOST = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com"
IMAGE = "localhost/llava-sessions:cuda"
Run = Callable[..., Done]


@dataclass
class Registry:
    """The few calls of the OCI distribution protocol that a push makes. Manifests go on to moto's ECR."""

    cloud: Cloud
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    refused: int = 0
    port: int = 0

    def allows(self, header: str | None) -> bool:
        token = self.cloud.client("ecr").get_authorization_token()["authorizationData"][0]["authorizationToken"]
        return header == f"Basic {token}"


class Calls(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    registry: Registry

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self) -> None:
        store, body = self.registry, self.body()
        self.path = self.path.removeprefix(f"http://{HOST}")  # as a proxy gets it
        if not store.allows(self.headers.get("Authorization")):
            store.refused += 1
            return self.reply(401, WWW_Authenticate='Basic realm="ecr"')
        if self.path == "/v2/":
            return self.reply(200)
        if found := re.fullmatch(r"/v2/(.+)/blobs/(sha256:\w+)", self.path):
            return self.reply(200 if found[2] in store.blobs else 404)
        if re.fullmatch(r"/v2/(.+)/blobs/uploads/.*", self.path):
            return self.upload(body)
        name, reference = re.fullmatch(r"/v2/(.+)/manifests/(.+)", self.path).groups()
        if self.command != "PUT":
            return self.reply(404)
        store.manifests[reference] = body
        kind = self.headers["Content-Type"]
        image = {"repositoryName": name, "imageManifest": body.decode(), "imageTag": reference}
        store.cloud.client("ecr").put_image(**image, imageManifestMediaType=kind)
        return self.reply(201, Docker_Content_Digest="sha256:" + hashlib.sha256(body).hexdigest())

    def upload(self, body: bytes) -> None:
        store, place = self.registry, self.path.partition("?")[0]
        if self.command == "POST":
            place = self.path.partition("?")[0] + str(len(store.blobs) + 1)
            store.blobs[place] = b""
        store.blobs[place] += body
        if self.command != "PUT":
            return self.reply(202, Location=place, Range=f"0-{max(len(store.blobs[place]) - 1, 0)}")
        digest = re.search(r"digest=(sha256(?::|%3A)\w+)", self.path)[1].replace("%3A", ":")
        store.blobs[digest] = store.blobs.pop(place)
        assert digest == "sha256:" + hashlib.sha256(store.blobs[digest]).hexdigest()
        return self.reply(201, Location=place, Docker_Content_Digest=digest)

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def registry(cloud: Cloud) -> Iterator[Registry]:
    store = Registry(cloud)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Calls,), {"registry": store}))
    Thread(target=server.serve_forever, daemon=True).start()
    store.port = server.server_port
    yield store
    server.shutdown()
    server.server_close()


@pytest.fixture
def image(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small image in a store of its own, and our registry as the way to ECR. No Docker daemon answers."""
    if not shutil.which("buildah"):
        pytest.skip("buildah is not installed")
    storage, registries = tmp_path / "storage.conf", tmp_path / "registries.conf"
    lines = ["[storage]", 'driver = "vfs"', f'graphroot = "{tmp_path}/images"', f'runroot = "{tmp_path}/run"']
    storage.write_text("\n".join(lines))
    registries.write_text(
        f'[[registry]]\nlocation = "{HOST}"\ninsecure = true\n'
    )  # plain HTTP, so that a proxy sees it
    settings = {
        "CONTAINERS_STORAGE_CONF": str(storage),
        "CONTAINERS_REGISTRIES_CONF": str(registries),
        "BUILDAH_ISOLATION": "chroot",
        "STORAGE_DRIVER": "vfs",
        "DOCKER_HOST": "tcp://127.0.0.1:9",
        "HTTP_PROXY": f"http://127.0.0.1:{registry.port}",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "Dockerfile").write_text('FROM scratch\nCOPY hello /hello\nENTRYPOINT ["/hello"]\n')
    (tmp_path / "hello").write_text("hello")
    command = ["buildah", "bud", "--format", "docker", "-t", IMAGE, "-f", "Dockerfile", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return IMAGE


def test_push_makes_the_repository_and_sends_the_image_once(
    cloud: Cloud, run: Run, registry: Registry, image: str
) -> None:
    dry = run("push", "--image", image, "--dry-run")
    assert dry.code == 0, dry.err
    assert cloud.client("ecr").describe_repositories()["repositories"] == []

    done = run("push", "--image", image)
    assert done.code == 0, done.err
    uri = done.out.strip()
    assert re.fullmatch(rf"{re.escape(HOST)}/llava-sessions@sha256:[0-9a-f]{{64}}", uri)
    (tag,) = registry.manifests
    assert re.fullmatch(r"[0-9a-f]{12}", tag), "the image's own id"
    manifest = json.loads(registry.manifests[tag])
    assert manifest["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert all(layer["digest"] in registry.blobs for layer in manifest["layers"])
    (repository,) = cloud.client("ecr").describe_repositories()["repositories"]
    assert repository["imageTagMutability"] == "IMMUTABLE"
    assert repository["imageScanningConfiguration"] == {"scanOnPush": True}

    sent = len(registry.manifests), len(registry.blobs)
    again = run("push", "--image", image)
    assert (again.code, again.out) == (0, done.out)
    assert "is already in ECR" in again.err
    assert (len(registry.manifests), len(registry.blobs)) == sent


def test_the_password_is_in_no_command_line(
    cloud: Cloud, run: Run, registry: Registry, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    started = subprocess.run

    def record(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        commands.append(list(command))
        return started(command, **kwargs)

    monkeypatch.setattr("deploy.sagemaker.images.subprocess.run", record)
    assert run("push", "--image", image).code == 0
    token = cloud.client("ecr").get_authorization_token()["authorizationData"][0]["authorizationToken"]
    password = base64.b64decode(token).decode().partition(":")[2]
    assert commands
    assert not [part for command in commands for part in command if password in part or token in part]


def test_a_push_that_is_refused_ends_in_one_line(
    cloud: Cloud, run: Run, registry: Registry, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "allows", lambda _: False)
    done = run("push", "--image", image)
    assert (done.code, "`buildah push` failed" in done.error) == (1, True)
    assert registry.refused


def test_an_image_that_is_not_there(run: Run, image: str) -> None:
    done = run("push", "--image", "localhost/none:1")
    assert (done.code, "has no image 'localhost/none:1'" in done.error) == (1, True)
