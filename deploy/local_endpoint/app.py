"""The HTTP server: SageMaker Runtime's paths, replies and errors. Signatures are not checked."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from . import contract, eventstream, faults, openai_chat
from .calls import ApiCall, StreamedReply
from .faults import Fault, StreamFault
from .service import EndpointService

LOOPBACK = "127.0.0.1"
# Other names are refused: a web page could resolve its own name to this machine.
HOSTS = [LOOPBACK, "localhost"]
EXPOSED = ["Retry-After", contract.NEW_SESSION_HEADER, contract.CLOSED_SESSION_HEADER, contract.ERROR_TYPE_HEADER]


def make_app(service: EndpointService, origins: Sequence[str] = ()) -> Starlette:
    """Return the endpoint as an ASGI application. Web pages of `origins` may call it."""
    conversations = openai_chat.Conversations(service)

    async def invoke(request: Request) -> Response:
        answer = await service.invoke(await _call(request, service, contract.INVOKE))
        return Response(answer.body, headers=answer.headers | _request_id())

    async def invoke_stream(request: Request) -> Response:
        answer = await service.invoke_stream(await _call(request, service, contract.INVOKE_STREAM))
        headers = answer.headers | _request_id()
        return StreamingResponse(_frames(answer), media_type=eventstream.CONTENT_TYPE, headers=headers)

    async def chat(request: Request) -> Response:
        try:
            chat_request = openai_chat.parse_request(await _body(request, service.limits.body_bytes))
            if not chat_request.stream:
                return JSONResponse(await conversations.answer(chat_request))
            return StreamingResponse(await conversations.stream(chat_request), media_type="text/event-stream")
        except openai_chat.OpenAIError as error:
            return JSONResponse(error.body, error.status)
        except Fault as fault:
            refusal = openai_chat.OpenAIError.of(fault)
            return JSONResponse(refusal.body, refusal.status, _retry_after(fault))

    async def ping(_: Request) -> Response:
        return Response()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.watch())
        yield
        await conversations.close()
        watching.cancel()
        await service.close()

    routes = [
        Route("/endpoints/{name}/invocations", invoke, methods=["POST"]),
        Route("/endpoints/{name}/invocations-response-stream", invoke_stream, methods=["POST"]),
        Route("/endpoints/{name}/openai/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/ping", ping),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)]
    if origins:
        cors = {"allow_origins": origins, "allow_methods": ["POST"], "allow_headers": ["*"], "expose_headers": EXPOSED}
        middleware.append(Middleware(CORSMiddleware, **cors))
    return Starlette(routes=routes, lifespan=lifespan, middleware=middleware, exception_handlers={Fault: _refusal})


def server_config(app: Starlette, *, log_level: str, timeout_graceful_shutdown: int) -> uvicorn.Config:
    """Return uvicorn's configuration. Its other parser, httptools, loses the body of a request that offers HTTP/2."""
    return uvicorn.Config(
        app, http="h11", log_level=log_level, access_log=False, timeout_graceful_shutdown=timeout_graceful_shutdown
    )


def listen(port: int) -> socket.socket:
    """Return a loopback listener for uvicorn. Port 0 takes a free port.

    The socket is made with its protocol number: only then does asyncio set TCP_NODELAY. Without it, each part of a
    stream waits 40 ms for the client's delayed acknowledgement. `socket.create_server` omits the number.
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


async def _call(request: Request, service: EndpointService, api: str) -> ApiCall:
    name = request.path_params["name"]
    body = await _body(request, service.limits.body_bytes)
    if name != service.name:
        raise faults.invalid(f"Endpoint {name} of account {contract.ACCOUNT} not found.")
    return ApiCall(api, request.headers, body)


async def _body(request: Request, most: int) -> bytes:
    """Return the whole body. Raise `Fault` if it is too large.

    Such a body is read to its end, because a client that is still sending would see a broken connection instead of the
    reply.
    """
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            chunks.append(chunk)
    if size > most:
        raise faults.too_large(most)
    return b"".join(chunks)


async def _refusal(_: Request, fault: Exception) -> Response:
    assert isinstance(fault, Fault)
    return JSONResponse(fault.body, fault.status, headers={contract.ERROR_TYPE_HEADER: fault.kind} | _request_id())


def _request_id() -> dict[str, str]:
    return {contract.REQUEST_ID_HEADER: str(uuid.uuid4())}


def _retry_after(fault: Fault) -> dict[str, str]:
    return {} if fault.retry_after is None else {"Retry-After": fault.retry_after}


async def _frames(answer: StreamedReply) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(answer.parts) as parts:
        try:
            async for part in parts:
                yield eventstream.payload_part(part)
        except StreamFault as fault:
            yield eventstream.stream_error(fault.body)
