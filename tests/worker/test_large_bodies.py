"""Large bodies: parsed once, on a thread of their own, in order, and sent by TorchServe as rarely as possible."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest

from llava_sessions.ipc.messages import AskSession, OutOfCapacity, StopTurn, TurnFailed
from llava_sessions.protocol import validation
from llava_sessions.protocol.constants import JSON_TYPE, STREAM_TYPE
from llava_sessions.torchserve.receiving import BatchTransfer
from llava_sessions.worker import arrivals, pump
from llava_sessions.worker.pending import LARGE_BYTES
from tests.support.manual import ManualExecutor
from tests.support.pump_frontend import PATIENCE_S, QUESTIONS, Frontend, code, lines, model, png, tokens

__all__ = ["model", "tokens"]

RETRY = "3f0c6a52-7f0e-4a55-9d39-2b1f0f6f1c11"


@pytest.fixture
def front(model, tokens) -> Frontend:
    return Frontend(model, tokens)


@pytest.fixture
def parsing() -> ManualExecutor:
    return ManualExecutor()


@pytest.fixture
def slow(model, tokens, parsing) -> Frontend:
    """A pump whose large bodies are parsed when a test says so."""
    return Frontend(model, tokens, parsing=parsing)


@pytest.fixture
def deaf(model, tokens) -> Frontend:
    return Frontend(model, tokens, deaf=True)


@pytest.fixture
def threads(monkeypatch) -> Iterator[dict[str, list[str]]]:
    """The names of the threads on which bodies were parsed and hashed, in order."""
    names: dict[str, list[str]] = {"parse": [], "_retry_key": []}
    for module, name in ((arrivals, "parse"), (validation, "_retry_key")):
        monkeypatch.setattr(module, name, _noted(getattr(module, name), names[name]))
    return names


def _noted(function: Callable, names: list[str]) -> Callable:
    def noted(*args):
        names.append(threading.current_thread().name)
        return function(*args)

    return noted


# --- where, and how often ---


def test_a_large_body_is_parsed_and_hashed_once_and_never_on_the_pumps_thread(front, threads):
    session = front.open()
    for seen in threads.values():
        seen.clear()
    row = front.large_ask(session, request_id=RETRY, image=png())
    ((*_, last),) = front.settle(row)
    assert json.loads(last.body)["finish_reason"] in {"stop", "length"}
    assert threads == {"parse": ["parse_0"], "_retry_key": ["parse_0"]}


def test_a_turn_in_the_engine_holds_neither_the_text_nor_the_arrays_of_its_pictures(front):
    session = front.open()
    row = front.start(session, image=png("blue"), request_id=RETRY)
    turn = front.table.find(session).turn
    assert turn.ask.pictures == ()
    assert turn.prepared is None
    retry = front.row(row.body, session)
    ((*_, first), (*_, second)) = front.settle(row, retry)
    assert json.loads(first.body) == json.loads(second.body)


def test_a_small_body_is_parsed_on_the_pumps_thread_in_the_step_of_its_arrival(front, threads):
    session = front.open()
    threads["parse"].clear()
    assert code(front.exchange(front.ask_row(session, "  "))[0]) == "invalid_request"
    assert threads["parse"] == [threading.current_thread().name]


@pytest.mark.parametrize("body", [b"{", b'{"type": "start_session"}', b'{"type": "send_text_prompt", "image": "!"}'])
def test_a_large_body_that_is_wrong_has_its_own_status(front, body):
    row = front.row(body + b" " * LARGE_BYTES)
    reply = front.answer(row)
    assert (reply.status, code(reply)) == (400, "invalid_request")
    assert front.is_ended(row, reply)


# --- order ---


def test_a_session_goes_on_in_the_order_of_arrival(slow, parsing):
    session = slow.open()
    other = slow.open("blue")
    ask = slow.large_ask(session)
    close = slow.close_row(session)
    beside = slow.ask_row(other)
    assert slow.exchange(ask, close, beside)[:2] == [None, None]
    assert json.loads(slow.settle_with(beside, ask, close).body)["finish_reason"] in {"stop", "length"}
    parsing.run_all()
    (*_, asked), (closed,) = slow.settle(ask, close)
    assert json.loads(asked.body)["finish_reason"] == "cancelled"
    assert json.loads(closed.body)["success"] is True


def test_a_later_body_that_is_parsed_first_waits(slow, parsing):
    session = slow.open()
    first = slow.large_ask(session, prompt_text=QUESTIONS[1])
    second = slow.large_ask(session)
    assert slow.exchange(first, second) == [None, None]
    parsing.run(1)
    assert slow.exchange(first, second) == [None, None]
    assert not any(isinstance(command, AskSession) for command in slow.commands)
    parsing.run(0)
    _, busy = slow.exchange(first, second)
    assert code(busy) == "session_busy"
    ((*_, answered),) = slow.settle(first)
    assert json.loads(answered.body)["finish_reason"] in {"stop", "length"}


def test_a_cancel_behind_a_question_cancels_it(slow, parsing):
    session = slow.open()
    ask = slow.large_ask(session)
    cancel = slow.row({"type": "cancel", "session_id": session})
    assert slow.exchange(ask, cancel) == [None, None]
    parsing.run_all()
    (*_, asked), (cancelled,) = slow.settle(ask, cancel)
    assert json.loads(asked.body)["finish_reason"] == "cancelled"
    assert json.loads(cancelled.body)["success"] is True


def test_a_client_that_leaves_before_its_body_is_parsed_starts_nothing(slow, parsing, threads):
    session = slow.open()
    threads["parse"].clear()
    started = len(slow.commands)
    ask, opened = slow.large_ask(session), slow.large({"type": "start_session", "image": png("blue")})
    assert slow.exchange(ask, opened) == [None, None]
    slow.exchange()
    parsing.run_all()
    assert threads["parse"] == []
    assert slow.exchange() == []
    assert len(slow.commands) == started
    assert not slow.pump.busy
    assert slow.ended == [opened.sequence_id]
    assert slow.ask(session)["finish_reason"] in {"stop", "length"}


def test_a_client_that_leaves_while_its_body_is_parsed_starts_nothing(front, monkeypatch):
    session = front.open()
    started = len(front.commands)
    begun, left = threading.Event(), threading.Event()
    parse = arrivals.parse

    def wait_and_parse(*args):
        begun.set()
        left.wait(PATIENCE_S)
        return parse(*args)

    monkeypatch.setattr(arrivals, "parse", wait_and_parse)
    assert front.exchange(front.large_ask(session)) == [None]
    assert begun.wait(PATIENCE_S)
    front.exchange()
    left.set()
    front.inbox.put(front.inbox.get(PATIENCE_S))
    front.exchange()
    assert len(front.commands) == started


# --- commitment to status 200 ---


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_large_question_is_sent_no_more_once_its_turn_is_admitted(front, is_stream):
    session = front.open()
    expected = front.ask(front.open(), image=png("blue"))["response_text"]
    row = front.large_ask(session, image=png("blue"), stream=is_stream)
    while not any(isinstance(command, AskSession) and command.turn_id == row.request_id for command in front.commands):
        assert front.exchange(row) == [None]
    front.tell(*front.engine._events)  # the admission leaves before the first step
    front.engine._events.clear()
    (head,) = front.exchange(row)
    assert (head.body, head.more, head.status) == ("", True, 200)
    assert head.content_type == (STREAM_TYPE if is_stream else JSON_TYPE)
    ((*chunks, last),) = front.settle(row)
    assert last.more is False
    found = lines([*chunks, last])
    text = "".join(line["delta"] for line in found) if is_stream else found[-1]["response_text"]
    assert text == expected
    assert all(not chunk.body for chunk in chunks) or is_stream


def test_a_small_question_keeps_its_status_to_the_end(front):
    row = front.start(front.open(), max_new_tokens=6)
    front.step()
    assert front.exchange(row) == [None]
    assert front.answer(row).more is None


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"image": "bm8gcGljdHVyZQ=="}, 415), ({"image": "!"}, 400), ({"prompt_text": "word " * 6000}, 422)],
)
def test_what_a_large_request_is_to_blame_for_has_its_own_status(front, fields, status):
    reply = front.answer(front.large_ask(front.open(), **fields))
    assert (reply.status, reply.more) == (status, None)


def test_a_large_question_that_memory_can_not_hold_has_its_own_status(deaf):
    session = deaf.open()
    row = _started(deaf, session)
    deaf.tell(OutOfCapacity(session, row.request_id, 2, 1, 1))
    reply = deaf.answer(row)
    assert (reply.status, code(reply)) == (429, "capacity")


def test_a_failure_after_the_commitment_is_a_body_and_a_retry_runs_again(front):
    session = front.open()
    row = front.large_ask(session, request_id=RETRY, max_new_tokens=50)
    head = None
    while head is None:
        (head,) = front.exchange(row)
        front.step()
    assert (head.status, head.more) == (200, True)
    front.tell(TurnFailed(row.request_id, "a test"))
    (last,) = front.exchange(row)
    assert last.more is False
    assert json.loads(head.body + last.body)["error"]["code"] == "internal"
    front.engine.apply(StopTurn(row.request_id, "cancelled", keep_answer=False))
    while front.engine.has_work:
        front.step()
    before = front.pump.metric_values().turns_total
    ((*_, again),) = front.settle(front.large_ask(session, request_id=RETRY, max_new_tokens=50))
    assert json.loads(again.body)["finish_reason"] in {"stop", "length"}
    assert front.pump.metric_values().turns_total == before + 1


def _started(front: Frontend, session: str):
    row = front.large_ask(session)
    while not any(isinstance(command, AskSession) for command in front.commands):
        assert front.exchange(row) == [None]
    return row


# --- steps while large rows are held ---


def test_a_step_with_large_held_rows_lasts_as_long_as_its_delivery(slow, parsing, monkeypatch):
    stream = slow.start(slow.open(), stream=True)
    now_s = [1e9]
    monkeypatch.setattr(slow.pump, "_clock", lambda: now_s[0])

    def get(timeout_s: float = 0.0):
        """Return what has arrived; otherwise let the whole time pass."""
        try:
            return take()
        except queue.Empty:
            now_s[0] += timeout_s
            raise

    take = slow.inbox.get
    monkeypatch.setattr(slow.inbox, "get", get)

    def lasts(delivery_s: float, *rows) -> float:
        """The time that a step takes in which the stream has output."""
        slow.step()
        began_s = now_s[0] = now_s[0] + delivery_s
        slow.exchange(stream, *rows)
        return now_s[0] - began_s

    slow.exchange(stream)
    assert lasts(0.1) == 0
    held = [slow.row(b" " * 1_000_000) for _ in range(2)]
    assert lasts(0.1, *held) == pytest.approx(0.1)
    # The frontend was idle before.
    assert lasts(60.0, *held) == pytest.approx(2_000_000 / pump.SLOWEST_DELIVERY_BYTES_PER_S)
    parsing.run_all()
    assert lasts(60.0, *held) == 0


def test_clients_are_not_disconnected_while_torchserve_delivers_large_bodies(slow, parsing):
    stream = slow.start(slow.open(), stream=True)
    large = slow.row(b" " * 2 * pump.LARGE_SILENCE_BYTES)
    assert slow.exchange(stream, large) == [None, None]
    slow.skipped_s += pump.LARGE_SILENCE_S - pump.SILENCE_S
    _sweep(slow)
    parsing.run_all()
    assert code(slow.exchange(stream, large)[1]) == "invalid_request"
    slow.skipped_s += pump.SILENCE_S + 0.5
    _sweep(slow)
    assert not slow.pump.busy  # the large row arrived a minute ago


def test_clients_are_not_disconnected_when_large_bodies_have_just_arrived(slow, parsing):
    stream = slow.start(slow.open(), stream=True)
    large = slow.row(b" " * 2 * pump.LARGE_SILENCE_BYTES)
    slow.exchange(stream, large)
    parsing.run_all()
    assert code(slow.exchange(stream, large)[1]) == "invalid_request"
    slow.skipped_s += pump.SILENCE_S + 0.5
    _sweep(slow)
    assert slow.pump.busy
    slow.skipped_s += pump.LARGE_SILENCE_S
    _sweep(slow)
    assert not slow.pump.busy


def test_clients_are_not_disconnected_while_a_batch_arrives(front):
    front.start(front.open())
    front.skipped_s += pump.SILENCE_S + 1.0
    for _ in range(pump.SILENT_SWEEPS + 1):
        front.pump.sweep(is_receiving=True)
    assert front.pump.busy
    _sweep(front)
    assert not front.pump.busy


def test_a_batch_on_its_way_is_seen_by_the_work_of_the_thread_that_receives_it():
    begin, worked, end = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begin.wait()
        for _ in range(200):
            sum(range(100_000))
        worked.set()
        end.wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    transfer = BatchTransfer(thread, None)
    assert not transfer.is_active()
    begin.set()
    worked.wait()
    assert transfer.is_active()
    assert not transfer.is_active()
    end.set()
    thread.join()


def test_a_batch_on_its_way_is_seen_by_the_work_of_the_frontend():
    # 0.5 s more than its start took, which is over when it prints for the first time.
    program = (
        "import sys, time\nprint(flush=True)\nfor _ in sys.stdin:\n end_s = time.process_time() + 0.5\n"
        " while time.process_time() < end_s: pass\n print(flush=True)"
    )
    command = [sys.executable, "-c", program]
    end = threading.Event()
    waiting = threading.Thread(target=end.wait, daemon=True)
    waiting.start()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as frontend:
        frontend.stdout.readline()
        transfer = BatchTransfer(waiting, psutil.Process(frontend.pid))
        frontend.stdin.write("go\n")
        frontend.stdin.flush()
        frontend.stdout.readline()
        assert transfer.is_active()
        assert not transfer.is_active()
        frontend.stdin.close()
    assert not transfer.is_active()  # the frontend is gone
    end.set()
    waiting.join()


def _sweep(front: Frontend) -> None:
    for _ in range(pump.SILENT_SWEEPS):
        front.pump.sweep()
