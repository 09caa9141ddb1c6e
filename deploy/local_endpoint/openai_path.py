"""SageMaker's OpenAI-compatible path: requests pass to the container's /v1/..., and its replies pass back unchanged.

There are no sessions on this path: the routing strategy chooses the instance of each request. Documented are the path
of chat completions, the bearer token and that replies pass unchanged. Undocumented, and chosen here: /v1/models, the
form of the platform's own errors, and the time limits, which are those of /invocations.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from . import contract, faults
from .calls import ApiCall
from .faults import Fault
from .pins import Instance
from .service import EndpointService

# The headers of a container's reply that reach the client.
PASSED_BACK = ("Content-Type", "Retry-After", "Cache-Control")


@dataclass(frozen=True)
class OpenAIReply:
    """A container's reply. `parts` are of a streamed body; they raise `StreamFault` if the body breaks off."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    parts: AsyncGenerator[bytes, None] | None = None


def check_authorization(call: ApiCall) -> None:
    """Raise `Fault` if the call has neither a bearer token nor a SigV4 signature. Only the form is checked."""
    scheme, _, value = call.headers.get("Authorization", "").partition(" ")
    is_bearer = scheme.lower() == "bearer" and value.strip()
    if not is_bearer and not (scheme == contract.SIGV4 and "Credential=" in value):
        raise Fault(403, "AccessDeniedException", "The request must have a bearer token or a SigV4 signature.")


def error_body(fault: Fault) -> dict[str, Any]:
    """Return the platform's own error in OpenAI's form."""
    kind = "server_error" if fault.status >= 500 or fault.status == 424 else "invalid_request_error"
    return {"error": {"message": fault.body["Message"], "type": kind, "param": None, "code": fault.kind}}


class OpenAIPath:
    """The path of one endpoint. Used from one event loop."""

    def __init__(self, service: EndpointService) -> None:
        self._service = service

    async def send(self, method: str, path: str, call: ApiCall) -> OpenAIReply:
        """Send a call to `path` of an instance. Raise `Fault` for the platform's own errors."""
        check_authorization(call)
        deadline = asyncio.get_running_loop().time() + self._service.limits.stream_s
        try:
            async with asyncio.timeout(self._service.limits.answer_s):
                return await self._service.with_instance(
                    lambda: self._service.selector.choose_for_messages(call.body),
                    lambda instance: self._send(instance, method, path, call, deadline),
                )
        except TimeoutError:
            raise faults.no_answer_in_time(self._service.name, self._service.logs) from None

    async def _send(self, instance: Instance, method: str, path: str, call: ApiCall, deadline: float) -> OpenAIReply:
        with instance.serving():
            reply = await self._service.containers.open_openai(instance, method, path, call)
            headers = {name: reply.headers[name] for name in PASSED_BACK if name in reply.headers}
            if reply.is_success and headers.get("Content-Type", "").startswith(contract.EVENT_STREAM_TYPE):
                return OpenAIReply(reply.status_code, headers, parts=self._service.parts(reply, instance, deadline))
            try:
                body = await self._service.containers.read_body(instance, reply)
            finally:
                await reply.aclose()
            return OpenAIReply(reply.status_code, headers, body)
