"""The routes of the page's server."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from llava_sessions_client import AskOptions, Endpoint, Retries, Timeouts

from .answering import events
from .chats import Chats, WebChat
from .examples import EXAMPLES, example_path
from .guard import Guard
from .problems import Problem, in_words
from .status import status_of

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
MAX_QUESTION_CHARS = 4096
# A person waits: the page shows the error soon and offers to ask again.
_TIMEOUTS = Timeouts(connect_s=3.0, total_s=150.0, close_s=3.0)
_RETRIES = Retries(most=2)


def make_app(
    endpoint: str, hosts: Iterable[str], *, region: str | None = None, options: AskOptions | None = None
) -> Starlette:
    """Return the application for a model server: a URL, or the name of a SageMaker endpoint.

    `hosts`: the values of the header `Host` that the application accepts. `options`: of each question.
    """

    def client(session_token: str | None = None) -> Endpoint:
        return Endpoint(endpoint, region=region, timeout_s=_TIMEOUTS, retries=_RETRIES, session_token=session_token)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        with client() as shared:
            async with httpx.AsyncClient(trust_env=False) as http:
                app.state.endpoint = endpoint
                app.state.http = http
                app.state.chats = Chats(shared, client)
                app.state.options = options or {}
                yield
                await run_in_threadpool(app.state.chats.close_all)

    return Starlette(
        routes=[
            Route("/", lambda _: FileResponse(PAGE / "index.html")),
            Route("/favicon.ico", lambda _: FileResponse(PAGE / "icon.svg")),
            Mount("/page", StaticFiles(directory=PAGE)),
            Route("/examples/{name}", _example),
            Route("/api/status", _status),
            Route("/api/chats", _open, methods=["POST"]),
            Route("/api/chats/{chat}", _show, methods=["GET"]),
            Route("/api/chats/{chat}", _close, methods=["DELETE"]),
            Route("/api/chats/{chat}/session", _where),
            Route("/api/chats/{chat}/pictures", _attach, methods=["POST"]),
            Route("/api/chats/{chat}/pictures/{number:int}", _picture, methods=["GET"]),
            Route("/api/chats/{chat}/pictures/{number:int}", _detach, methods=["DELETE"]),
            Route("/api/chats/{chat}/questions", _ask, methods=["POST"]),
            Route("/api/chats/{chat}/turns/{turn:int}/edit", _edit, methods=["POST"]),
            Route("/api/chats/{chat}/turns/{turn:int}/comparison", _compare, methods=["POST"]),
            Route("/api/chats/{chat}/retry", _retry, methods=["POST"]),
            Route("/api/chats/{chat}/stop", _stop, methods=["POST"]),
            Route("/api/chats/{chat}/reopen", _reopen, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={Problem: _in_words, Exception: _in_words},
        lifespan=lifespan,
    )


async def _in_words(_request: Request, error: Exception) -> Response:
    problem = in_words(error)
    if problem.code == "internal":
        log.error("request_failed", exc_info=error)
    return JSONResponse({"problem": problem.body()}, status_code=problem.status)


def _chats(request: Request) -> Chats:
    chats: Chats = request.app.state.chats
    return chats


def _chat(request: Request) -> WebChat:
    return _chats(request).find(request.path_params["chat"])


def _shown(chat: WebChat, status: int = 200) -> Response:
    return JSONResponse({"chat": chat.shown()}, status_code=status)


async def _call(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run a blocking function on a thread. Raise `Problem` for its errors."""
    try:
        return await run_in_threadpool(work, *arguments)
    except Exception as error:
        problem = in_words(error)
        if problem.code == "internal":
            log.exception("call_failed call=%s", getattr(work, "__name__", "?"))
        raise problem from None


# --- the page ---------------------------------------------------------------------------------------------------------


async def _status(request: Request) -> Response:
    state = request.app.state
    found = await status_of(state.http, state.endpoint)
    return JSONResponse({**vars(found), "name": state.endpoint, "examples": [one.shown() for one in EXAMPLES]})


async def _example(request: Request) -> Response:
    path = example_path(request.path_params["name"])
    if path is None:
        raise Problem("not_found", "There is no such example.", "Reload the page.", status=404)
    return FileResponse(path, media_type="image/png")


# --- chats ------------------------------------------------------------------------------------------------------------


async def _open(request: Request) -> Response:
    chats = _chats(request)
    return _shown(await _call(chats.open, await request.body()), status=201)


async def _show(request: Request) -> Response:
    return _shown(_chat(request))


async def _close(request: Request) -> Response:
    await _call(_chats(request).close, _chat(request))
    return Response(status_code=204)


async def _where(request: Request) -> Response:
    return JSONResponse(await _call(_chat(request).where))


async def _reopen(request: Request) -> Response:
    chat = _chat(request)
    await _call(_chats(request).reopen, chat)
    return _shown(chat)


async def _compare(request: Request) -> Response:
    chat = _chat(request)
    await _call(_chats(request).compare, chat, request.path_params["turn"])
    return _shown(chat)


# --- pictures ---------------------------------------------------------------------------------------------------------


async def _attach(request: Request) -> Response:
    chat = _chat(request)
    await _call(_chats(request).attach, chat, await request.body())
    return _shown(chat)


async def _detach(request: Request) -> Response:
    chat = _chat(request)
    chat.detach(request.path_params["number"])
    return _shown(chat)


async def _picture(request: Request) -> Response:
    found = _chat(request).picture(request.path_params["number"])
    return Response(found.shown, media_type=found.media_type, headers={"Cache-Control": "private, max-age=3600"})


# --- questions --------------------------------------------------------------------------------------------------------


async def _ask(request: Request) -> Response:
    chat = _chat(request)
    text = await _question(request)
    options = request.app.state.options
    return _answer(chat, lambda: chat.ask(text, options), len(chat.turns))


async def _edit(request: Request) -> Response:
    chat = _chat(request)
    text = await _question(request)
    index = request.path_params["turn"]
    options = request.app.state.options
    if index >= len(chat.turns):
        raise Problem("turn_not_found", "This turn is gone.", "Reload the page.", status=404)
    return _answer(chat, lambda: chat.session.stream_edit(index, text, **options), index)


async def _retry(request: Request) -> Response:
    chat = _chat(request)
    if not chat.turns:
        raise Problem("turn_not_found", "There is no question to ask again.", "Ask one.", status=404)
    options = request.app.state.options
    return _answer(chat, lambda: chat.session.stream_retry(**options), len(chat.turns) - 1)


async def _stop(request: Request) -> Response:
    return JSONResponse({"stopped": await _call(_chat(request).stop)})


def _answer(chat: WebChat, ask: Callable[[], Any], index: int) -> Response:
    headers = {"X-Accel-Buffering": "no"}
    stream = events(chat, ask, index)
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


async def _question(request: Request) -> str:
    """Return the question of a request. Raise `Problem`."""
    try:
        text = json.loads(await request.body())["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise Problem("no_question", "The question is empty.", "Write a question first.")
    if len(text) > MAX_QUESTION_CHARS:
        raise Problem("too_large", f"The question has more than {MAX_QUESTION_CHARS} characters.", "Shorten it.")
    return text
