"""A slow or unreadable journal after a restart of the worker: claims that overlap, and recovery that is repeated."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_sessions.journal.journal import Journal
from llava_sessions.journal.stores import DirectoryStore, StoreError
from tests.support.pump_frontend import PATIENCE_S, QUESTIONS, Frontend, code, model, png, tokens

__all__ = ["model", "tokens"]  # fixtures

OPEN_ID = "00000000-0000-4000-8000-000000000001"
ASK_ID = "00000000-0000-4000-8000-000000000002"


class GatedStore(DirectoryStore):
    """A directory whose owner record is replaced only while the gate is open. `reached`: a claim waits at the gate."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.gate = threading.Event()
        self.reached = threading.Event()

    def replace(self, key: str, name: str, data: bytes, version: object) -> object:
        done = super().replace(key, name, data, version)
        self.reached.set()
        self.gate.wait(PATIENCE_S)
        return done


@pytest.fixture
def restarted(model, tokens, tmp_path: Path) -> Iterator[tuple[Frontend, GatedStore, str]]:
    """A worker after a restart, its gated store, and a session with one answered turn that only the journal holds."""
    before = Frontend(model, tokens, journal=Journal([DirectoryStore(str(tmp_path))]))
    opened = before.body_of(before.row({"type": "start_session", "image": png(), "request_id": OPEN_ID}))
    before.ask(opened["session_id"], request_id=ASK_ID)
    store = GatedStore(tmp_path)
    after = Frontend(model, tokens, journal=Journal([store]), first_row=100)
    after.pump.recover()
    yield after, store, opened["session_id"]
    store.gate.set()


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.rglob("*.rec"))


def test_a_close_during_a_claim_removes_the_session_for_good(restarted, model, tokens, tmp_path):
    front, store, session = restarted
    ask = front.ask_row(session)
    front.exchange(ask)
    assert store.reached.wait(PATIENCE_S)
    close = front.close_row(session)
    _, reply = front.exchange(ask, close)
    assert reply is None, "the journal still holds the session"
    store.gate.set()
    _, (closed,) = front.settle(ask, close)
    assert closed.status == 200
    assert files(tmp_path) == []
    later = Frontend(model, tokens, journal=Journal([DirectoryStore(str(tmp_path))]), first_row=200)
    later.pump.recover()
    assert later.answer(later.ask_row(session)).status == 404


def test_two_claims_of_one_worker_do_not_take_the_session_from_each_other(restarted):
    front, store, session = restarted
    ask = front.ask_row(session, QUESTIONS[1])
    front.exchange(ask)
    assert store.reached.wait(PATIENCE_S)
    again = front.row({"type": "start_session", "image": png(), "request_id": OPEN_ID})
    front.exchange(ask, again)
    store.gate.set()
    (answered,), (opened,) = front.settle(ask, again)
    assert json.loads(answered.body)["finish_reason"] in ("stop", "length")
    assert json.loads(opened.body)["session_id"] == session
    assert front.ask(session)["session_id"] == session


def test_a_retried_ask_is_answered_from_the_journal_although_another_request_has_read_it(restarted):
    front, store, session = restarted
    with front.template_lock:  # the ask has claimed the session and waits for its prompt
        store.gate.set()
        ask = front.ask_row(session, request_id=ASK_ID)
        front.exchange(ask)
        again = front.row({"type": "start_session", "image": png(), "request_id": OPEN_ID})
        front.settle_beside(ask, again)
    ((answer,),) = front.settle(ask)
    assert json.loads(answer.body)["session_id"] == session
    assert front.pump.metric_values().turns_total == 0


class FailingStore(DirectoryStore):
    """A directory that cannot be read while `fails` is set: as a whole, or in the records of each session."""

    def __init__(self, path: Path, as_a_whole: bool) -> None:
        super().__init__(str(path))
        self.fails = threading.Event()
        self.fails.set()
        self._as_a_whole = as_a_whole

    def keys(self) -> list[str]:
        if self._as_a_whole and self.fails.is_set():
            raise StoreError("cannot read: Input/output error")
        return super().keys()

    def read(self, key: str, name: str) -> object:
        if self.fails.is_set():
            raise StoreError("cannot read: Input/output error")
        return super().read(key, name)


@pytest.mark.parametrize("as_a_whole", [True, False])
def test_a_journal_that_cannot_be_read_at_start_is_read_later_and_loses_no_session(model, tokens, tmp_path, as_a_whole):
    before = Frontend(model, tokens, journal=Journal([DirectoryStore(str(tmp_path))]))
    before.now_s = time.time()  # unreadable records are kept for a day after their file's time
    session = before.open()
    first = before.ask(session)
    store = FailingStore(tmp_path, as_a_whole)
    after = Frontend(model, tokens, journal=Journal([store]), first_row=100)
    after.now_s = time.time()
    after.pump.recover()
    for row in (after.ask_row(session), after.close_row(session), after.cancel_row(session)):
        reply = after.answer(row)
        assert (reply.status, code(reply), "Retry-After" in reply.headers) == (503, "journal_unavailable", True)
    store.fails.clear()
    until = time.monotonic() + PATIENCE_S
    while not len(after.table) and time.monotonic() < until:
        after.pump.sweep()
        time.sleep(0.01)
    second = after.ask(session)
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"], second
    unknown = after.answer(after.ask_row("unknown"))
    assert (unknown.status, code(unknown)) == (404, "session_not_found")
