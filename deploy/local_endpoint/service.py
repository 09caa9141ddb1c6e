"""What SageMaker does with a call: checks it, finds the instance, filters the headers, reads the container's reply.

Owns the traffic with the instances. Must not know how a call came in or how its answer is sent (`app`), and never reads
a body: that is between client and container.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import httpx

from . import contract, faults
from .contract import Corners, Limits
from .faults import StreamFault
from .pins import GoneError, Instance, Pins

log = logging.getLogger(__name__)
Result = TypeVar("Result")

PING_EVERY_S = 0.5
PING_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S = 5.0
_TIMED_OUT = "Your invocation timed out while waiting for a response from container primary."


@dataclass(frozen=True)
class Call:
    """One API call. `headers` finds names in any case."""

    api: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class StreamedAnswer:
    """An answer that comes in parts. `parts` raises `StreamFault` when it breaks off."""

    headers: dict[str, str]
    parts: AsyncIterator[bytes]


class _BrokenError(Exception):
    """The instance is there, but this request's connection broke."""


class Service:
    """One endpoint over its instances."""

    def __init__(
        self,
        name: str,
        instances: list[Instance],
        corners: Corners | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: seconds since the epoch, by which sessions expire."""
        self.name = name
        self.pins = Pins(instances, clock)
        self.limits = limits or Limits()
        self._corners = corners or Corners()
        pool = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        # The transport without its client: a container sees nothing of a client's headers, and nobody pays for its
        # cookies and redirects.
        self._http = httpx.AsyncHTTPTransport(limits=pool, trust_env=False)

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.aclose()

    async def watch(self) -> None:
        """Look after the instances for ever, as the platform's health checks do: one that is gone gets no calls."""
        while True:
            living = [instance for instance in self.pins.instances if not instance.gone]
            for instance, healthy in zip(living, await asyncio.gather(*map(self._ping, living)), strict=True):
                if not healthy:
                    self._lose(instance)
            await asyncio.sleep(PING_EVERY_S)

    # --- the two calls ---

    async def invoke(self, call: Call) -> Answer:
        """InvokeEndpoint. Raises `Fault`."""
        session = self._checked_session(call)
        try:
            async with asyncio.timeout(self.limits.answer_s):
                return await self._on_an_instance(session, lambda instance: self._invoke(instance, call, session))
        except TimeoutError:
            raise self._no_answer(_TIMED_OUT) from None

    async def invoke_stream(self, call: Call) -> StreamedAnswer:
        """InvokeEndpointWithResponseStream. Raises `Fault` as long as nothing was sent."""
        session = self._checked_session(call)
        if session == contract.NEW_SESSION:
            raise faults.invalid("You can't create a stateful session by InvokeEndpointWithResponseStream.")
        deadline = asyncio.get_running_loop().time() + self.limits.stream_s
        try:
            async with asyncio.timeout_at(deadline):
                return await self._on_an_instance(
                    session, lambda instance: self._invoke_stream(instance, call, session, deadline)
                )
        except TimeoutError:
            raise self._no_answer(_TIMED_OUT) from None

    async def _on_an_instance(self, session: str | None, work: Callable[[Instance], Awaitable[Result]]) -> Result:
        while True:
            instance = self._choose(session)
            try:
                return await work(instance)
            except GoneError:
                self._lose(instance)  # and choose again: what the corner says, or another instance
            except _BrokenError as error:
                said = f'Received server error (0) from primary with message "{error}".'
                raise self._no_answer(said) from None

    async def _invoke(self, instance: Instance, call: Call, session: str | None) -> Answer:
        request = self._request(instance, call, session)
        creating = session == contract.NEW_SESSION
        with self.pins.opening(instance) if creating else contextlib.nullcontext():
            reply = await self._unless_gone(instance, self._whole(request))
            self._check(reply, reply.content, instance)
            return Answer(self._heads(reply, instance, creating, "Content-Type"), reply.content)

    async def _invoke_stream(
        self, instance: Instance, call: Call, session: str | None, deadline: float
    ) -> StreamedAnswer:
        request = self._request(instance, call, session)
        reply = await self._unless_gone(instance, self._http.handle_async_request(request))
        try:
            if not reply.is_success:
                self._check(reply, await self._unless_gone(instance, reply.aread()), instance)
        except BaseException:
            await reply.aclose()
            raise
        heads = self._heads(reply, instance, False, contract.STREAM_TYPE_HEADER)
        return StreamedAnswer(heads, self._parts(reply, instance, deadline))

    async def _parts(self, reply: httpx.Response, instance: Instance, deadline: float) -> AsyncIterator[bytes]:
        chunks = reply.aiter_raw()
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    part = await self._unless_gone(instance, _next(chunks))
                if part is None:
                    return
                yield part
        except TimeoutError:
            message = "The model did not finish sending the response within the time allowed."
            raise StreamFault("ModelInvocationTimeExceeded", message) from None
        except (GoneError, _BrokenError):
            message = "The connection between the client and the model was reset or closed."
            raise StreamFault("StreamBroken", message) from None
        finally:
            await reply.aclose()

    # --- where a call goes ---

    def _checked_session(self, call: Call) -> str | None:
        """The call's session id, once all that the API restricts is known to be right."""
        for name, member, most in (
            (contract.ATTRIBUTES_HEADER, "customAttributes", contract.ATTRIBUTES_MAX_CHARS),
            (contract.INFERENCE_HEADER, "inferenceId", contract.INFERENCE_ID_MAX_CHARS),
            (contract.SESSION_HEADER, "sessionId", contract.ID_MAX_CHARS),
        ):
            if len(call.headers.get(name, "")) > most:
                raise _constraint(member, f"Member must have length less than or equal to {most}")
        for name in contract.TO_CONTAINER:
            if not call.headers.get(name, "").isascii():
                raise _constraint(name, "Member must be ASCII")
        session = call.headers.get(contract.SESSION_HEADER)
        if session in (None, contract.NEW_SESSION) or contract.SESSION_ID.fullmatch(session):
            return session
        pattern = f"^({contract.NEW_SESSION})$|^{contract.SESSION_ID.pattern}$"
        raise _constraint("sessionId", f"Member must satisfy regular expression pattern: {pattern}")

    def _choose(self, session: str | None) -> Instance:
        if session is None or session == contract.NEW_SESSION:
            return self._placed()
        instance = self.pins.find(session)
        if instance is None:
            raise faults.unknown_session(session)
        return self._after_loss(session) if instance.gone else instance

    def _after_loss(self, session: str) -> Instance:
        """What becomes of a call for a session whose instance is gone."""
        if self._corners.lost_instance == "503":
            raise faults.unavailable("The instance of this session is not available.")
        if self._corners.lost_instance == "400":
            self.pins.drop(session)
            raise faults.unknown_session(session)
        instance = self._placed()
        self.pins.move(session, instance)
        return instance

    def _placed(self) -> Instance:
        instance = self.pins.place()
        if instance is None:
            raise faults.unavailable("No instance of the endpoint is healthy.")
        return instance

    def _lose(self, instance: Instance) -> None:
        if not instance.gone:
            instance.lose()
            sessions = self.pins.open_sessions()[instance.number]
            log.warning("instance_gone number=%d url=%s sessions=%d", instance.number, instance.url, sessions)

    # --- to the container and back ---

    def _request(self, instance: Instance, call: Call, session: str | None) -> httpx.Request:
        headers = {name: call.headers[name] for name in contract.TO_CONTAINER if name in call.headers}
        headers.setdefault(contract.INFERENCE_HEADER, str(uuid.uuid4()))
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

    async def _whole(self, request: httpx.Request) -> httpx.Response:
        """The reply with all its body."""
        async with contextlib.aclosing(await self._http.handle_async_request(request)) as reply:
            await reply.aread()
            return reply

    async def _unless_gone(self, instance: Instance, work: Awaitable[Result]) -> Result:
        """The result of `work`, or an exception as soon as the instance is known to be gone."""
        try:
            async with instance.waiting():
                return await work
        except httpx.TransportError as error:
            if await self._ping(instance):
                raise _BrokenError(type(error).__name__) from error
            raise GoneError from error

    async def _ping(self, instance: Instance) -> bool:
        """Whether the instance is there. A slow one is: on a busy laptop nothing is dead for being late."""
        try:
            within = {"timeout": httpx.Timeout(PING_TIMEOUT_S).as_dict()}
            reply = await self._whole(httpx.Request("GET", f"{instance.url}/ping", extensions=within))
        except httpx.TimeoutException:
            return True
        except httpx.TransportError:
            return False
        return reply.is_success

    def _check(self, reply: httpx.Response, body: bytes, instance: Instance) -> None:
        if not reply.is_success:
            said = body.decode(errors="replace")
            raise faults.model_error(self.name, instance.logs, reply.status_code, said)

    def _heads(self, reply: httpx.Response, instance: Instance, creating: bool, type_header: str) -> dict[str, str]:
        """What the client sees of the container's headers; pins and unpins on the way."""
        heads = {contract.VARIANT_HEADER: contract.VARIANT}
        for theirs, ours in (
            ("Content-Type", type_header),
            (contract.ATTRIBUTES_HEADER, contract.ATTRIBUTES_HEADER),
            (contract.CLOSED_SESSION_HEADER, contract.CLOSED_SESSION_HEADER),
        ):
            if theirs in reply.headers:
                heads[ours] = reply.headers[theirs]
        closed = reply.headers.get(contract.CLOSED_SESSION_HEADER)
        if closed and self.pins.find(closed) is instance:
            self.pins.drop(closed)
        if creating:
            heads |= self._pin_announced(reply, instance)
        return heads

    def _pin_announced(self, reply: httpx.Response, instance: Instance) -> dict[str, str]:
        value = reply.headers.get(self._corners.announced_in, "")
        announced = contract.NEW_SESSION_VALUE.fullmatch(value)
        if not announced or len(value) > contract.ID_MAX_CHARS:
            log.warning("no_session_announced header=%s wanted='<id>; Expires=<UTC>'", self._corners.announced_in)
            return {}
        self.pins.pin(announced[1], instance, contract.expires_at(announced[3]))
        return {contract.NEW_SESSION_HEADER: value}

    def _no_answer(self, message: str) -> faults.Fault:
        logs = ", ".join(instance.logs for instance in self.pins.instances)
        return faults.no_answer(self.name, logs, message)


@functools.cache
def _invocations(instance_url: str) -> httpx.URL:
    return httpx.URL(f"{instance_url}/invocations")


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)


def _constraint(member: str, constraint: str) -> faults.Fault:
    return faults.invalid(
        f"1 validation error detected: Value at '{member}' failed to satisfy constraint: {constraint}"
    )
