"""Owns the HTTP side: SageMaker Runtime's paths, and how answers and errors look on the wire.

Signatures are accepted unchecked. Must not know instances or sessions; `service` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from . import contract, eventstream, faults, openai_chat
from .faults import Fault, StreamFault
from .service import Call, Service, StreamedAnswer

LOOPBACK = "127.0.0.1"
# A name that a browser's page could point here is none of ours.
HOSTS = [LOOPBACK, "localhost"]


def make_app(service: Service) -> Starlette:
    """The endpoint as an ASGI application."""
    chats = openai_chat.Chats(service)

    async def invoke(request: Request) -> Response:
        answer = await service.invoke(await _call(request, service, contract.INVOKE))
        return Response(answer.body, headers=answer.headers | _request_id())

    async def invoke_stream(request: Request) -> Response:
        answer = await service.invoke_stream(await _call(request, service, contract.INVOKE_STREAM))
        headers = answer.headers | _request_id()
        return StreamingResponse(_frames(answer), media_type=eventstream.CONTENT_TYPE, headers=headers)

    async def chat(request: Request) -> Response:
        try:
            asked = openai_chat.read(await _body(request, service.limits.body_bytes))
            if not asked.stream:
                return JSONResponse(await chats.answer(asked))
            return StreamingResponse(await chats.stream(asked), media_type="text/event-stream")
        except openai_chat.ChatError as error:
            return JSONResponse(error.body, error.status)
        except Fault as fault:
            error = openai_chat.ChatError.of(fault)
            return JSONResponse(error.body, error.status)

    async def ping(_: Request) -> Response:
        return Response()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.watch())
        yield
        await chats.close()
        watching.cancel()
        await service.close()

    routes = [
        Route("/endpoints/{name}/invocations", invoke, methods=["POST"]),
        Route("/endpoints/{name}/invocations-response-stream", invoke_stream, methods=["POST"]),
        Route("/endpoints/{name}/openai/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/ping", ping),
    ]
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    return Starlette(routes=routes, lifespan=lifespan, middleware=[guard], exception_handlers={Fault: _refusal})


def listen(port: int) -> socket.socket:
    """A loopback listener for uvicorn; port 0 takes a free one.

    Made by its protocol's number: only then does asyncio set TCP_NODELAY, without which each further part of a stream
    waits 40 ms for the client's delayed acknowledgement. `socket.create_server` leaves it out.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


async def _call(request: Request, service: Service, api: str) -> Call:
    name = request.path_params["name"]
    body = await _body(request, service.limits.body_bytes)
    if name != service.name:
        raise faults.invalid(f"Endpoint {name} of account {contract.ACCOUNT} not found.")
    return Call(api, request.headers, body)


async def _body(request: Request, most: int) -> bytes:
    """The whole body. One that is too large is read to its end all the same: a client that is still sending would
    see a broken connection instead of the answer.
    """
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            chunks.append(chunk)
    if size > most:
        raise faults.too_large(most)
    return b"".join(chunks)


async def _refusal(_: Request, fault: Fault) -> Response:
    return JSONResponse(fault.body, fault.status, headers={contract.ERROR_TYPE_HEADER: fault.kind} | _request_id())


def _request_id() -> dict[str, str]:
    return {contract.REQUEST_ID_HEADER: str(uuid.uuid4())}


async def _frames(answer: StreamedAnswer) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(answer.parts) as parts:
        try:
            async for part in parts:
                yield eventstream.payload_part(part)
        except StreamFault as fault:
            yield eventstream.stream_error(fault.body)
