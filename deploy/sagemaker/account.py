"""An AWS account and region, and the names of the resources of one endpoint.

Credentials, profile and region come from the same sources as for the AWS CLI: the environment, ~/.aws, SSO or the
instance. Credentials are never arguments.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import boto3
from botocore.config import Config

MADE_BY = {"Key": "made-by", "Value": "llava-deploy"}  # `down` deletes only resources with this tag
# No retries: a repeated call could open a second session.
SESSION_CALLS = Config(read_timeout=70, retries={"total_max_attempts": 1})


class Account:
    """An AWS account and region with the caller's credentials, and the names of the resources of one endpoint.

    An account is offline in a dry run without credentials: no call is made, and number and region are placeholders.
    """

    def __init__(self, name: str, session: boto3.Session, *, is_dry_run: bool = False) -> None:
        self.name = name
        self.session = session
        self.is_offline = is_dry_run and session.get_credentials() is None

    @cache  # noqa: B019 - an account exists as long as the command runs
    def client(self, service: str, config: Config | None = None) -> Any:
        """Return a boto3 client. Each is made once, since making one is slow."""
        return self.session.client(service, config=config)

    @cached_property
    def region(self) -> str:
        """The region of all calls."""
        if self.is_offline:
            return self.session.region_name or "<region>"
        return self.client("sts").meta.region_name

    @cached_property
    def id(self) -> str:
        """The account's number. Commands except `invoke` read it first, so that missing credentials fail at once."""
        return "<account>" if self.is_offline else self.client("sts").get_caller_identity()["Account"]

    @property
    def bucket(self) -> str:
        """The default bucket for models."""
        return f"llava-sessions-{self.id}-{self.region}"

    @property
    def log_group(self) -> str:
        """The log group that receives the output of the containers."""
        return f"/aws/sagemaker/Endpoints/{self.name}"

    @property
    def metrics_namespace(self) -> str:
        """The CloudWatch namespace in deploy/sagemaker/endpoint.yaml."""
        return f"LLaVASessions/{self.name}"
