"""Recovery of stored sessions after a restart of the worker, repeated until the journal could be read."""

from __future__ import annotations

import logging
from concurrent.futures import Future

from ..errors import Refused
from ..journal.journal import JournalUnavailable, Recovered
from .context import WorkerContext
from .openings import Openings
from .pending import refusal_of

log = logging.getLogger(__name__)


class Recovery:
    """Adds stored sessions to the table. Until that is complete, an unknown session ID may be one of them."""

    def __init__(self, context: WorkerContext, openings: Openings) -> None:
        self._context = context
        self._openings = openings
        self._is_complete = True
        self._is_running = False

    def run(self) -> None:
        """Read the journal and add its sessions. Call it once, before the first row. Blocks."""
        self._add(self._context.journal.recover(self._context.clock()))

    def retry(self) -> None:
        """Read a journal again that could not be read, in the background. Call it about once a second."""
        if not self._is_complete and not self._is_running:
            self._is_running = True
            self._context.inbox.when_done(self._context.preparer.recover(), self._retried)

    def error_for(self, error: Refused) -> Refused:
        """Return the error that a client receives: an unknown session may still be in an unread journal."""
        if error.code == "session_not_found" and not self._is_complete:
            return refusal_of(JournalUnavailable())
        return error

    def _retried(self, recovered: Future[Recovered]) -> None:
        self._is_running = False
        self._add(recovered.result())

    def _add(self, found: Recovered) -> None:
        context = self._context
        self._is_complete = found.complete
        for stored in found.expired:
            context.table.remember(stored.session_id, "expired", stored.token_digest)
        added = 0
        for stored in found.live:
            now_s = context.clock()
            added += context.table.recover(stored.session_id, stored.expires_at_s, now_s, stored.token_digest)
            if stored.retry_key is not None:
                self._openings.remember(stored.retry_key, stored.session_id)
        if added or found.expired:
            log.info("journal_recovered sessions=%d expired=%d", added, len(found.expired))
