"""HTTP traffic with the containers: filtered headers, and an error as soon as an instance is lost.

The instances have no HAProxy, so that its rule for content types is applied here (deploy/serve/sessions.cfg).
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import TypeVar

import httpx

from . import contract
from .calls import ApiCall
from .contract import Corners
from .faults import StreamFault
from .pins import GoneError, Instance

Result = TypeVar("Result")

PING_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S = 5.0


class Health(enum.Enum):
    """What an instance's /ping says. DRAINING: 404, it finishes its requests (deploy/serve/sessions.cfg)."""

    HEALTHY = enum.auto()
    DRAINING = enum.auto()
    LOST = enum.auto()


class BrokenError(Exception):
    """The connection of one request broke, but the instance still answers."""


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's transport, with an httpx error in every case in which the connection broke."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request. Return its reply before the body. Raise `httpx.TransportError`.

        With uvloop a connection that is reset while it is opened has no socket any more, which anyio 4.16 does not
        expect.
        """
        try:
            return await super().handle_async_request(request)
        except AttributeError as error:
            raise httpx.ConnectError("The connection was reset while it was opened.", request=request) from error


class ContainerClient:
    """Sends calls to instances. Raises `GoneError` if the instance is lost, `BrokenError` if one connection broke."""

    def __init__(self, corners: Corners) -> None:
        self._corners = corners
        pool = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        # The transport without its client: no default headers reach a container, and no time is spent on cookies and
        # redirects.
        self._http = _Transport(limits=pool, trust_env=False)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, instance: Instance, call: ApiCall, session: str | None) -> httpx.Response:
        """Send a call. Return the complete reply."""
        request = self._request(instance, call, session)
        return await self._unless_gone(instance, self._read_all(request))

    async def open_stream(self, instance: Instance, call: ApiCall, session: str | None) -> httpx.Response:
        """Send a call. Return the reply before its body; the caller closes it."""
        request = self._request(instance, call, session)
        return await self._unless_gone(instance, self._http.handle_async_request(request))

    async def open_openai(self, instance: Instance, method: str, path: str, call: ApiCall) -> httpx.Response:
        """Send an OpenAI request to `path` below the instance's base URL. Return the reply before its body."""
        headers = _passed_headers(call)
        within = {"timeout": {"connect": CONNECT_TIMEOUT_S}}
        url = f"{instance.openai_url}/{path}"
        content = call.body if method == "POST" else None
        request = httpx.Request(method, url, headers=headers, content=content, extensions=within)
        return await self._unless_gone(instance, self._http.handle_async_request(request))

    async def read_metrics(self, instance: Instance) -> httpx.Response:
        """Return the reply of the page of metrics that SageMaker reads."""
        within = {"timeout": httpx.Timeout(PING_TIMEOUT_S).as_dict()}
        return await self._read_all(httpx.Request("GET", instance.metrics_url, extensions=within))

    async def read_body(self, instance: Instance, reply: httpx.Response) -> bytes:
        """Return the body of a streamed reply."""
        return await self._unless_gone(instance, reply.aread())

    async def parts(self, instance: Instance, reply: httpx.Response, deadline: float) -> AsyncGenerator[bytes, None]:
        """Yield each chunk of a streamed body as a part, and close the reply. Raise `StreamFault`.

        `deadline` is a time of the event loop.
        """
        chunks = reply.aiter_raw()
        try:
            with instance.serving():
                while True:
                    async with asyncio.timeout_at(deadline):
                        part = await self._unless_gone(instance, _next(chunks))
                    if part is None:
                        return
                    yield part
        except TimeoutError:
            message = "The model did not finish sending the response within the time allowed."
            raise StreamFault("ModelInvocationTimeExceeded", message) from None
        except (GoneError, BrokenError):
            message = "The connection between the client and the model was reset or closed."
            raise StreamFault("StreamBroken", message) from None
        finally:
            await reply.aclose()

    async def ping(self, instance: Instance) -> Health:
        """Return the health of an instance by its /ping.

        A timeout counts as healthy: on a busy machine a slow instance is not dead.
        """
        try:
            within = {"timeout": httpx.Timeout(PING_TIMEOUT_S).as_dict()}
            reply = await self._read_all(httpx.Request("GET", f"{instance.url}/ping", extensions=within))
        except httpx.TimeoutException:
            return Health.HEALTHY
        except httpx.TransportError:
            return Health.LOST
        if reply.status_code == httpx.codes.NOT_FOUND:
            return Health.DRAINING
        return Health.HEALTHY if reply.is_success else Health.LOST

    def _request(self, instance: Instance, call: ApiCall, session: str | None) -> httpx.Request:
        headers = _passed_headers(call)
        headers[contract.FORWARDED_API_HEADER] = call.api
        if call.api == contract.INVOKE_STREAM:
            headers.pop("Accept", None)
            if contract.STREAM_ACCEPT_HEADER in call.headers:
                headers["Accept"] = call.headers[contract.STREAM_ACCEPT_HEADER]
        if session == contract.NEW_SESSION:
            session = {"absent": None, "empty": "", "literal": session}[self._corners.new_session]
        if session is not None:
            headers[contract.SESSION_HEADER] = session
        within = {"timeout": {"connect": CONNECT_TIMEOUT_S}}
        return httpx.Request("POST", _invocations(instance.url), headers=headers, content=call.body, extensions=within)

    async def _read_all(self, request: httpx.Request) -> httpx.Response:
        async with contextlib.aclosing(await self._http.handle_async_request(request)) as reply:
            await reply.aread()
            return reply

    async def _unless_gone(self, instance: Instance, work: Awaitable[Result]) -> Result:
        """Return the result of `work`, or raise as soon as the instance is lost."""
        try:
            async with instance.waiting():
                return await work
        except httpx.TransportError as error:
            if await self.ping(instance) is not Health.LOST:
                raise BrokenError(type(error).__name__) from error
            raise GoneError from error


def _passed_headers(call: ApiCall) -> dict[str, str]:
    """Return the headers that SageMaker passes, with an inference ID, and the content type as HAProxy passes it."""
    headers = {name: call.headers[name] for name in contract.TO_CONTAINER if name in call.headers}
    if "Content-Type" in headers:
        headers[contract.CONTENT_TYPE_HEADER] = headers["Content-Type"]
    headers["Content-Type"] = contract.JSON_TYPE
    headers.setdefault(contract.INFERENCE_HEADER, str(uuid.uuid4()))
    return headers


@functools.cache
def _invocations(instance_url: str) -> httpx.URL:
    return httpx.URL(f"{instance_url}/invocations")


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)
