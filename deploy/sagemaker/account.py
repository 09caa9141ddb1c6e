"""Whose account it is, and what things are called in it. Credentials, profile and region come as for the AWS CLI: from
the environment, ~/.aws, SSO or the instance; none is ever taken as an argument.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import boto3
from botocore.config import Config

MADE_BY = {"Key": "made-by", "Value": "llava-deploy"}  # what carries this tag may be deleted by `down`
SESSION_CALLS = Config(
    read_timeout=70, retries={"total_max_attempts": 1}
)  # a repeated call would open a second session


class Account:
    """An AWS account and region as seen with the caller's credentials, and the names that belong to one endpoint."""

    def __init__(self, name: str, session: boto3.Session) -> None:
        self.name = name
        self.session = session

    @cache  # noqa: B019 - an account lives as long as the command
    def client(self, service: str, config: Config | None = None) -> Any:
        """A boto3 client; making one takes a while, so each is made once."""
        return self.session.client(service, config=config)

    @cached_property
    def region(self) -> str:
        return self.client("sts").meta.region_name

    @cached_property
    def id(self) -> str:
        """The account's number. Every errand but a chat asks for it first, so that missing credentials show at once."""
        return self.client("sts").get_caller_identity()["Account"]

    @property
    def bucket(self) -> str:
        """Where models go when no other bucket is named."""
        return f"llava-sessions-{self.id}-{self.region}"

    @property
    def log_group(self) -> str:
        """Where SageMaker sends what the containers print."""
        return f"/aws/sagemaker/Endpoints/{self.name}"

    @property
    def metrics_namespace(self) -> str:
        """As in deploy/sagemaker/endpoint.yaml."""
        return f"LLaVASessions/{self.name}"
