"""Owns the words with which rows are answered: what an entry's last reply is, and what it is told before.

Must not know when anything is told: opens, turns and closes decide. No torch, no TorchServe.
"""

from __future__ import annotations

import json
import logging
import uuid

from ..chat.transcript import Conversation, Transcript, short_id
from ..errors import Refused
from ..media.limits import MediaError
from ..protocol import replies
from ..protocol.constants import CLOSED_SESSION_HEADER, STREAM_TYPE
from ..torchserve.batch import Reply
from .context import WorkerContext
from .pending import PendingRequest, Turn
from .sessions import Session

log = logging.getLogger(__name__)


def refuse(desk: WorkerContext, entry: PendingRequest, error: Exception) -> None:
    """Answer a row by an error."""
    refused = as_refusal(error)
    desk.refusals_total += 1
    log.info("refused request=%s code=%s", short_id(entry.row.request_id), refused.code)
    entry.final = refusal(refused)


def refusal(refused: Refused) -> Reply:
    """The whole answer that a refusal is."""
    headers = {} if refused.retry_after_s is None else {"Retry-After": str(refused.retry_after_s)}
    return Reply(json.dumps(refused.body()), status=refused.status, headers=headers)


def as_refusal(error: Exception) -> Refused:
    """The refusal that an error is told as. What nobody foresaw is logged whole and told by an id only."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, MediaError):
        return Refused(error.code, f"{error.message[:1].upper()}{error.message[1:]}.")
    error_id = uuid.uuid4().hex[:8]
    log.error("internal_error id=%s", error_id, exc_info=error)
    return Refused("internal", f"Something went wrong inside the server; its log has the cause under id {error_id}.")


def tell_open(
    entry: PendingRequest, session: Session[Conversation], story: Transcript, durable: bool | None = None
) -> None:
    """Answer an open by its session's journal. `durable`: whether that is stored; None where it is not told."""
    counts = (story.open.image_tokens, len(story.open.token_ids), len(story.turns))
    body = replies.opened(session.id, session.expires, *counts, durable)
    entry.final = Reply(json.dumps(body), headers=replies.session_headers(session.id, session.expires))


def tell_closed(entry: PendingRequest, session_id: str) -> None:
    """Answer a close."""
    headers = {CLOSED_SESSION_HEADER: session_id}
    entry.final = Reply(json.dumps(replies.closed(session_id)), headers=headers)


def tell_cancelled(entry: PendingRequest, session_id: str, had_turn: bool) -> None:
    """Answer a cancel."""
    entry.final = Reply(json.dumps(replies.cancelled(session_id, had_turn)))


def tell_words(entry: PendingRequest, text: str) -> None:
    """The next words of an answer, where it streams."""
    if entry.streamed and text:
        entry.lines.append(replies.line({"delta": text}))


def tell_end(entry: PendingRequest, text: str, facts: dict) -> None:
    """A last line when it streams, else one body with the whole answer."""
    if entry.streamed:
        last = facts if "error" in facts else {"delta": "", **facts}
        entry.final = Reply(replies.line(last), more=False, content_type=STREAM_TYPE)
    else:
        entry.final = Reply(json.dumps({"response_text": text, **facts}, ensure_ascii=False))


def tell_turn(turn: Turn, facts: dict) -> None:
    """Give the rows of a turn that ended their last words."""
    for entry in turn.entries:
        tell_end(entry, "".join(turn.text), facts)


def refuse_turn(desk: WorkerContext, turn: Turn, error: Exception) -> None:
    """Answer the rows of a turn by an error: with its status where nothing was sent, else as a last line."""
    refused = as_refusal(error)
    for entry in turn.entries:
        if entry.head_sent:
            desk.refusals_total += 1
            tell_end(entry, "", refused.body())
        else:
            entry.lines.clear()
            refuse(desk, entry, refused)
