"""Images in ECR: make the repository, push a local image with Docker or buildah, find images.

The tag of a pushed image is its own ID, so that an image is pushed only once. The registry's password never appears in
a command line.
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
class EcrImage:
    """An image in ECR. `base` is its URI without tag and digest; `id` is its tag or digest as ECR's API takes it."""

    base: str
    account: str
    region: str
    repository: str
    id: dict[str, str]

    @classmethod
    def parse(cls, uri: str) -> EcrImage:
        """Parse `<account>.dkr.ecr.<region>.amazonaws.com/<repository>:<tag>` or `...@sha256:<digest>`."""
        match = URI.fullmatch(uri)
        if not match:
            expected = "<account>.dkr.ecr.<region>.amazonaws.com/<repository>:<tag>"
            raise DeployError(f"`--image` must be an image in ECR, {expected}, got {uri!r}")
        image_id = {"imageDigest": match["digest"]} if match["digest"] else {"imageTag": match["tag"] or "latest"}
        return cls(match["base"], match["account"], match["region"], match["repository"], image_id)

    def repository_arn(self, partition: str) -> str:
        """Return the ARN of the image's repository."""
        return f"arn:{partition}:ecr:{self.region}:{self.account}:repository/{self.repository}"


class Docker:
    """Docker; works if its daemon answers."""

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
    """buildah, which needs no daemon. It reads the password from a temporary file."""

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
        with tempfile.TemporaryDirectory() as folder:  # readable only by its owner
            path = Path(folder, "auth.json")
            path.write_text(json.dumps({"auths": {registry: {"auth": auth}}}), encoding="utf-8")
            # Docker's own format: the only one that SageMaker documents.
            _run(["buildah", "push", "--authfile", str(path), "--format", "docker", image, f"docker://{target}"])


def builder() -> type[Docker] | type[Buildah]:
    """Return a tool that can push from this machine. Raise `DeployError` if there is none."""
    for tool in (Docker, Buildah):
        if tool.works():
            return tool
    raise DeployError("a Docker daemon or buildah is needed to push an image, and neither was found")


def build() -> None:
    """Build the image with `make image`."""
    _run(["make", "image"], cwd=REPO)


def local_id(tool: type[Docker] | type[Buildah], image: str) -> str:
    """Return the ID of a local image as a tag of 12 digits. Raise `DeployError` if there is no such image."""
    found = tool.image_id(image)
    if not found:
        raise DeployError(f"{tool.name} has no image {image!r}: run `make image`, or give --build")
    return found.removeprefix("sha256:")[:12]


def repository_uri(account: Account, repository: str) -> str:
    """Return the URI of a repository, without a tag."""
    domain = "amazonaws.com.cn" if account.region.startswith("cn-") else "amazonaws.com"
    return f"{account.id}.dkr.ecr.{account.region}.{domain}/{repository}"


def ensure_repository(account: Account, repository: str) -> bool:
    """Make the repository if it is missing. Return whether it was. Tags are immutable, and pushes are scanned."""
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
    """Push a local image to ECR."""
    data = account.client("ecr").get_authorization_token()["authorizationData"][0]
    user, _, password = base64.b64decode(data["authorizationToken"]).decode().partition(":")
    tool.push(image, target, user, password)


def by_digest(account: Account, image: EcrImage) -> str | None:
    """Return the URI of the image by digest, which later pushes do not change; None if ECR has no such image."""
    try:
        details = _describe(account, image.repository, [image.id], image.account)
    except ClientError as error:
        if code_of(error) in ("ImageNotFoundException", "RepositoryNotFoundException"):
            return None
        raise
    return f"{image.base}@{details[0]['imageDigest']}"


def newest(account: Account, repository: str) -> str:
    """Return the URI of the newest image. Raise `DeployError` if there is none."""
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
    """Delete the repository with all its images. Return whether it existed.

    Raise `DeployError` if `push` did not make it.
    """
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
    options: dict[str, Any] = {"imageIds": list(ids)} if ids else {}
    options |= {"registryId": owner} if owner else {}
    return [item for page in pages.paginate(repositoryName=repository, **options) for item in page["imageDetails"]]


def _quiet(*command: str) -> str | None:
    """Return the output of a command, or None if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _run(command: list[str], password: str | None = None, cwd: Path | None = None) -> None:
    """Run a command with its output on stderr, so that stdout holds only the result."""
    done = subprocess.run(command, input=password, text=True, stdout=2, check=False, cwd=cwd)
    if done.returncode:
        raise DeployError(f"`{' '.join(command[:2])}` failed with exit code {done.returncode}; its output is above")
