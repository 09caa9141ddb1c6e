"""Images in ECR: the repository, and a local image's way there by Docker or buildah.

An image goes up under its own id as its tag, so what is there already is not sent again. The registry's password never
appears in a command line.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from .account import MADE_BY, Account
from .problems import DeployError, code_of

REPO = Path(__file__).resolve().parents[2]
URI = re.compile(
    r"(?P<base>(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.[a-z.]+/(?P<repository>[a-z0-9._/-]+))"
    r"(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class Image:
    """An image in ECR. `base` is its URI less tag and digest."""

    base: str
    account: str
    region: str
    repository: str
    id: dict[str, str]  # imageTag or imageDigest, as ECR's API takes it

    @classmethod
    def parse(cls, uri: str) -> Image:
        """From `<account>.dkr.ecr.<region>.amazonaws.com/<repository>:<tag>` or `...@sha256:<digest>`."""
        match = URI.fullmatch(uri)
        if not match:
            wanted = "<account>.dkr.ecr.<region>.amazonaws.com/<repository>:<tag>"
            raise DeployError(f"{uri!r} is no image in ECR, and SageMaker pulls from nowhere else: wanted {wanted}")
        chosen = {"imageDigest": match["digest"]} if match["digest"] else {"imageTag": match["tag"] or "latest"}
        return cls(match["base"], match["account"], match["region"], match["repository"], chosen)

    def repository_arn(self, partition: str) -> str:
        return f"arn:{partition}:ecr:{self.region}:{self.account}:repository/{self.repository}"


class Docker:
    """Docker, where its daemon answers."""

    name = "docker"

    @staticmethod
    def works() -> bool:
        return (
            bool(shutil.which("docker")) and _quiet("docker", "version", "--format", "{{.Server.Version}}") is not None
        )

    @staticmethod
    def image_id(image: str) -> str | None:
        return _quiet("docker", "image", "inspect", "--format", "{{.Id}}", image)

    @staticmethod
    def push(image: str, target: str, user: str, password: str) -> None:
        registry = target.partition("/")[0]
        _run(["docker", "login", "--username", user, "--password-stdin", registry], password)
        _run(["docker", "tag", image, target])
        _run(["docker", "push", target])


class Buildah:
    """buildah, which needs no daemon. It reads the password from a file that is gone afterwards."""

    name = "buildah"

    @staticmethod
    def works() -> bool:
        return bool(shutil.which("buildah"))

    @staticmethod
    def image_id(image: str) -> str | None:
        return _quiet("buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", image)

    @staticmethod
    def push(image: str, target: str, user: str, password: str) -> None:
        registry = target.partition("/")[0]
        auth = base64.b64encode(f"{user}:{password}".encode()).decode()
        with tempfile.TemporaryDirectory() as folder:  # readable by its owner alone
            path = Path(folder, "auth.json")
            path.write_text(json.dumps({"auths": {registry: {"auth": auth}}}), encoding="utf-8")
            # Docker's own format: SageMaker documents no other.
            _run(["buildah", "push", "--authfile", str(path), "--format", "docker", image, f"docker://{target}"])


def builder() -> type[Docker] | type[Buildah]:
    """What can push from this machine."""
    for tool in (Docker, Buildah):
        if tool.works():
            return tool
    raise DeployError("neither a Docker daemon nor buildah here; one of them is needed to push an image")


def build() -> None:
    """`make image`, from the top of the checkout."""
    _run(["make", "image"], cwd=REPO)


def local_id(tool: type[Docker] | type[Buildah], image: str) -> str:
    """The id of a local image, as a tag: 12 digits."""
    found = tool.image_id(image)
    if not found:
        raise DeployError(f"{tool.name} has no image {image!r}: run `make image`, or give --build")
    return found.removeprefix("sha256:")[:12]


def repository_uri(account: Account, repository: str) -> str:
    """Where the images of that repository belong."""
    domain = "amazonaws.com.cn" if account.region.startswith("cn-") else "amazonaws.com"
    return f"{account.id}.dkr.ecr.{account.region}.{domain}/{repository}"


def ensure_repository(account: Account, repository: str) -> bool:
    """The repository, made where it is missing; whether it was. Tags can't be moved, and pushes are scanned."""
    try:
        account.client("ecr").create_repository(
            repositoryName=repository,
            imageTagMutability="IMMUTABLE",
            imageScanningConfiguration={"scanOnPush": True},
            tags=[MADE_BY],
        )
    except ClientError as error:
        if code_of(error) == "RepositoryAlreadyExistsException":
            return False
        raise
    return True


def push(account: Account, tool: type[Docker] | type[Buildah], image: str, target: str) -> None:
    """Send a local image to its place in ECR."""
    data = account.client("ecr").get_authorization_token()["authorizationData"][0]
    user, _, password = base64.b64decode(data["authorizationToken"]).decode().partition(":")
    tool.push(image, target, user, password)


def by_digest(account: Account, image: Image) -> str | None:
    """The URI of what the image is now, which no later push changes; None when ECR has no such image."""
    try:
        details = _describe(account, image.repository, [image.id], image.account)
    except ClientError as error:
        if code_of(error) in ("ImageNotFoundException", "RepositoryNotFoundException"):
            return None
        raise
    return f"{image.base}@{details[0]['imageDigest']}"


def newest(account: Account, repository: str) -> str:
    """The URI of the image that was pushed last."""
    try:
        details = _describe(account, repository)
    except ClientError as error:
        if code_of(error) != "RepositoryNotFoundException":
            raise
        details = []
    if not details:
        raise DeployError(f"no image in the ECR repository {repository!r}: run `llava-deploy push` first")
    digest = max(details, key=lambda detail: detail["imagePushedAt"])["imageDigest"]
    return f"{repository_uri(account, repository)}@{digest}"


def delete_repository(account: Account, repository: str) -> bool:
    """Delete the repository with all its images, if `push` made it; whether it did."""
    ecr = account.client("ecr")
    try:
        found = ecr.describe_repositories(repositoryNames=[repository])["repositories"][0]
    except ClientError as error:
        if code_of(error) == "RepositoryNotFoundException":
            return False
        raise
    if MADE_BY not in ecr.list_tags_for_resource(resourceArn=found["repositoryArn"])["tags"]:
        raise DeployError(f"the ECR repository {repository!r} was not made by llava-deploy; delete its images by hand")
    ecr.delete_repository(repositoryName=repository, force=True)
    return True


def _describe(
    account: Account, repository: str, ids: Sequence[dict[str, str]] = (), owner: str = ""
) -> list[dict[str, Any]]:
    pages = account.client("ecr").get_paginator("describe_images")
    wanted = {"imageIds": list(ids)} if ids else {}
    wanted |= {"registryId": owner} if owner else {}
    return [item for page in pages.paginate(repositoryName=repository, **wanted) for item in page["imageDetails"]]


def _quiet(*command: str) -> str | None:
    """What a command says; None when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _run(command: list[str], password: str | None = None, cwd: Path | None = None) -> None:
    """Run a command with its output on our stderr; stdout holds our result alone."""
    done = subprocess.run(command, input=password, text=True, stdout=2, check=False, cwd=cwd)
    if done.returncode:
        raise DeployError(f"`{' '.join(command[:2])}` failed with exit code {done.returncode}; its own words are above")
