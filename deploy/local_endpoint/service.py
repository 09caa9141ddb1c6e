"""The platform's part of a call: check it, choose the instance, forward it, read the headers of the reply.

Bodies pass unread between client and container.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

import httpx

from . import contract, faults
from .calls import ApiCall, EndpointReply, StreamedReply, checked_session
from .container_client import BrokenError, ContainerClient, Health
from .contract import Corners, PlatformLimits
from .pins import GoneError, Instance, SessionPins
from .routing import Router
from .selection import Selector

log = logging.getLogger(__name__)
Result = TypeVar("Result")


PING_EVERY_S = 0.5
# Sizes of parts that end inside lines and characters.
ODD_SIZES = (1, 5, 3, 17, 2, 61)


class EndpointService:
    """One endpoint over its instances. Used from one event loop."""

    def __init__(
        self,
        name: str,
        instances: list[Instance],
        corners: Corners | None = None,
        limits: PlatformLimits | None = None,
        clock: Callable[[], float] = time.time,
        *,
        cut_parts: bool = False,
        router: Router | None = None,
    ) -> None:
        """`clock` returns seconds since the epoch; sessions expire by it. `cut_parts`: cut streams at odd bytes."""
        self.name = name
        self.pins = SessionPins(instances, clock)
        self.limits = limits or PlatformLimits()
        self._corners = corners or Corners()
        self._cut_parts = cut_parts
        self.selector = Selector(self.pins, router or Router(), self._corners)
        self.containers = ContainerClient(self._corners)

    @property
    def logs(self) -> str:
        """The paths of the instances' logs."""
        return ", ".join(instance.logs for instance in self.pins.instances)

    async def close(self) -> None:
        """Close the connections to the instances."""
        await self.containers.close()

    async def watch(self) -> None:
        """Ping the instances until cancelled, as the platform's health checks do. A lost instance gets no calls.

        A lost instance that answers again is a new instance, without sessions.
        """
        while True:
            instances = list(self.pins.instances)
            healths = await asyncio.gather(*map(self.containers.ping, instances))
            for instance, health in zip(instances, healths, strict=True):
                if health is Health.LOST:
                    self._lose(instance)
                elif instance.gone:
                    if health is Health.HEALTHY:
                        self.pins.replace(instance)
                        log.warning("instance_replaced number=%d url=%s", instance.number, instance.url)
                else:
                    instance.draining = health is Health.DRAINING
            await asyncio.sleep(PING_EVERY_S)

    # --- the two calls ---

    async def invoke(self, call: ApiCall) -> EndpointReply:
        """Perform InvokeEndpoint. Raise `Fault`."""
        session = checked_session(call)
        try:
            async with asyncio.timeout(self.limits.answer_s):
                return await self.with_instance(
                    lambda: self.selector.choose(call, session), lambda instance: self._invoke(instance, call, session)
                )
        except TimeoutError:
            raise faults.no_answer_in_time(self.name, self.logs) from None

    async def invoke_stream(self, call: ApiCall) -> StreamedReply:
        """Perform InvokeEndpointWithResponseStream. Raise `Fault` before the first part."""
        session = checked_session(call)
        if session == contract.NEW_SESSION:
            raise faults.invalid("You can't create a stateful session by InvokeEndpointWithResponseStream.")
        deadline = asyncio.get_running_loop().time() + self.limits.stream_s
        try:
            async with asyncio.timeout_at(deadline):
                return await self.with_instance(
                    lambda: self.selector.choose(call, session),
                    lambda instance: self._invoke_stream(instance, call, session, deadline),
                )
        except TimeoutError:
            raise faults.no_answer_in_time(self.name, self.logs) from None

    async def with_instance(
        self, choose: Callable[[], Instance], work: Callable[[Instance], Awaitable[Result]]
    ) -> Result:
        """Do `work` on the instance of `choose`, which is called again if that instance is lost meanwhile."""
        while True:
            instance = choose()
            try:
                return await work(instance)
            except GoneError:
                self._lose(instance)
            except BrokenError as error:
                message = f'Received server error (0) from primary with message "{error}".'
                raise faults.no_answer(self.name, self.logs, message) from None

    async def _invoke(self, instance: Instance, call: ApiCall, session: str | None) -> EndpointReply:
        creating = session == contract.NEW_SESSION
        with self.pins.opening(instance) if creating else contextlib.nullcontext(), instance.serving():
            reply = await self.containers.send(instance, call, session)
            if not reply.is_success:
                raise _model_error(self.name, instance, reply, reply.content)
            headers = self._headers(reply, instance, "Content-Type")
            if creating:
                headers |= self._pin_announced(reply, instance)
            return EndpointReply(headers, reply.content)

    async def _invoke_stream(
        self, instance: Instance, call: ApiCall, session: str | None, deadline: float
    ) -> StreamedReply:
        reply = await self.containers.open_stream(instance, call, session)
        try:
            if not reply.is_success:
                body = await self.containers.read_body(instance, reply)
                raise _model_error(self.name, instance, reply, body)
        except BaseException:
            await reply.aclose()
            raise
        headers = self._headers(reply, instance, contract.STREAM_TYPE_HEADER)
        return StreamedReply(headers, self.parts(reply, instance, deadline))

    def parts(self, reply: httpx.Response, instance: Instance, deadline: float) -> AsyncGenerator[bytes, None]:
        """Return the chunks of a container's reply as parts, which raise `StreamFault`, and close the reply."""
        parts = self.containers.parts(instance, reply, deadline)
        return cut_at_odd_bytes(parts) if self._cut_parts else parts

    def _lose(self, instance: Instance) -> None:
        if not instance.gone:
            instance.lose()
            sessions = self.pins.open_sessions()[instance.number]
            log.warning("instance_gone number=%d url=%s sessions=%d", instance.number, instance.url, sessions)

    # --- the reply of a container ---

    def _headers(self, reply: httpx.Response, instance: Instance, type_header: str) -> dict[str, str]:
        """Return the headers of the reply to the client. Unpin a session that the container has closed."""
        headers = {contract.VARIANT_HEADER: contract.VARIANT}
        for theirs, ours in (
            ("Content-Type", type_header),
            (contract.ATTRIBUTES_HEADER, contract.ATTRIBUTES_HEADER),
            (contract.CLOSED_SESSION_HEADER, contract.CLOSED_SESSION_HEADER),
        ):
            if theirs in reply.headers:
                headers[ours] = reply.headers[theirs]
        closed = reply.headers.get(contract.CLOSED_SESSION_HEADER)
        if closed and self.pins.find(closed) is instance:
            self.pins.drop(closed)
        return headers

    def _pin_announced(self, reply: httpx.Response, instance: Instance) -> dict[str, str]:
        """Pin the session that the container has opened. Return the header that announces it to the client."""
        value = reply.headers.get(self._corners.announced_in, "")
        announced = contract.NEW_SESSION_VALUE.fullmatch(value)
        if not announced or len(value) > contract.ID_MAX_CHARS:
            log.warning("no_session_announced header=%s expected='<id>; Expires=<UTC>'", self._corners.announced_in)
            return {}
        self.pins.pin(announced[1], instance, contract.expires_at(announced[3]))
        return {contract.NEW_SESSION_HEADER: value}


async def cut_at_odd_bytes(parts: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Cut a body that arrives in parts into parts of `ODD_SIZES`, as SageMaker may cut it anywhere."""
    sizes = itertools.cycle(ODD_SIZES)
    size = next(sizes)
    held = b""
    async with contextlib.aclosing(parts):
        async for part in parts:
            held += part
            while len(held) > size:
                yield held[:size]
                held = held[size:]
                size = next(sizes)
    if held:
        yield held


def _model_error(endpoint: str, instance: Instance, reply: httpx.Response, body: bytes) -> faults.Fault:
    """Return the error for an error reply of a container."""
    return faults.model_error(endpoint, instance.logs, reply.status_code, body.decode(errors="replace"))
