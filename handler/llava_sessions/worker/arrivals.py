"""Requests between their arrival and their start: parsed, large ones on a thread of their own.

`Arrivals` runs on the pump's thread, under its lock, except `parse` for a large body.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

from ..config import RequestLimits
from ..protocol.openai import Chat, OpenAIForm
from ..protocol.parsing import Request, parse
from ..protocol.requests import Ask, Cancel, Close, Describe, Open, session_in_header
from .inbox import Inbox
from .pending import PendingRequest

# JSON is parsed with the GIL held, so a second thread would only hold up the pump's thread more often.
_PARSING_THREADS = 1


@dataclass(frozen=True)
class _Arrival:
    pending: PendingRequest
    parsed: Future[Request]


class Arrivals:
    """Requests that are being parsed. Requests of one session start in the order of their arrival.

    The session is the one in the header, or in the body if that is small. A request waits for earlier requests of its
    session only. If a large body names its session and the header does not, the request waits for no other one.
    """

    def __init__(
        self,
        inbox: Inbox,
        limits: RequestLimits,
        max_body_bytes: int,
        executor: Executor | None = None,
        allow_system: bool = True,
    ) -> None:
        """`max_body_bytes`: a longer body is rejected unread. `executor` parses large bodies instead of a thread.

        `allow_system`: whether a client may send system messages.
        """
        self._inbox = inbox
        self._limits = limits
        self._max_body_bytes = max_body_bytes
        self._allow_system = allow_system
        self._executor = executor or ThreadPoolExecutor(_PARSING_THREADS, thread_name_prefix="parse")
        self._waiting: dict[str, deque[_Arrival]] = {}

    def add(self, pending: PendingRequest, body: object) -> None:
        """Parse a request: now if it is small. Each large one puts an item into the inbox when it is parsed."""
        parsed: Future[Request] = Future()
        if pending.is_large:
            parsed = self._executor.submit(self._parse, pending, body)
        else:
            try:
                parsed.set_result(self._parse(pending, body))
            except Exception as error:
                parsed.set_exception(error)
        self._waiting.setdefault(_session_id(pending, parsed), deque()).append(_Arrival(pending, parsed))
        if pending.is_large:
            self._inbox.when_done(parsed, lambda _: None)

    def start_ready(self, start: Callable[[PendingRequest, Request], None]) -> None:
        """Start the requests whose turn it is, or reject them. Leave out those of disconnected clients."""
        for session_id, queue in list(self._waiting.items()):
            while queue and queue[0].parsed.done():
                arrival = queue.popleft()
                if arrival.pending.disconnected:
                    continue
                try:
                    request = arrival.parsed.result()
                    if isinstance(request, Chat):
                        # The form of an error, until that of the answer is set.
                        arrival.pending.form = OpenAIForm(is_sse=request.is_sse)
                    start(arrival.pending, request)
                except Exception as error:
                    arrival.pending.refuse(error)
            if not queue:
                del self._waiting[session_id]

    def disconnected(self, pending: PendingRequest) -> None:
        """Drop a request whose client has left. If it is not being parsed yet, it will not be."""
        for queue in self._waiting.values():
            for arrival in queue:
                if arrival.pending is pending:
                    arrival.parsed.cancel()

    def _parse(self, pending: PendingRequest, body: object) -> Request:
        return parse(body, pending.row.headers, self._limits, self._max_body_bytes, self._allow_system)


def _session_id(pending: PendingRequest, parsed: Future[Request]) -> str:
    """Return the ID of the session that a request is about; the request's own ID if that is unknown."""
    in_header = session_in_header(pending.row.headers)
    if in_header is None and parsed.done() and parsed.exception() is None:
        request = parsed.result()
        match request:
            case Open():
                in_header = request.resume
            case Ask() | Close() | Cancel() | Describe():
                in_header = request.session_id
    return in_header or pending.row.request_id
