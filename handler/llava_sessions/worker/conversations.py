"""Conversations that clients send whole, and the implicit sessions that hold what the engine computed of them.

A client of OpenAI's protocol keeps no session: each request has the whole conversation. Its token IDs and pictures are
compared with those that implicit sessions hold. The longest common prefix is not computed again. An implicit session
has no TorchServe sequence and no journal, and no client learns its ID.

All methods of `Conversations` run on the pump's thread, under its lock.
"""

from __future__ import annotations

import logging
import uuid
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..chat.transcript import short_id
from ..errors import Refused
from ..ipc.messages import CloseSession, PreparedPicture
from .context import WorkerContext
from .prefixes import LINK_TOKENS, HeldConversation, Prompt, common_prefix, links_of
from .sessions import Session, SessionTable
from .states import SessionState

log = logging.getLogger(__name__)

# Sessions with an equal prefix that are compared token by token.
_COMPARED = 8


@dataclass(frozen=True)
class Place:
    """Where a conversation runs: `kept` tokens are in the cache of `session`, or of `donor` for a new session.

    `base`: the token at which a forked session may be cropped again for another attempt; None if it may not.
    """

    session: Session | None
    kept: int = 0
    donor: Session | None = None
    base: int | None = None


class Conversations:
    """The implicit sessions of a worker, found by the beginning of their conversations."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._by_link: dict[int, dict[str, None]] = {}

    @property
    def all(self) -> list[Session]:
        """All implicit sessions."""
        return [session for session in self._context.table if session.conversation is not None]

    def place(self, prompt: Prompt) -> Place:
        """Return where a conversation runs, for the least work. Changes nothing."""
        best: tuple[int, Session] | None = None
        for session, held in self._sharing(prompt.links):
            kept = common_prefix(held.token_ids, session.picture_keys, prompt)
            if _continues(held, prompt, kept) and session.turn is None:
                return Place(session, kept)
            if best is None or (kept, session.turn is None) > (best[0], best[1].turn is None):
                best = (kept, session)
        if best is None or best[0] == 0:
            return Place(None)
        kept, donor = best
        retried = self._own_fork(prompt)
        if retried is not None:
            return retried
        if donor.turn is None and not self._has_room(donor):
            return Place(donor, kept)
        held = donor.held_conversation
        return Place(None, kept, donor, kept if kept >= held.first_prompt_tokens - 1 else None)

    def add(self, session: Session, root: int, place: Place) -> None:
        """Take a place for a new session. Close the least recently used idle one of its kind if all are taken.

        Raise `Refused` (capacity) if all of them are busy.
        """
        if self._is_full:
            oldest = self.evicted_by(place)
            if oldest is None:
                most = self._context.table.max_implicit
                message = f"All {most} conversations without a session ID are being answered; try again later."
                raise Refused("capacity", message, retry_after_s=1)
            log.info("conversation_evicted session=%s", short_id(oldest.id))
            self.drop(oldest)
        session.conversation = HeldConversation(root, fork_base=place.base)
        self._note_use(session)
        self._context.table.add(session)

    def evicted_by(self, place: Place) -> Session | None:
        """Return the session that `add` closes for a new one; None if it closes none, or if all are busy."""
        if place.session is not None or not self._is_full:
            return None
        idle = [one for one in self.all if one.turn is None and one is not place.donor]
        return min(idle, key=lambda one: one.used_at_s, default=None)

    def finished(self, session: Session, prompt: Prompt, kept: int, answer_ids: Sequence[int]) -> None:
        """Note what a session holds after an answer. `kept`: the tokens that it held before and that were kept.

        If sessions share nothing, no request can continue the session: it is closed.
        """
        if not self._context.preparer.prompts.shares:
            self.drop(session)
            return
        held = session.held_conversation
        self._unlink(session)
        if held.fork_base is not None and kept < held.fork_base:
            held.fork_base = None  # another conversation has taken the session
        if not held.turns or kept < held.first_prompt_tokens:
            held.turns = 0
            held.first_prompt_tokens = len(prompt.token_ids)
        held.turns += 1
        held.token_ids = np.concatenate([prompt.token_ids, np.asarray(answer_ids, dtype=prompt.token_ids.dtype)])
        session.picture_keys = tuple(span.key for span in prompt.spans)
        held.starts = tuple(span.start for span in prompt.spans)
        held.last_prompt_tokens = len(prompt.token_ids)
        held.links = links_of(held.root, held.token_ids.tolist(), prompt.spans, prompt.links)
        self._note_use(session)
        for link in held.links:
            self._by_link.setdefault(link, {})[session.id] = None

    def unfinished(self, session: Session, kept: int) -> None:
        """Note that a session holds its first `kept` tokens only, after a turn without an answer.

        A session that never had an answer is closed, and so is one that the engine does not hold.
        """
        held = session.conversation
        if held is None or session.id not in self._context.table:
            return
        if not held.turns or not kept or not session.in_engine:
            self.drop(session)
        elif kept < len(held.token_ids):
            self._unlink(session)
            held.token_ids = held.token_ids[:kept]
            pictures = bisect_left(held.starts, kept)
            session.picture_keys = session.picture_keys[:pictures]
            held.starts = held.starts[:pictures]
            held.links = held.links[: kept // LINK_TOKENS]
            for link in held.links:
                self._by_link.setdefault(link, {})[session.id] = None

    def drop_cold(self) -> None:
        """Close the idle sessions that the engine does not hold: their clients have the conversations."""
        for session in self.all:
            if session.turn is None and not session.in_engine:
                self.drop(session)

    def drop(self, session: Session) -> None:
        """Remove a session from the engine and the table."""
        self._unlink(session)
        if session.in_engine:
            self._context.engines.submit_if_held(session, CloseSession(session.id))
            session.unload()
        self._context.table.release(session)

    @property
    def _is_full(self) -> bool:
        return len(self.all) >= self._context.table.max_implicit

    def _has_room(self, kept: Session) -> bool:
        """Return whether a session can be added, if necessary instead of an idle one other than `kept`."""
        return not self._is_full or any(one.turn is None and one is not kept for one in self.all)

    def _note_use(self, session: Session) -> None:
        """Let the session expire as if it had been opened now. Its client has no expiry."""
        now_s = self._context.clock()
        session.used_at_s = now_s
        session.expires_at_s = self._context.table.expiry_of_open(now_s)

    def _sharing(self, links: Sequence[int]) -> Iterator[tuple[Session, HeldConversation]]:
        """Yield the sessions with the longest beginning in common, the latest first."""
        depth = bisect_left(range(len(links)), True, key=lambda at: links[at] not in self._by_link)
        if not depth:
            return
        sessions = [self._context.table.find(one) for one in reversed(self._by_link[links[depth - 1]])]
        for session in [one for one in sessions if one is not None and one.is_loaded][:_COMPARED]:
            yield session, session.held_conversation

    def _own_fork(self, prompt: Prompt) -> Place | None:
        """Return an idle session that was forked for an earlier attempt at the same turn: this attempt replaces it."""
        for session in self.all:
            held = session.held_conversation
            if held.fork_base is None or held.turns != 1 or session.turn is not None or not session.is_loaded:
                continue
            if held.links[:1] != prompt.links[:1]:
                continue
            kept = common_prefix(held.token_ids, session.picture_keys, prompt)
            if kept >= held.fork_base:
                return Place(session, kept)
        return None

    def _unlink(self, session: Session) -> None:
        for link in session.held_conversation.links:
            sessions = self._by_link.get(link)
            if sessions is not None:
                sessions.pop(session.id, None)
                if not sessions:
                    del self._by_link[link]


def implicit_session(table: SessionTable, token_digest: str | None) -> Session:
    """Return a session that is not in the table yet. It is found by requests of the same session token only."""
    session = Session(f"implicit-{uuid.uuid4()}", table.idle_s)
    session.token_digest = token_digest
    session.advance(SessionState.OPEN)
    return session


def _continues(held: HeldConversation, prompt: Prompt, kept: int) -> bool:
    """Return whether a prompt goes on after the session's last question: behind its answer, or behind a part of it."""
    if kept == len(held.token_ids):
        return True
    return kept >= held.last_prompt_tokens and len(prompt.token_ids) > kept + 1


def lacks_features(
    table: SessionTable, pictures: Iterable[PreparedPicture], engine: int | None, closing: Session | None = None
) -> bool:
    """Return whether a picture has no arrays, and no session of the engine has its features, other than `closing`."""
    keys = {picture.key for picture in pictures if not picture.inputs}
    for session in table:
        if not keys:
            return False
        if session.is_loaded and session.engine == engine and session is not closing:
            keys.difference_update(session.picture_keys)
    return bool(keys)
