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
from ..protocol.constants import JSON_TYPE
from ..protocol.openai import OpenAIForm, RefusedChat
from ..protocol.parsing import openai_path
from ..protocol.replies import NativeForm, ReplyForm
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
    `disconnected`: the client has left, so no reply reaches it. `arrived_s`: arrival by the pump's clock. `form` makes
    the bodies of the reply. `final` is the last reply, once it is known. `avoids`: the engine that had no room for the
    request, which was then placed again.
    """

    row: Row
    body_bytes: int = 0
    steps: int = 0
    streamed: bool = False
    head_sent: bool = False
    disconnected: bool = False
    arrived_s: float = 0.0
    avoids: int | None = None
    form: ReplyForm = field(default_factory=NativeForm)
    refusal: Refused | None = None
    final: Reply | None = None
    _output: _Output = field(default_factory=lambda: _Output())
    _is_committed: bool = False

    @property
    def is_large(self) -> bool:
        """Whether the body is too long to be parsed on the pump's thread, or to be sent again in every step."""
        return self.body_bytes > LARGE_BYTES

    @property
    def was_placed_again(self) -> bool:
        """Whether the request starts once more, with the form of its reply that it had."""
        return self.avoids is not None

    @property
    def must_begin(self) -> bool:
        """Whether the next step must send the head, although no text is known."""
        return self._is_committed and not self.head_sent

    @property
    def has_output(self) -> bool:
        """Whether the next step has something to send."""
        return bool(self._output.pieces) or self.final is not None or self.must_begin

    @property
    def content_type(self) -> str:
        """The content type of a reply that begins with a chunk."""
        return self.form.stream_type if self.streamed else JSON_TYPE

    def commit(self) -> None:
        """Commit a large request to status 200: from now on an error is a body, not a status."""
        self._is_committed = self.is_large

    def take_chunk(self) -> str:
        """Return the next chunk of a stream: all text that has not been sent."""
        return self._output.chunk(self.form)

    def take_final(self) -> Reply:
        """Return the last reply. In a stream it has all text that has not been sent."""
        if self.final is None:
            raise RuntimeError("the request has no last reply yet")
        if self._output.facts is not None:
            self.final.body = self._output.last_chunk(self.form)
        elif self.refusal is not None and self.head_sent:
            self.final.body = self.take_chunk() + self.form.error_chunk(self.refusal, self.streamed)
        return self.final

    def stream(self, text: str) -> None:
        """Add text of the answer, if the client asked for a stream."""
        if self.streamed and text:
            self._output.pieces.append(text)

    def reply(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """Set the last reply: one JSON body."""
        self._finish(Reply(json.dumps(body, ensure_ascii=False), headers=headers or {}))

    def answer(self, text: str, facts: dict[str, Any]) -> None:
        """Set the last reply of a question: the end of a stream, or one body with the whole answer."""
        if self.streamed:
            self._finish(Reply("", more=False, content_type=self.form.stream_type))
            self._output.facts = facts
        else:
            self.reply(self.form.whole(text, facts))

    def refuse(self, error: Exception) -> None:
        """Set the last reply to an error: with its own status, or as the end of a reply whose status has been sent."""
        self.refusal = refusal_of(error)
        if isinstance(error, RefusedChat) and not isinstance(self.form, OpenAIForm):
            self.form = OpenAIForm()  # only the body showed that the request is in OpenAI's words
        if self.head_sent:
            self._finish(Reply("", more=False, content_type=self.content_type))
            return
        self._output.pieces.clear()
        retry_after_s = self.refusal.retry_after_s
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        body = json.dumps(self.form.error(self.refusal))
        self._finish(Reply(body, status=self.form.status(self.refusal), headers=headers))

    def dropped(self) -> _Dropped:
        """Return the state of the reply. Text of an unfinished answer is left out: its turn ends with the request."""
        return _Dropped(
            body_bytes=self.body_bytes,
            steps=self.steps,
            streamed=self.streamed,
            head_sent=self.head_sent,
            form=self.form,
            refusal=self.refusal,
            output=_Output(has_begun=self._output.has_begun) if self.final is None else self._output,
            final=self.final,
        )

    def _finish(self, final: Reply) -> None:
        if self.final is not None:
            raise RuntimeError("the request has its last reply already")
        self.final = final


@dataclass
class _Output:
    """What a stream has not sent. `facts`: of its last chunk, once they are known. `has_begun`: text has been sent."""

    pieces: list[str] = field(default_factory=list)
    facts: dict[str, Any] | None = None
    has_begun: bool = False

    def chunk(self, form: ReplyForm) -> str:
        """Return the chunk of all pieces, and clear them."""
        chunk = form.chunk(self.pieces, is_first=not self.has_begun)
        self.has_begun = self.has_begun or bool(chunk)
        self.pieces.clear()
        return chunk

    def last_chunk(self, form: ReplyForm) -> str:
        """Return the chunk that ends the stream."""
        return form.last_chunk(self.pieces, is_first=not self.has_begun, facts=self.facts or {})


@dataclass(frozen=True)
class _Dropped:
    """The state of the reply to a request that was dropped, without its row, whose body may be large."""

    body_bytes: int
    steps: int
    streamed: bool
    head_sent: bool
    form: ReplyForm
    refusal: Refused | None
    output: _Output
    final: Reply | None

    def restore(self, pending: PendingRequest) -> None:
        """Give the state to the request, whose client is connected after all."""
        pending.body_bytes = self.body_bytes
        pending.steps = self.steps
        pending.streamed = self.streamed
        pending.head_sent = self.head_sent
        pending.form = self.form
        pending.refusal = self.refusal
        pending.final = self.final
        pending._output = self.output


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
        if openai_path(row.headers) is not None:
            pending.form = OpenAIForm()
        dropped = self._dropped.pop(row.request_id, None)
        if dropped is not None:
            dropped.restore(pending)
        return pending, dropped is not None

    def remove(self, pending: PendingRequest) -> None:
        """Remove a request that has its last reply."""
        self._pending.pop(pending.row.request_id, None)

    def drop_missing(self, active: set[str]) -> list[PendingRequest]:
        """Remove and return the requests that TorchServe does not list any more: their clients have left."""
        missing = [self._pending.pop(request_id) for request_id in self._pending.keys() - active]
        for pending in missing:
            self._dropped[pending.row.request_id] = pending.dropped()
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
