"""Calls of SageMaker Runtime and their replies, and the checks of a call that need no instance."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from . import contract, faults


@dataclass(frozen=True)
class ApiCall:
    """One call of `api`. `headers` is case-insensitive."""

    api: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class EndpointReply:
    """A complete reply."""

    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class StreamedReply:
    """A reply in parts. `parts` raises `StreamFault` if it breaks off."""

    headers: dict[str, str]
    parts: AsyncGenerator[bytes, None]


def checked_session(call: ApiCall) -> str | None:
    """Check the call against the API's constraints. Return its session ID, if any. Raise `Fault`."""
    for name, member, most in (
        (contract.ATTRIBUTES_HEADER, "customAttributes", contract.ATTRIBUTES_MAX_CHARS),
        (contract.INFERENCE_HEADER, "inferenceId", contract.INFERENCE_ID_MAX_CHARS),
        (contract.PREFIX_AWARE_HEADER, "prefixAwareId", contract.PREFIX_AWARE_ID_MAX_CHARS),
        (contract.SESSION_HEADER, "sessionId", contract.ID_MAX_CHARS),
    ):
        if len(call.headers.get(name, "")) > most:
            raise _constraint(member, f"Member must have length less than or equal to {most}")
    for name in contract.TO_CONTAINER:
        if not call.headers.get(name, "").isascii():
            raise _constraint(name, "Member must be ASCII")
    session = call.headers.get(contract.SESSION_HEADER)
    if session is None or session == contract.NEW_SESSION or contract.SESSION_ID.fullmatch(session):
        return session
    pattern = f"^({contract.NEW_SESSION})$|^{contract.SESSION_ID.pattern}$"
    raise _constraint("sessionId", f"Member must satisfy regular expression pattern: {pattern}")


def _constraint(member: str, constraint: str) -> faults.Fault:
    return faults.invalid(
        f"1 validation error detected: Value at '{member}' failed to satisfy constraint: {constraint}"
    )
