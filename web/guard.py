"""What the page's server accepts and sends: its own host and origin only, bounded bodies, and a strict policy."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import Problem

MAX_PICTURE_BYTES = 25_000_000
MAX_JSON_BYTES = 64 * 1024
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_UNKNOWN_HOST = Problem(
    "forbidden",
    "The page's server does not know this address as its own.",
    'Open the address that `make web` prints, or add this one: make web WEB="--allow-host NAME[:PORT]".',
    status=403,
)
_FOREIGN = Problem("forbidden", "This request came from another site.", "Open the page at its own address.", status=403)
_LARGE = Problem("too_large", "The file is larger than 25 MB.", "Make it smaller and try again.", status=413)


class _BodyTooLarge(Exception):
    """More bytes arrived than the limit."""


class Guard:
    """ASGI middleware. Rejects a foreign `Host` (DNS rebinding), a foreign `Origin`, and bodies above their limit."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        """`hosts`: accepted values of the header `Host`, in lower case."""
        self._app = app
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        most = MAX_JSON_BYTES if headers.get("content-type", "").startswith("application/json") else MAX_PICTURE_BYTES
        started = False

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                fields = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    fields[name] = value
                fields.setdefault("Cache-Control", "no-store" if scope["path"].startswith("/api/") else "no-cache")
            await send(message)

        host = headers.get("host", "").lower()
        if host not in self._hosts:
            await _refusal(_UNKNOWN_HOST)(scope, receive, guarded_send)
            return
        if not _is_own(host, headers, scope["path"]):
            await _refusal(_FOREIGN)(scope, receive, guarded_send)
            return
        if _length(headers) > most:
            await _refusal(_LARGE)(scope, receive, guarded_send)
            return
        try:
            await self._app(scope, _limited(receive, most), guarded_send)
        except _BodyTooLarge:
            if not started:
                await _refusal(_LARGE)(scope, receive, guarded_send)


def _is_own(host: str, headers: Headers, path: str) -> bool:
    """Return whether a request comes from the page itself, or opens it."""
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        return False
    # Another site may link to the page, but not read from the API or embed its pictures.
    return path == "/" or headers.get("sec-fetch-site", "none") in ("none", "same-origin")


def _length(headers: Headers) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isdigit() else 0


def _limited(receive: Receive, most: int) -> Receive:
    """Return a `receive` that raises `_BodyTooLarge` once more than `most` bytes have arrived."""
    total = 0

    async def limited() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > most:
            raise _BodyTooLarge
        return message

    return limited


def _refusal(problem: Problem) -> JSONResponse:
    return JSONResponse({"problem": problem.body()}, status_code=problem.status)
