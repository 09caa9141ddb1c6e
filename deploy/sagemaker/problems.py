"""Explain errors of AWS in one line, with the remedy."""

from __future__ import annotations

import textwrap

from botocore import exceptions as aws

THROTTLED = {
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "TooManyRequestsException",
    "RequestLimitExceeded",
    "SlowDown",
    "RequestThrottled",
}
DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthorizationError"}
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
UNKNOWN_KEY = {"InvalidClientTokenId", "UnrecognizedClientException", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
SIGN_IN = "run `aws configure` or `aws sso login`, or choose a profile: --profile NAME"


class DeployError(Exception):
    """A command fails. The message is for the person at the terminal."""


def code_of(error: aws.ClientError) -> str:
    """Return AWS's code of the error."""
    return error.response.get("Error", {}).get("Code", "")


def message_of(error: aws.ClientError) -> str:
    """Return AWS's message."""
    return error.response.get("Error", {}).get("Message", "") or "no reason given"


def explain(error: Exception) -> str:
    """Return one line for an error of boto3."""
    if isinstance(error, aws.ClientError):
        return _explain_refusal(error)
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError):
        return f"no AWS credentials: {SIGN_IN}"
    if isinstance(error, aws.SSOError | aws.TokenRetrievalError | aws.CredentialRetrievalError):
        return f"the AWS credentials cannot be used ({_line(error)}): {SIGN_IN}"
    if isinstance(error, aws.NoRegionError):
        return "no AWS region: give --region, set AWS_REGION, or run `aws configure`"
    if isinstance(error, aws.ProfileNotFound):
        return f"{_line(error)}; `aws configure list-profiles` lists the profiles"
    if isinstance(error, aws.HTTPClientError | aws.ConnectionError):
        return f"AWS cannot be reached: {_line(error)}. Run the same command again to resume"
    return _line(error)


def _explain_refusal(error: aws.ClientError) -> str:
    code = code_of(error)
    operation = error.operation_name
    if code in THROTTLED:
        return f"AWS throttles {operation} ({code}): wait a minute, then run the same command again to resume"
    if code in EXPIRED:
        return f"the AWS credentials have expired: {SIGN_IN}"
    if code in UNKNOWN_KEY:
        return f"AWS does not know these credentials ({code}): {SIGN_IN}"
    if code in DENIED:
        return f"not allowed to {operation}: {_line(message_of(error))} (docs/sagemaker.md has the required policy)"
    return f"{operation} failed: {code}: {_line(message_of(error))}"


def _line(text: object) -> str:
    return textwrap.shorten(str(text), 400, placeholder=" ...")
