"""The HTTP server: SageMaker Runtime's paths, replies and errors. Signatures are not checked."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from . import contract, eventstream, faults, openai_path
from .calls import ApiCall, StreamedReply
from .faults import Fault, StreamFault
from .openai_path import OpenAIPath
from .pins import Instance
from .service import EndpointService

LOOPBACK = "127.0.0.1"
# Other names are refused: a web page could resolve its own name to this machine.
HOSTS = [LOOPBACK, "localhost"]
EXPOSED = ["Retry-After", contract.NEW_SESSION_HEADER, contract.CLOSED_SESSION_HEADER, contract.ERROR_TYPE_HEADER]


# /v1 is for clients of this machine's endpoint only; SageMaker has no such path.
OPENAI_BASES = (
    "/endpoints/{name}/openai/v1",
    "/endpoints/{name}/inference-components/{component}/openai/v1",
    "/v1",
)


def make_app(service: EndpointService, origins: Sequence[str] = ()) -> Starlette:
    """Return the endpoint as an ASGI application. Web pages of `origins` may call it."""

    async def invoke(request: Request) -> Response:
        answer = await service.invoke(await _call(request, service, contract.INVOKE))
        return Response(answer.body, headers=answer.headers | _request_id())

    async def invoke_stream(request: Request) -> Response:
        answer = await service.invoke_stream(await _call(request, service, contract.INVOKE_STREAM))
        headers = answer.headers | _request_id()
        return StreamingResponse(_frames(answer), media_type=eventstream.CONTENT_TYPE, headers=headers)

    async def ping(_: Request) -> Response:
        return Response()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.watch())
        yield
        watching.cancel()
        await service.close()

    routes = [
        Route("/endpoints/{name}/invocations", invoke, methods=["POST"]),
        Route("/endpoints/{name}/invocations-response-stream", invoke_stream, methods=["POST"]),
        *_openai_routes(service),
        *_instance_routes(service),
        Route("/ping", ping),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)]
    if origins:
        methods = ["GET", "POST"]
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=methods,
                allow_headers=["*"],
                expose_headers=EXPOSED,
            )
        )
    handlers = {Fault: _refusal, ClientDisconnect: _ignore}
    return Starlette(routes=routes, lifespan=lifespan, middleware=middleware, exception_handlers=handlers)


def _openai_routes(service: EndpointService) -> list[Route]:
    """Return the routes of the OpenAI-compatible path."""
    openai = OpenAIPath(service)

    async def pass_openai(request: Request) -> Response:
        path = request.url.path.rpartition("/v1/")[2]
        try:
            call = await _call(request, service, contract.OPENAI)
            reply = await openai.send(request.method, path, call)
        except Fault as fault:
            headers = {contract.ERROR_TYPE_HEADER: fault.kind} | _request_id()
            return JSONResponse(openai_path.error_body(fault), fault.status, headers=headers)
        headers = reply.headers | _request_id()
        if reply.parts is None:
            return Response(reply.body, reply.status, headers=headers)
        return StreamingResponse(_chunks(reply.parts), reply.status, headers=headers)

    routes = []
    for base in OPENAI_BASES:
        routes.append(Route(f"{base}/chat/completions", pass_openai, methods=["POST"]))
        routes += [Route(f"{base}/{path}", pass_openai) for path in ("models", "models/{model}")]
    return routes


def _instance_routes(service: EndpointService) -> list[Route]:
    """Return the routes that show the instances and their metrics. SageMaker has none of them."""

    async def instances(_: Request) -> Response:
        return JSONResponse([_facts(instance) for instance in service.pins.instances])

    async def metrics(request: Request) -> Response:
        return await _metrics(service, request.path_params["number"])

    return [Route("/instances", instances), Route("/instances/{number:int}/metrics", metrics)]


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
    name = request.path_params.get("name", service.name)
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


async def _ignore(_: Request, __: Exception) -> Response:
    """Return a reply that no client receives: the client has left before its request was whole."""
    return Response(status_code=400)


def _request_id() -> dict[str, str]:
    return {contract.REQUEST_ID_HEADER: str(uuid.uuid4())}


def _facts(instance: Instance) -> dict[str, object]:
    return {"number": instance.number, "url": instance.url, "metrics_url": instance.metrics_url, "gone": instance.gone}


async def _metrics(service: EndpointService, number: int) -> Response:
    """Return what SageMaker would read from an instance's page of metrics."""
    found = [instance for instance in service.pins.instances if instance.number == number]
    if not found:
        return PlainTextResponse(f"instance {number} does not exist\n", 404)
    try:
        reply = await service.containers.read_metrics(found[0])
    except httpx.HTTPError as error:
        return PlainTextResponse(f"instance {number} does not answer: {type(error).__name__}\n", 502)
    headers = {"Content-Type": reply.headers.get("Content-Type", "text/plain")}
    return Response(reply.content, reply.status_code, headers=headers)


async def _chunks(parts: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """Yield the parts of a streamed body. If it breaks off, the client's connection is closed before its end."""
    async with contextlib.aclosing(parts):
        async for part in parts:
            yield part


async def _frames(answer: StreamedReply) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(answer.parts) as parts:
        try:
            async for part in parts:
                yield eventstream.payload_part(part)
        except StreamFault as fault:
            yield eventstream.stream_error(fault.body)
