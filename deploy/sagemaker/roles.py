"""Check a role for the containers that the stack does not make."""

from __future__ import annotations

import json
from urllib.parse import unquote

from botocore.exceptions import ClientError

from .account import Account
from .problems import DeployError, code_of


def check_role(account: Account, arn: str) -> None:
    """Raise `DeployError` if the role is missing or SageMaker may not assume it.

    Without permission to read the role, it is not checked.
    """
    name = arn.rpartition("/")[2]
    if not arn.startswith("arn:") or ":role/" not in arn:
        raise DeployError(f"`--role` must be arn:aws:iam::<account>:role/<name>, got {arn!r}")
    try:
        role = account.client("iam").get_role(RoleName=name)["Role"]
    except ClientError as error:
        if code_of(error) == "NoSuchEntity":
            raise DeployError(
                f"there is no role {name!r} in account {account.id}; omit --role to have one made"
            ) from None
        if code_of(error) == "AccessDenied":
            return
        raise
    policy = role["AssumeRolePolicyDocument"]
    policy = json.loads(unquote(policy)) if isinstance(policy, str) else policy
    if "sagemaker.amazonaws.com" not in json.dumps(policy):
        raise DeployError(f"the role {name!r} does not let sagemaker.amazonaws.com assume it (its trust policy)")
