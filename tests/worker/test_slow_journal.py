"""The pump over a journal whose disk hangs: whoever closes a session waits for that, and nobody else does."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from llava_sessions.journal.journal import Journal
from llava_sessions.journal.stores import DirectoryStore
from tests.support.pump_frontend import Frontend, model, tokens

__all__ = ["model", "tokens"]  # fixtures


class HangingStore(DirectoryStore):
    """A directory from which nothing can be removed until `works` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.works = threading.Event()

    def remove(self, key: str) -> None:
        self.works.wait(60)
        super().remove(key)


def test_a_journal_that_hangs_at_a_close_holds_up_no_stream(model, tokens, tmp_path) -> None:
    store = HangingStore(tmp_path)
    front = Frontend(model, tokens, journal=Journal([store]), close_wait_s=30.0)  # as the engine may take
    closed, other = front.open(), front.open("blue")
    stream = front.start(other, stream=True)
    close = front.close_row(closed)
    began, told = time.monotonic(), 0
    while told < 3:
        front.step()
        end, words = front.exchange(close, stream)
        assert end is None
        told += words is not None
    assert time.monotonic() - began < 30
    store.works.set()
    (reply,), _ = front.settle(close, stream)
    assert reply.status == 200
