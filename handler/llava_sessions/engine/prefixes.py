"""KV that one session copies from another instead of computing it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from .content import shared_tokens
from .faults import first_line, is_out_of_memory
from .session import EngineSession

log = logging.getLogger(__name__)


def copy_opening(session: EngineSession, others: Iterable[EngineSession]) -> None:
    """Copy the opening's KV into a cold cache from a session with the same opening, if one has computed it.

    If the device is out of memory the session is left as it is: it prefills the opening itself.
    """
    tokens = session.opening_tokens
    donor = next((each for each in others if each.kv.length >= tokens and each.prefix == session.prefix), None)
    if tokens and donor is not None:
        _copy(session, donor, tokens)


def fork(session: EngineSession, donor: EngineSession) -> None:
    """Copy the KV of the longest common prefix from any other session into a cold cache, as far as it is computed.

    The prefix is compared by token IDs and picture keys. Without memory as in `copy_opening`.
    """
    tokens = shared_tokens(session, donor, donor.kv.length)
    if tokens:
        _copy(session, donor, tokens)


def _copy(session: EngineSession, donor: EngineSession, tokens: int) -> None:
    try:
        session.kv.fork(donor.kv, tokens)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("fork_failed error=%s", first_line(error))
