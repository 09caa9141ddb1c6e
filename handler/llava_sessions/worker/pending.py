"""Requests that wait for their last reply."""

from __future__ import annotations

import json
import logging
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import Refused
from ..journal.journal import AlreadyClaimed, JournalUnavailable, NotFound, OwnerIsAnswering
from ..media.limits import MediaError
from ..protocol import replies
from ..protocol.constants import JSON_TYPE, STREAM_TYPE
from ..torchserve.batch import Reply, Row

log = logging.getLogger(__name__)

# A longer body is parsed on a thread of its own.
LARGE_BYTES = 65_536
_RETRY_AFTER_S = 2
_DROPPED_KEPT = 10_000


@dataclass(eq=False)
class PendingRequest:
    """An active row, without its body. Its client receives chunks, then exactly one last reply.

    TorchServe sends a held row again in every step, with its whole body of `body_bytes`. Its first chunk ends that.
    `steps` counts the steps that ended without the last reply. `head_sent`: the status line has been sent.
    `disconnected`: the client has left, so no reply reaches it. `arrived_s`: arrival by the pump's clock. `final` is
    the last reply, once it is known.
    """

    row: Row
    body_bytes: int = 0
    steps: int = 0
    streamed: bool = False
    head_sent: bool = False
    disconnected: bool = False
    arrived_s: float = 0.0
    refusal: Refused | None = None
    final: Reply | None = None
    _chunks: list[str] = field(default_factory=list)
    _is_committed: bool = False

    @property
    def is_large(self) -> bool:
        """Whether the body is too long to be parsed on the pump's thread, or to be sent again in every step."""
        return self.body_bytes > LARGE_BYTES

    @property
    def must_begin(self) -> bool:
        """Whether the next step must send the head, although no text is known."""
        return self._is_committed and not self.head_sent

    @property
    def has_output(self) -> bool:
        """Whether the next step has something to send."""
        return bool(self._chunks) or self.final is not None or self.must_begin

    @property
    def content_type(self) -> str:
        """The content type of a reply that begins with a chunk."""
        return STREAM_TYPE if self.streamed else JSON_TYPE

    def commit(self) -> None:
        """Commit a large request to status 200: from now on an error is a body, not a status."""
        self._is_committed = self.is_large

    def take_chunks(self) -> str:
        """Return the chunks that have not been sent, and clear them."""
        text = "".join(self._chunks)
        self._chunks.clear()
        return text

    def restore(self, chunks: list[str], final: Reply | None) -> None:
        """Take over output that could not be sent."""
        self._chunks = list(chunks)
        self.final = final

    def stream(self, text: str) -> None:
        """Add text of the answer, if the client asked for a stream."""
        if self.streamed and text:
            self._chunks.append(replies.line({"delta": text}))

    def reply(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """Set the last reply: one JSON body."""
        self._finish(Reply(json.dumps(body, ensure_ascii=False), headers=headers or {}))

    def answer(self, text: str, facts: dict[str, Any]) -> None:
        """Set the last reply of a question: the last line of a stream, or one body with the whole answer."""
        if self.streamed:
            self._end_stream({"delta": "", **facts})
        else:
            self.reply({"response_text": text, **facts})

    def refuse(self, error: Exception) -> None:
        """Set the last reply to an error: with its own status, or as the last line if the status has been sent."""
        self.refusal = refusal_of(error)
        if self.head_sent:
            self._end_stream(self.refusal.body())
            return
        self._chunks.clear()
        retry_after_s = self.refusal.retry_after_s
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        self._finish(Reply(json.dumps(self.refusal.body()), status=self.refusal.status, headers=headers))

    def _end_stream(self, line: dict[str, Any]) -> None:
        self._finish(Reply(replies.line(line), more=False, content_type=STREAM_TYPE))

    def _finish(self, final: Reply) -> None:
        if self.final is not None:
            raise RuntimeError("the request has its last reply already")
        self.final = final


@dataclass(frozen=True)
class _Dropped:
    """The state of the reply to a request that was dropped, without its row, whose body may be large."""

    body_bytes: int
    steps: int
    streamed: bool
    head_sent: bool
    chunks: list[str]
    final: Reply | None


class PendingTable:
    """All requests that have no last reply yet, and the state of those that were dropped as disconnected."""

    def __init__(self) -> None:
        self._pending: dict[str, PendingRequest] = {}
        self._dropped: OrderedDict[str, _Dropped] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pending

    def __getitem__(self, request_id: str) -> PendingRequest:
        return self._pending[request_id]

    def add(self, row: Row) -> tuple[PendingRequest, bool]:
        """Add a row. Return it, and whether the request was dropped before: its client is connected after all.

        A last reply that was known when the request was dropped is known again.
        """
        body_bytes = len(row.body) if isinstance(row.body, str | bytes | bytearray) else 0
        pending = self._pending[row.request_id] = PendingRequest(replace(row, body=b""), body_bytes)
        dropped = self._dropped.pop(row.request_id, None)
        if dropped is not None:
            pending.body_bytes = dropped.body_bytes
            pending.steps = dropped.steps
            pending.streamed = dropped.streamed
            pending.head_sent = dropped.head_sent
            pending.restore(dropped.chunks, dropped.final)
        return pending, dropped is not None

    def remove(self, pending: PendingRequest) -> None:
        """Remove a request that has its last reply."""
        self._pending.pop(pending.row.request_id, None)

    def drop_missing(self, active: set[str]) -> list[PendingRequest]:
        """Remove and return the requests that TorchServe does not list any more: their clients have left."""
        missing = [self._pending.pop(request_id) for request_id in self._pending.keys() - active]
        for pending in missing:
            self._dropped[pending.row.request_id] = _Dropped(
                body_bytes=pending.body_bytes,
                steps=pending.steps,
                streamed=pending.streamed,
                head_sent=pending.head_sent,
                chunks=[] if pending.final is None else [pending.take_chunks()],
                final=pending.final,
            )
        while len(self._dropped) > _DROPPED_KEPT:
            self._dropped.popitem(last=False)
        return missing

    @property
    def has_output(self) -> bool:
        """Whether any request has something to send."""
        return any(pending.has_output for pending in self._pending.values())

    @property
    def held_bytes(self) -> int:
        """The bytes that TorchServe copies again in the next step: bodies of rows that have nothing to send."""
        held = (pending for pending in self._pending.values() if not pending.head_sent and not pending.has_output)
        return sum(pending.body_bytes for pending in held if pending.is_large)

    @property
    def sequence_ids(self) -> list[str]:
        """The sequence of each request."""
        return [pending.row.sequence_id for pending in self._pending.values()]


def refusal_of(error: Exception) -> Refused:
    """Return the error that a client receives. An unexpected error is logged in full and named by an ID only."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, MediaError):
        return Refused(error.code, f"{error.message[:1].upper()}{error.message[1:]}.")
    if isinstance(error, JournalUnavailable):
        message = "The session's journal cannot be read at the moment; the session is kept, try again."
        return Refused("journal_unavailable", message, retry_after_s=_RETRY_AFTER_S)
    if isinstance(error, AlreadyClaimed):
        return Refused("session_busy", "Another request is resuming the session; try again.")
    if isinstance(error, OwnerIsAnswering):
        return Refused("session_moved", "Another instance is answering the session; send it again.", _RETRY_AFTER_S)
    if isinstance(error, NotFound):
        return Refused("session_not_found", "No session of this ID is open here; open one with a picture first.")
    error_id = uuid.uuid4().hex[:8]
    log.error("internal_error id=%s", error_id, exc_info=error)
    return Refused("internal", f"The server met an unexpected error; its log has the cause under ID {error_id}.")


def session_moved() -> Refused:
    """Return the error for a session that another instance has taken over."""
    message = "Another instance has taken over the session; send the request again."
    return Refused("session_moved", message, retry_after_s=_RETRY_AFTER_S)
