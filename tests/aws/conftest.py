"""AWS for these tests is moto's server on loopback, empty at the start of each; no request can leave the machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import botocore.loaders
import pytest

from deploy.sagemaker import images, models
from tests.support.cloud import ACCOUNT, REGION, empty, put_image, serving, settings

TYPE = "ml.g5.4xlarge"  # not the default of the template
LOADER = botocore.loaders.create_loader()  # the services' descriptions, read once for all tests


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    with serving() as url:
        yield url


@dataclass
class Cloud:
    """The account under test: clients to look at it, and hooks into the requests of the command."""

    hooks: list[tuple[str, Callable[..., Any]]] = field(default_factory=list)

    def client(self, service: str) -> Any:
        session = boto3.session.Session()
        session._session.register_component("data_loader", LOADER)
        return session.client(service, region_name=REGION)

    def on(self, event: str, handler: Callable[..., Any]) -> None:
        """Have botocore call this in the command's own session, such as on `before-send.s3.UploadPart`."""
        self.hooks.append((event, handler))

    def count(self, event: str) -> list[Any]:
        """A list that grows with each such request."""
        seen: list[Any] = []
        self.on(event, lambda request, **_: seen.append(request))
        return seen


@pytest.fixture
def cloud(moto_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cloud:
    from deploy.sagemaker import command as llava_deploy
    from deploy.sagemaker import stacks, watching

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in settings(moto_url, tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stacks, "POLL_S", 0.01)
    monkeypatch.setattr(watching, "POLL_S", 0.01)

    empty(moto_url)
    made = Cloud()

    class Session(boto3.session.Session):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._session.register_component("data_loader", LOADER)
            for event, handler in made.hooks:
                self.events.register(event, handler)

    monkeypatch.setattr(llava_deploy.boto3, "Session", Session)
    return made


@dataclass(frozen=True)
class Done:
    """What a run of the command left: its exit code, its result and its words on the way."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failure is. There is never a second, nor a traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    from deploy.sagemaker.command import main

    def run(*argv: object) -> Done:
        capfd.readouterr()
        code = main([str(arg) for arg in argv])
        said = capfd.readouterr()
        return Done(code, said.out, said.err)

    return run


Run = Callable[..., Done]


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `build_mar.sh --sagemaker` leaves, with weights of three parts."""
    monkeypatch.setattr(models, "PART_BYTES", 5 << 20)  # the smallest that S3 takes
    folder = tmp_path / "llava.sagemaker"
    for name in ("MAR-INF", "checkpoint"):
        (folder / name).mkdir(parents=True)
    (folder / "MAR-INF/MANIFEST.json").write_text("{}")
    (folder / "llava_handler.py").write_text("")  # an empty file, too
    (folder / "model-config.yaml").write_text("llava:\n  max_sessions: 20\n")
    (folder / "checkpoint/model.safetensors").write_bytes(os.urandom((10 << 20) + 77))
    return folder


@pytest.fixture
def pushed(cloud: Cloud) -> str:
    """An image in ECR, as `push` leaves one."""
    images.ensure_repository(images.Account("llava", boto3.session.Session(region_name=REGION)), "llava-sessions")
    put_image(cloud.client("ecr"), "llava-sessions")
    return f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/llava-sessions"


@pytest.fixture
def uploaded(run: Run, packed: Path, pushed: str) -> str:
    """A model in S3 and an image in ECR: all that `up` needs."""
    return run("upload", packed).out.strip()
