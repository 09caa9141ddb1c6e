"""The pump over a real engine on a tiny checkpoint: what every row is answered, when, with which headers, and what that
leaves behind.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import threading
import time

import pytest

from llava_sessions.engine.loop import EngineLoop
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import (
    AskSession,
    Cancelled,
    Closed,
    CloseSession,
    Delta,
    Finished,
    Memory,
    OpenFailed,
    OpenSession,
    Timings,
    TurnFailed,
    Usage,
)
from llava_sessions.protocol import replies
from llava_sessions.protocol.constants import (
    CLOSED_SESSION_HEADER,
    NEW_SESSION,
    NEW_SESSION_HEADER,
    SESSION_HEADER,
    SESSION_ID_PATTERN,
)
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.torchserve.batch import Reply, Row
from llava_sessions.worker.pump import SILENCE_S, SILENT_SWEEPS
from llava_sessions.worker.sessions import GRACE_S
from tests.support.pump_frontend import (
    NOW,
    PATIENCE_S,
    QUESTIONS,
    TTL,
    Frontend,
    code,
    lines,
    model,
    png,
    tokens,
)

EXPIRES_PATTERN = r"[a-zA-Z0-9](-*[a-zA-Z0-9])*;\sExpires=[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"
__all__ = ["model", "tokens"]  # fixtures


@pytest.fixture
def front(model: Model, tokens: ChatTemplate) -> Frontend:
    return Frontend(model, tokens)


@pytest.fixture
def deaf(model: Model, tokens: ChatTemplate) -> Frontend:
    return Frontend(model, tokens, deaf=True)


# --- open ---


def test_an_open_is_answered_with_its_id_and_sagemakers_headers(front):
    row = front.row({"type": "start_session", "image": png()})
    reply = front.answer(row)
    body = json.loads(reply.body)
    assert (reply.status, reply.content_type) == (200, "application/json")
    assert body["session_id"] == row.sequence_id
    assert body["usage"]["image_tokens"] == 16
    assert body["usage"]["prompt_tokens"] > 16
    assert set(reply.headers) == {SESSION_HEADER, NEW_SESSION_HEADER}
    for value in reply.headers.values():
        assert re.fullmatch(EXPIRES_PATTERN, value)
        assert value == f"{row.sequence_id}; Expires={body['expires']}"
    assert body["expires"] == "2027-01-15T08:01:00Z"


def test_opening_hands_the_engine_what_the_conversation_holds(deaf):
    session = opened(deaf)
    (command,) = deaf.commands
    assert isinstance(command, OpenSession)
    assert command.session_id == session
    assert [picture.inputs["pixel_values"].shape for picture in command.pictures] == [(1, 3, 56, 56)]


def test_an_open_behind_the_constant_gets_an_id_of_our_own(front):
    body = {"type": "start_session", "image": png()}
    first, second = front.settle(front.row(body, NEW_SESSION), front.row(body, NEW_SESSION))
    ids = [json.loads(replies[0].body)["session_id"] for replies in (first, second)]
    assert len(set(ids)) == 2
    for session in ids:
        assert SESSION_ID_PATTERN.fullmatch(session)
        assert front.ask(session)["session_id"] == session
    assert all(CLOSED_SESSION_HEADER not in replies[0].headers for replies in (first, second))


def test_an_open_that_brings_an_id_is_refused_and_opens_nothing(front):
    reply = front.answer(front.row({"type": "start_session", "image": png()}, "my-own-id"))
    assert (reply.status, code(reply)) == (400, "invalid_request")
    assert front.commands == []
    assert front.pump.metric_values().open_sessions == 0


def test_an_open_row_is_held_while_its_picture_is_prepared(front, tokens):
    row = front.row({"type": "start_session", "image": png()})
    with tokens.lock:  # the picture waits for its tokens
        assert front.exchange(row) == [None]
        assert front.exchange(row) == [None]
        assert front.pump.busy
    assert front.answer(row).status == 200
    assert not front.pump.busy


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"image": "!"}, 400),
        ({"image": ""}, 400),
        ({"image": base64.b64encode(b"no picture at all").decode()}, 415),
        ({"image": "\ud800"}, 400),
        ({"path": "s3://bucket/key"}, 400),
        ({"path": "/etc/passwd"}, 400),
        ({"path": ""}, 400),
        ({"path": "\ud800"}, 400),
    ],
)
def test_a_refused_picture_gives_its_place_back(model, tokens, fields, status):
    front = Frontend(model, tokens, max_sessions=1)
    row = front.row({"type": "start_session", **fields})
    reply = front.answer(row)
    assert reply.status == status
    assert front.is_ended(row, reply)
    assert front.commands == []
    assert front.open()


def test_a_full_table_refuses_before_any_work(model, tokens):
    front = Frontend(model, tokens, max_sessions=1)
    session = front.open()
    commands = len(front.commands)
    row = front.row({"type": "start_session", "image": "not even a picture"})
    with tokens.lock:
        (reply,) = front.exchange(row)  # at once, not after a look at the picture
    assert (reply.status, code(reply)) == (429, "capacity")
    assert front.is_ended(row, reply)
    assert len(front.commands) == commands
    assert front.ask(session)["session_id"] == session


def test_a_picture_in_preparation_holds_a_place(model, tokens):
    front = Frontend(model, tokens, max_sessions=1)
    first = front.row({"type": "start_session", "image": png()})
    second = front.row({"type": "start_session", "image": png()})
    with tokens.lock:
        held, reply = front.exchange(first, second)
    assert held is None
    assert reply.status == 429
    assert front.answer(first).status == 200


def test_a_closed_session_makes_room(model, tokens):
    front = Frontend(model, tokens, max_sessions=1)
    front.answer(front.close_row(front.open()))
    assert front.open()


# --- ask ---


def test_an_answer_is_told_whole_with_its_facts(front):
    session = front.open()
    reply = front.answer(front.ask_row(session))
    assert (reply.status, reply.content_type, reply.headers) == (200, "application/json", {})
    body = json.loads(reply.body)
    assert set(body) == {"response_text", "session_id", "finish_reason", "usage", "timings"}
    assert body["session_id"] == session
    assert body["finish_reason"] in ("stop", "length")
    assert body["response_text"].strip()
    assert body["usage"]["cached_tokens"] < body["usage"]["prompt_tokens"]
    assert set(body["timings"]) == {"queue_ms", "ttft_ms", "total_ms"}


def test_token_ids_come_when_asked_for(front, tokens):
    body = front.ask(front.open(), return_token_ids=True)
    assert len(body["token_ids"]) == body["usage"]["completion_tokens"]
    text = tokens.tokenizer.decode(body["token_ids"], skip_special_tokens=True).lstrip()
    assert text == body["response_text"]


def test_a_session_is_found_by_its_id_in_the_body(front):
    session = front.open()
    row = front.ask_row(None, session_id=session)
    assert front.body_of(row)["session_id"] == session


def test_later_turns_see_the_earlier_ones_in_the_cache(front):
    session = front.open()
    first = front.ask(session)["usage"]
    second = front.ask(session, QUESTIONS[1])["usage"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["completion_tokens"]
    assert second["cached_tokens"] >= first["prompt_tokens"]


def test_a_row_is_held_until_its_answer_is_there(front):
    row = front.start(front.open())
    for _ in range(3):
        front.step()
        assert front.exchange(row) == [None]
    assert front.pump.busy


def test_a_stop_string_ends_an_answer_before_it(front):
    session = front.open()
    whole = front.ask(session, max_new_tokens=20)["response_text"]
    stop = re.search("[ -~]{2}", whole[1:]).group()
    body = front.ask(front.open(), max_new_tokens=20, stop=stop)
    assert body["response_text"] == whole[: whole.index(stop)]
    assert body["finish_reason"] == "stop"


# --- streams ---


def test_a_stream_tells_the_same_words_as_a_whole_answer(front):
    whole = front.ask(front.open(), max_new_tokens=20)
    (replies,) = front.settle(front.ask_row(front.open(), stream=True, max_new_tokens=20))
    assert len(replies) > 2
    assert [reply.more for reply in replies] == [True] * (len(replies) - 1) + [False]
    assert {reply.content_type for reply in replies} == {"application/x-ndjson"}
    assert {reply.status for reply in replies} == {200}
    told = lines(replies)
    assert "".join(line["delta"] for line in told) == whole["response_text"]
    assert told[-1]["finish_reason"] == whole["finish_reason"]
    assert told[-1]["usage"] == whole["usage"]
    assert all(set(line) == {"delta"} for line in told[:-1])


def test_a_streams_row_is_held_until_the_first_words(front):
    session = front.open()
    row = front.ask_row(session, stream=True, max_new_tokens=200)
    assert front.exchange(row) == [None]
    while (reply := front.exchange(row)[0]) is None:
        front.step()
    assert reply.more is True
    assert lines([reply])[0]["delta"]


def test_a_stream_that_waits_for_words_sends_empty_chunks(front):
    row = front.start(front.open(), stream=True)
    for _ in range(4):
        front.step()
    (reply,) = front.exchange(row)
    assert reply.body
    (reply,) = front.exchange(row)
    assert (reply.body, reply.more) == ("", True)


@pytest.mark.parametrize("max_new_tokens", [1, 6])
def test_a_stream_that_ends_before_its_first_chunk_is_one_whole_answer(front, max_new_tokens):
    row = front.ask_row(front.open(), stream=True, max_new_tokens=max_new_tokens)
    assert front.exchange(row) == [None]
    while front.engine.has_work:
        front.step()
    (reply,) = front.exchange(row)
    assert reply.more is None
    assert reply.content_type == "application/x-ndjson"
    assert lines([reply])[-1]["finish_reason"]
    assert not front.pump.busy


def test_a_refused_stream_is_a_plain_refusal(front):
    reply = front.answer(front.ask_row("nobody", stream=True))
    assert (reply.status, reply.more, reply.content_type) == (404, None, "application/json")


# --- several rows ---


def test_a_second_ask_is_refused_while_the_first_one_runs(front):
    session = front.open()
    expected = front.ask(front.open(), max_new_tokens=12)["response_text"]
    first = front.ask_row(session, max_new_tokens=12)
    second = front.ask_row(session, QUESTIONS[1])
    held, reply = front.exchange(first, second)
    assert held is None
    assert (reply.status, code(reply), reply.headers) == (409, "session_busy", {})
    assert json.loads(front.answer(first).body)["response_text"] == expected
    assert front.ask(session, QUESTIONS[1])["response_text"]


def test_sessions_side_by_side_answer_as_each_does_alone(model, tokens):
    colours = ["red", "blue", "green"]
    alone = []
    for colour, question in zip(colours, QUESTIONS, strict=True):
        front = Frontend(model, tokens)
        alone.append(front.ask(front.open(colour), question, max_new_tokens=10, return_token_ids=True)["token_ids"])
    front = Frontend(model, tokens)
    sessions = [front.open(colour) for colour in colours]
    rows = [
        front.ask_row(session, question, max_new_tokens=10, return_token_ids=True, stream=number == 1)
        for number, (session, question) in enumerate(zip(sessions, QUESTIONS, strict=True))
    ]
    assert [lines(replies)[-1]["token_ids"] for replies in front.settle(*rows)] == alone


# --- close ---


def test_a_close_frees_the_session_and_names_it(front):
    session = front.open()
    front.ask(session)
    assert front.engine.memory().kv_bytes > 0
    reply = front.answer(front.close_row(session))
    assert (reply.status, reply.headers) == (200, {CLOSED_SESSION_HEADER.lower(): session})
    assert front.ended == [session]
    assert json.loads(reply.body) == {"success": True, "session_id": session}
    assert front.engine.memory() == Memory()
    assert front.pump.metric_values().open_sessions == 0


def test_a_closed_session_is_not_found_but_closes_again(front):
    session = front.open()
    front.answer(front.close_row(session))
    reply = front.answer(front.ask_row(session))
    assert (reply.status, reply.headers) == (404, {})
    assert front.answer(front.cancel_row(session)).status == 404
    for _ in range(2):
        again = front.answer(front.close_row(session))
        assert (again.status, again.headers) == (200, {CLOSED_SESSION_HEADER.lower(): session})


def test_a_close_of_an_id_that_never_was_is_not_found(front):
    assert front.answer(front.close_row("nobody")).status == 404


def test_two_closes_at_once_both_succeed(front):
    session = front.open()
    for (reply,) in front.settle(front.close_row(session), front.close_row(session)):
        assert reply.status == 200
    assert [type(command) for command in front.commands].count(CloseSession) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_close_ends_the_running_turn_first(front, stream):
    session = front.open()
    turn = front.start(session, stream=stream)
    front.step()
    turn_replies, (closed,) = front.settle(turn, front.close_row(session))
    last = lines(turn_replies)[-1]
    assert last["finish_reason"] == "cancelled"
    assert last["session_id"] == session
    assert turn_replies[-1].status == 200
    assert (closed.status, closed.headers) == (200, {CLOSED_SESSION_HEADER.lower(): session})
    assert front.engine.memory() == Memory()
    assert front.pump.metric_values().running_turns == 0


def test_a_session_that_is_being_closed_takes_nothing_more(deaf):
    session = opened(deaf)
    closing = deaf.close_row(session)
    assert deaf.exchange(closing) == [None]
    held, refused = deaf.exchange(closing, deaf.ask_row(session))
    assert held is None
    assert (refused.status, code(refused), refused.headers) == (404, "session_not_found", {})
    deaf.now_s = NOW + TTL
    deaf.pump.sweep()
    assert [type(command) for command in deaf.commands].count(CloseSession) == 1
    deaf.tell(Closed(session))
    (reply,) = deaf.exchange(closing)
    assert (reply.status, reply.headers) == (200, {CLOSED_SESSION_HEADER.lower(): session})
    assert deaf.ended == [session]


def test_a_close_leaves_other_sessions_alone(front):
    one, other = front.open(), front.open("blue")
    front.answer(front.close_row(one))
    assert front.ask(other)["session_id"] == other


# --- cancel ---


def test_a_cancel_ends_the_turn_and_tells_both_rows(front):
    session = front.open()
    turn = front.start(session)
    front.step()
    (turn_reply,), (cancel_reply,) = front.settle(turn, front.cancel_row(session))
    body = json.loads(turn_reply.body)
    assert (turn_reply.status, body["finish_reason"], body["session_id"]) == (200, "cancelled", session)
    assert json.loads(cancel_reply.body) == {"success": True, "session_id": session}
    assert turn_reply.headers == cancel_reply.headers == {}


def test_a_cancel_without_a_turn_says_so(front):
    session = front.open()
    assert front.body_of(front.cancel_row(session)) == {"success": False, "session_id": session}


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_cancelled_turn_leaves_the_conversation_as_it_was(front, steps):
    kept, disturbed = front.open(), front.open()
    for session in (kept, disturbed):
        front.ask(session, QUESTIONS[0])
    turn = front.start(disturbed, "Something else entirely?")
    for _ in range(steps):
        front.step()
    front.settle(turn, front.cancel_row(disturbed))
    answers = [front.ask(session, QUESTIONS[1], return_token_ids=True) for session in (kept, disturbed)]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]


def test_a_cancelled_stream_ends_with_a_last_line(front):
    session = front.open()
    turn = front.start(session, stream=True)
    for _ in range(4):
        front.step()
    (first,) = front.exchange(turn)
    assert first.more is True
    replies, _ = front.settle(turn, front.cancel_row(session))
    assert replies[-1].more is False
    last = lines(replies)[-1]
    assert (last["delta"], last["session_id"], last["finish_reason"]) == ("", session, "cancelled")
    assert last["usage"]["completion_tokens"] > 0
    assert 0 < last["timings"]["ttft_ms"] <= last["timings"]["total_ms"]


# --- clients that leave ---


@pytest.mark.parametrize("stream", [False, True])
def test_a_vanished_row_ends_its_turn_and_frees_its_session(front, stream):
    kept, left = front.open(), front.open()
    front.start(left, "Something else entirely?", stream=stream)
    front.step()
    front.exchange()
    assert not front.pump.busy
    front.step()
    front.exchange()
    assert front.pump.metric_values().running_turns == 0
    assert front.ask(left)["response_text"] == front.ask(kept)["response_text"]


def test_a_row_that_vanishes_leaves_the_others_running(front):
    gone, stays = front.open(), front.open("blue")
    front.start(gone)
    row = front.ask_row(stays)
    assert front.answer(row).status == 200


def test_a_client_that_leaves_while_its_picture_is_prepared_opens_nothing(model, tokens):
    front = Frontend(model, tokens, max_sessions=1)
    with tokens.lock:
        assert front.exchange(front.row({"type": "start_session", "image": png()})) == [None]
        front.exchange()
    prepared = front.inbox.get(PATIENCE_S)
    front.inbox.put(prepared)
    front.exchange()
    assert front.commands == []
    assert front.open()


def test_the_sweeper_notices_that_all_clients_left(front):
    session = front.open()
    front.start(session)
    front.pump.sweep()
    assert front.pump.busy  # TorchServe was here a moment ago
    front.skipped_s += SILENCE_S + 1
    for _ in range(SILENT_SWEEPS):
        front.pump.sweep()
    assert not front.pump.busy
    front.step()
    front.pump.sweep()
    assert front.pump.metric_values().running_turns == 0


# --- expiry ---


def test_a_session_answers_up_to_its_expiry_and_then_is_gone(front):
    session = front.open()
    front.now_s = NOW + TTL - 0.01
    assert front.ask(session)["session_id"] == session
    front.now_s = NOW + TTL
    for row in (front.ask_row(session), front.close_row(session), front.cancel_row(session)):
        reply = front.answer(row)
        assert (reply.status, code(reply)) == (410, "session_expired")


def test_the_sweeper_frees_what_expired_and_the_id_stays_expired(front):
    session = front.open()
    front.now_s = NOW + 5
    young = front.open("blue")
    front.now_s = NOW + TTL
    front.pump.sweep()
    front.step()
    assert front.engine.memory().sessions == 2  # what was sent in time may be on its way
    front.now_s = NOW + TTL + GRACE_S
    front.pump.sweep()
    front.step()
    front.exchange()
    assert front.engine.memory().sessions == 1
    assert front.pump.metric_values().open_sessions == 1
    assert front.ended == [session]
    reply = front.answer(front.ask_row(session))
    assert (reply.status, reply.headers) == (410, {})
    assert front.ask(young)["session_id"] == young
    front.now_s = NOW + 5 + TTL + GRACE_S
    front.pump.sweep()
    front.step()
    assert front.engine.memory() == Memory()


def test_a_turn_that_runs_over_the_expiry_is_answered_before_the_session_goes(front):
    session = front.open()
    turn = front.ask_row(session)
    assert front.exchange(turn) == [None]
    front.now_s = NOW + 2 * TTL
    front.pump.sweep()
    reply = front.answer(turn)
    assert json.loads(reply.body)["finish_reason"] in ("stop", "length")
    front.pump.sweep()
    front.step()
    assert front.engine.memory() == Memory()


def test_an_expired_sessions_place_is_free_after_the_sweep(model, tokens):
    front = Frontend(model, tokens, max_sessions=1)
    front.open()
    front.now_s = NOW + TTL + GRACE_S
    front.pump.sweep()
    assert front.open()


# --- which sequences are ended ---


@pytest.mark.parametrize(
    "body",
    [
        b"",
        {"type": "nothing"},
        {"type": "start_session"},
        {"type": "start_session", "image": "!"},
        {"type": "send_text_prompt", "prompt_text": "x", "session_id": "nobody"},
        {"type": "close_session", "session_id": "nobody"},
        {"type": "cancel"},
    ],
)
def test_a_refused_row_without_a_session_ends_the_sequence_made_for_it(front, body):
    row = front.row(body)
    reply = front.answer(row)
    assert reply.status >= 400
    assert front.is_ended(row, reply)
    assert set(reply.headers.values()) <= {row.sequence_id}


@pytest.mark.parametrize("body", [b"", {"type": "nothing"}, {"type": "start_session", "image": png()}])
def test_a_refused_row_of_an_open_session_does_not_end_it(front, body):
    session = front.open()
    reply = front.answer(front.row(body, session))
    assert (reply.status, reply.headers) == (400, {})
    assert front.ask(session)["session_id"] == session


def test_a_refused_row_of_a_session_in_preparation_does_not_end_it(front, tokens):
    opening = front.row({"type": "start_session", "image": png()})
    with tokens.lock:
        assert front.exchange(opening) == [None]
        held, reply = front.exchange(opening, front.ask_row(opening.sequence_id))
    assert held is None
    assert (reply.status, reply.headers) == (404, {})
    assert front.answer(opening).status == 200


def test_answers_of_an_open_session_never_end_it(front):
    session = front.open()
    rows = [front.ask_row(session, stream=stream) for stream in (False, True)]
    replies = [reply for row in rows for reply in front.settle(row)[0]]
    replies += front.settle(front.cancel_row(session))[0]
    assert all(reply.headers == {} for reply in replies)
    assert front.ended == []


@pytest.mark.parametrize("sequence", [NEW_SESSION, "a;b", "nobody;ts-seq-1", ";", ""])
def test_a_sequence_that_is_not_one_clients_own_is_never_ended(front, sequence):
    row = front.row({"type": "nothing"}, NEW_SESSION)
    row = Row(row.request_id, sequence, False, {SESSION_HEADER.lower(): sequence}, row.body)
    reply = front.answer(row)
    assert (reply.status, reply.headers) == (400, {})
    assert front.ended == []


def test_of_two_rows_on_an_unknown_id_only_the_last_one_ends_it(front):
    replies = front.settle(front.ask_row("nobody"), front.ask_row("nobody"))
    assert [reply.status for (reply,) in replies] == [404, 404]
    assert [reply.headers for (reply,) in replies] == [{}, {}]
    assert front.ended == ["nobody"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_row_that_was_held_has_the_sequence_made_for_it_ended_by_a_request(front, stream):
    session = front.open()
    row = front.ask_row(None, session_id=session, stream=stream)
    (replies,) = front.settle(row)
    assert all(reply.headers == {} for reply in replies)
    assert front.ended == [row.sequence_id]


def test_a_vanished_row_has_the_sequence_made_for_it_ended(front):
    session = front.open()
    row = front.start(None, session_id=session)
    front.exchange()
    assert front.ended == [row.sequence_id]


def test_a_vanished_row_of_an_open_session_does_not_end_it(front):
    session = front.open()
    front.start(session)
    front.exchange()
    front.step()
    front.exchange()
    assert front.ended == []
    assert front.ask(session)["session_id"] == session


def test_the_request_that_ends_a_sequence_is_answered_with_its_end(front):
    row = front.ask_row(None, session_id=front.open())
    front.answer(row)
    assert front.ended == [row.sequence_id]
    ours = front.row({"type": "close_session"}, row.sequence_id, dict([front.mark]))
    reply = front.answer(ours)
    assert (reply.status, reply.headers) == (200, {CLOSED_SESSION_HEADER: row.sequence_id})
    assert front.ended == [row.sequence_id]


# --- rows of any kind ---

ABSURD_BODIES = [
    *(
        None,
        0,
        -1.5,
        True,
        "",
        "x",
        b"",
        b"\xff\x00",
        bytearray(b"{"),
        [],
        {},
        [[]],
        "[" * 100_000,
        object(),
        1j,
        {1, 2},
    ),
    *({1: 2}, {None: None}, {"type": {"type": "cancel"}}, {"type": []}, {"type": "cancel", "session_id": ["x"]}),
    *(
        {"type": "send_text_prompt", "session_id": "a", "prompt_text": "q", "seed": 10**5_000},
        memoryview(b"{}"),
        float("nan"),
    ),
]
ABSURD_HEADERS = [
    *({}, None, [], "headers", {SESSION_HEADER.lower(): None}, {SESSION_HEADER.lower(): 7}, {1: 2}),
    *({SESSION_HEADER.lower(): "\ud800"}, {SESSION_HEADER.lower(): "x" * 100_000}, {SESSION_HEADER.lower(): b"abc"}),
]


def test_absurd_rows_are_refused_one_by_one_and_a_good_one_among_them_is_answered(front):
    session = front.open()
    rows = [front.row(body) for body in ABSURD_BODIES]
    bodies = [{"type": "cancel"}, {"type": "start_session"}]
    for headers in ABSURD_HEADERS:
        rows += [Row(f"odd-{len(rows) + n}", "odd", False, headers, body) for n, body in enumerate(bodies)]
    good = front.ask_row(session)
    *odd, (answer,) = front.settle(*rows, good)
    assert json.loads(answer.body)["session_id"] == session
    for (reply,) in odd:
        assert reply.status >= 400
        assert reply.more is None
        assert reply.body.isascii()
        assert set(json.loads(reply.body)["error"]) == {"code", "message"}
    assert not front.pump.busy


def test_no_rows_are_no_replies(front):
    assert front.exchange() == []


# --- the context's end ---


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(front):
    kept, session = front.open(), front.open()
    reply = front.answer(front.ask_row(session, "é" * 2_000))
    assert (reply.status, code(reply), reply.headers) == (422, "context_length_exceeded", {})
    context, needed = map(int, re.findall(r"\d+", json.loads(reply.body)["error"]["message"]))
    assert context == 1024
    assert needed > 4_000
    assert front.ask(session)["response_text"] == front.ask(kept)["response_text"]


def test_a_conversation_fills_its_context_to_the_last_token_and_no_further(front):
    letter = "\x01"  # always a token of its own
    spare = 1023 - front.ask(front.open(), letter, max_new_tokens=1)["usage"]["prompt_tokens"]
    answer = front.ask(front.open(), letter * (1 + spare), max_new_tokens=1024)
    assert answer["usage"]["prompt_tokens"] == 1023
    assert answer["usage"]["completion_tokens"] == 1
    session = front.open()
    reply = front.answer(front.ask_row(session, letter * (2 + spare)))
    assert reply.status == 422
    assert re.findall(r"\d+", json.loads(reply.body)["error"]["message"]) == ["1024", "1025"]
    assert front.answer(front.close_row(session)).status == 200


def test_a_conversation_that_fills_its_context_takes_no_further_turn_but_closes(front):
    session = front.open()
    letter, limit = "\x01", 1024
    first = front.ask(session, letter, max_new_tokens=1)["usage"]["prompt_tokens"]
    front.ask(session, letter * (limit - first - 60), max_new_tokens=1)
    for _ in range(60):
        reply = front.answer(front.ask_row(session, "x", max_new_tokens=1))
        if reply.status != 200:
            break
    assert reply.status == 422
    assert front.answer(front.ask_row(session, "x", max_new_tokens=1)).status == 422
    assert front.answer(front.close_row(session)).status == 200


def test_a_picture_that_leaves_no_room_for_a_question_is_refused(model, tokens):
    body = {"type": "start_session", "image": png()}
    needed = json.loads(Frontend(model, tokens).answer(Frontend(model, tokens).row(body)).body)["usage"][
        "prompt_tokens"
    ]
    front = Frontend(model, tokens, max_sessions=1, context_tokens=needed)
    reply = front.answer(front.row(body))
    assert (reply.status, code(reply)) == (422, "context_length_exceeded")
    assert front.commands == []
    assert front.pump.metric_values().open_sessions == 0
    roomier = Frontend(model, tokens, context_tokens=needed + 1)
    assert roomier.answer(roomier.row(body)).status == 200


def test_a_reply_that_was_known_before_a_silence_reaches_the_row_that_returns(deaf):
    session = opened(deaf)
    row = deaf.start(session)
    deaf.tell(Finished(row.request_id, "stop", "a", [70, 2], [70], Usage(1, 0, 2), Timings(0, 0, 0)))
    deaf.skipped_s += SILENCE_S + 1
    for _ in range(SILENT_SWEEPS):
        deaf.pump.sweep()
    assert not deaf.pump.busy
    reply = deaf.answer(row)
    assert (reply.status, json.loads(reply.body)["response_text"]) == (200, "a")


def test_a_conversation_keeps_what_the_engine_keeps(deaf):
    session = opened(deaf)
    row = deaf.start(session, return_token_ids=True)
    deaf.tell(Finished(row.request_id, "stop", "a", [70, 2], [70], Usage(1, 0, 2), Timings(0, 0, 0)))
    assert deaf.body_of(row)["token_ids"] == [70, 2]
    opening, ask = deaf.commands
    assert deaf.table.get(session, NOW).transcript.token_ids == [*opening.token_ids, *ask.token_ids, 70]


# --- several pictures, and pictures of a later turn ---


def test_an_open_takes_several_pictures(front):
    one = front.body_of(front.row({"type": "start_session", "image": png()}))
    two = front.body_of(front.row({"type": "start_session", "images": [png(), png("blue")]}))
    assert (one["usage"]["image_tokens"], two["usage"]["image_tokens"]) == (16, 32)
    assert front.ask(two["session_id"])["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("fields", [{"image": png("blue")}, {"images": [png("blue")]}])
def test_a_question_brings_its_own_picture(front, fields):
    plain, shown = front.open(), front.open()
    counts = [front.ask(session, QUESTIONS[0])["usage"]["prompt_tokens"] for session in (plain, shown)]
    with_picture = front.ask(shown, QUESTIONS[1], **fields)
    without = front.ask(plain, QUESTIONS[1])
    assert counts[0] == counts[1]
    assert with_picture["usage"]["prompt_tokens"] >= without["usage"]["prompt_tokens"] + 16
    assert front.ask(shown, QUESTIONS[2], return_token_ids=True)["token_ids"]


def test_the_engine_gets_a_questions_pictures_with_their_tokens(deaf, tokens):
    session = opened(deaf)
    row = deaf.ask_row(session, images=[png("blue"), png("green")])
    settle_preparing(deaf, row)
    ask = deaf.commands[-1]
    assert isinstance(ask, AskSession)
    assert len(ask.pictures) == 2
    assert ask.token_ids.count(tokens.image_token_id) == 32


def settle_preparing(front: Frontend, *rows: Row) -> None:
    """Exchange until the pool has prepared what the rows brought, and the engine has got it."""
    known, until = len(front.commands), time.monotonic() + PATIENCE_S
    while len(front.commands) == known:
        assert time.monotonic() < until, "nothing was prepared"
        assert front.exchange(*rows) == [None] * len(rows)


def test_a_session_is_busy_while_a_questions_picture_is_prepared(front, tokens):
    session = front.open()
    row, other = front.ask_row(session, image=png("blue")), front.ask_row(session)
    with tokens.lock:  # the picture waits for its tokens
        assert front.exchange(row) == [None]
        held, busy = front.exchange(row, other)
        assert held is None
        assert (busy.status, code(busy)) == (409, "session_busy")
        assert front.pump.metric_values().running_turns == 1
    assert front.answer(row).status == 200
    assert front.ask(session)["session_id"] == session


@pytest.mark.parametrize("image", ["bm90IGEgcGljdHVyZQ==", "%%%"])
def test_a_questions_bad_picture_is_refused_and_the_session_goes_on(front, image):
    kept, tried = front.open(), front.open()
    reply = front.answer(front.ask_row(tried, images=[png(), image]))
    assert reply.status in (400, 415)
    assert front.pump.metric_values().running_turns == 0
    assert not any(isinstance(command, AskSession) for command in front.commands)
    answers = [front.ask(session, return_token_ids=True)["token_ids"] for session in (kept, tried)]
    assert answers[0] == answers[1]


def test_too_many_pictures_are_refused_before_any_is_read(front):
    session = front.open()
    reply = front.answer(front.ask_row(session, images=["not read"] * 9))
    assert (reply.status, code(reply)) == (413, "too_large")
    assert front.ask(session)["session_id"] == session


def test_a_questions_pictures_that_do_not_fit_are_refused_with_both_numbers(model, tokens):
    front = Frontend(model, tokens, context_tokens=120)
    session = front.open()
    reply = front.answer(front.ask_row(session, images=[png("blue")] * 8))
    assert (reply.status, code(reply)) == (422, "context_length_exceeded")
    assert "120 tokens" in json.loads(reply.body)["error"]["message"]
    assert front.ask(session, "x")["session_id"] == session


def test_a_client_that_leaves_while_its_questions_picture_is_prepared_frees_the_session(front, tokens):
    session = front.open()
    with tokens.lock:
        assert front.exchange(front.ask_row(session, image=png("blue"))) == [None]
        assert front.exchange() == []
        assert front.pump.metric_values().running_turns == 0
        assert not front.pump.busy
    assert front.ask(session)["session_id"] == session
    assert sum(isinstance(command, AskSession) for command in front.commands) == 1


def test_a_question_is_cancelled_while_its_picture_is_prepared(front, tokens):
    session = front.open()
    row, cancel = front.ask_row(session, image=png("blue")), front.cancel_row(session)
    with tokens.lock:
        assert front.exchange(row) == [None]
        told, done = front.exchange(row, cancel)
    assert json.loads(told.body)["finish_reason"] == "cancelled"
    assert json.loads(done.body)["success"] is True
    assert front.ask(session)["session_id"] == session
    assert sum(isinstance(command, AskSession) for command in front.commands) == 1


def test_a_session_is_closed_while_a_questions_picture_is_prepared(front, tokens):
    session = front.open()
    row, close = front.ask_row(session, image=png("blue")), front.close_row(session)
    with tokens.lock:
        assert front.exchange(row) == [None]
        told, done = front.exchange(row, close)
    assert json.loads(told.body)["finish_reason"] == "cancelled"
    assert json.loads(done.body)["success"] is True
    assert front.engine.memory() == Memory()
    assert front.answer(front.ask_row(session)).status == 404


# --- what the engine fails at ---


def opened(front: Frontend) -> str:
    """A session of a deaf front: as the pump sees it, without an engine's word."""
    return front.body_of(front.row({"type": "start_session", "image": png()}))["session_id"]


def error_id(reply: Reply) -> str:
    return re.fullmatch(r".*ID ([0-9a-f]{8})\.", json.loads(reply.body)["error"]["message"]).group(1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_turn_is_told_by_an_id_that_the_log_has(deaf, caplog, stream):
    session = opened(deaf)
    row = deaf.start(session, stream=stream)
    deaf.tell(TurnFailed(row.request_id, "RuntimeError: secret cause"))
    (reply,) = deaf.exchange(row)
    assert (reply.status, code(reply), reply.more) == (500, "internal", None)
    assert reply.headers == {}
    assert "secret" not in reply.body
    told = [record for record in caplog.records if error_id(reply) in record.getMessage()]
    assert len(told) == 1
    assert "secret cause" in caplog.text


def test_a_failed_turn_leaves_the_session_as_before_it(deaf):
    session = opened(deaf)
    first = deaf.start(session)
    deaf.tell(TurnFailed(first.request_id, "boom"))
    deaf.exchange(first)
    second = deaf.start(session)
    asks = [command for command in deaf.commands if isinstance(command, AskSession)]
    assert [ask.turn_id for ask in asks] == [first.request_id, second.request_id]
    assert asks[0].token_ids == asks[1].token_ids


def test_a_stream_that_fails_midway_ends_with_an_error_line(deaf):
    row = deaf.start(opened(deaf), stream=True)
    deaf.tell(Delta(row.request_id, "some "))
    (first,) = deaf.exchange(row)
    assert (first.more, first.body) == (True, replies.line({"delta": "some "}))
    deaf.tell(Delta(row.request_id, "words"), TurnFailed(row.request_id, "boom"))
    (last,) = deaf.exchange(row)
    assert last.more is False
    assert lines([last])[0] == {"delta": "words"}
    assert lines([last])[-1]["error"]["code"] == "internal"
    assert not deaf.pump.busy


def test_words_that_were_not_sent_yet_are_dropped_when_a_stream_fails(deaf):
    row = deaf.start(opened(deaf), stream=True)
    deaf.tell(Delta(row.request_id, "words"), TurnFailed(row.request_id, "boom"))
    (reply,) = deaf.exchange(row)
    assert (reply.status, code(reply), reply.more) == (500, "internal", None)


def test_an_acknowledged_session_whose_picture_failed_is_rebuilt_by_its_next_turn(model, tokens):
    front = Frontend(model, tokens, max_sessions=1, deaf=True)
    session = opened(front)
    row = front.start(session)
    front.tell(TurnFailed(row.request_id, "boom"), OpenFailed(session, "boom"))
    (reply,) = front.exchange(row)
    assert (reply.status, code(reply)) == (500, "internal")
    front.start(session)
    assert [type(command) for command in front.commands] == [OpenSession, AskSession, OpenSession, AskSession]
    assert front.pump.metric_values().open_sessions == 1
    assert front.ended == []


def test_a_picture_that_the_engine_fails_at_once_costs_no_session(front):
    good = front.open()
    row, until = front.row({"type": "start_session", "image": png("blue")}), time.monotonic() + PATIENCE_S
    while row.sequence_id not in front.engine.sessions and time.monotonic() < until:
        front.exchange(row)
    front.engine.sessions[row.sequence_id].pictures[0].prepared = None  # nothing that can be encoded
    front.step()
    assert front.exchange(row)[0].status == 200  # there was room for it
    front.step()
    assert front.engine.memory().sessions == 1
    assert front.ask(row.sequence_id)["finish_reason"] in ("stop", "length")
    assert front.ask(good)["session_id"] == good


def test_an_open_that_the_engine_can_not_take_is_refused_and_its_place_is_free(front):
    row, until = front.row({"type": "start_session", "image": png()}), time.monotonic() + PATIENCE_S
    front.engine.device_memory.admit = None  # makes every open raise
    replies = [None]
    while replies == [None] and time.monotonic() < until:
        replies = front.exchange(row)
        front.step()
    assert (replies[0].status, code(replies[0])) == (500, "internal")
    assert row.sequence_id not in front.table


# --- repeated requests, deadlines, clips ---

RETRY = "3f0c6a52-7f0e-4a55-9d39-2b1f0f6f1c11"


def test_a_repeated_ask_is_told_again_and_not_run_again(front):
    session = front.open()
    first = front.ask(session, request_id=RETRY)
    assert front.ask(session, request_id=RETRY) == first
    ((*_, last),) = front.settle(front.ask_row(session, request_id=RETRY, stream=True))
    lines = [json.loads(line) for line in last.body.splitlines()]
    assert "".join(line["delta"] for line in lines) == first["response_text"]
    assert lines[-1]["usage"] == first["usage"]
    assert front.pump.metric_values().turns_total == 1
    other = front.ask(session, "another question", request_id=RETRY)
    assert other["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]


def test_a_client_that_leaves_a_shared_new_session_sequence_does_not_end_it_for_others(model, tokens):
    front = Frontend(model, tokens)
    with tokens.lock:
        row = front.row({"type": "start_session", "image": png()}, NEW_SESSION)
        assert front.exchange(row) == [None]
        front.exchange()
    front.inbox.put(front.inbox.get(PATIENCE_S))
    front.exchange()
    assert front.ended == []
    assert opened(front)


def test_a_repeated_ask_joins_the_running_turn(front):
    session = front.open()
    first = front.start(session, request_id=RETRY, max_new_tokens=8)
    front.step()
    whole, streamed = (
        front.ask_row(session, request_id=RETRY, max_new_tokens=8, stream=stream) for stream in (False, True)
    )
    (reply,), (told,), chunks = front.settle(first, whole, streamed)
    answer = json.loads(reply.body)
    assert json.loads(told.body) == answer
    lines = [json.loads(line) for chunk in chunks for line in chunk.body.splitlines()]
    assert "".join(line["delta"] for line in lines) == answer["response_text"]
    assert front.pump.metric_values().turns_total == 1


def test_a_turn_goes_on_for_the_row_that_joined_it(front):
    session = front.open()
    first = front.start(session, request_id=RETRY, max_new_tokens=8)
    front.step()
    second = front.ask_row(session, request_id=RETRY, max_new_tokens=8)
    front.exchange(first, second)
    assert json.loads(front.answer(second).body)["finish_reason"] in {"stop", "length"}


def test_a_repeated_open_is_the_same_session(front):
    body = {"type": "start_session", "image": png(), "request_id": RETRY}
    first = front.answer(front.row(body))
    again = front.row(body)
    reply = front.answer(again)
    assert (reply.body, reply.headers[SESSION_HEADER]) == (first.body, first.headers[SESSION_HEADER])
    assert front.is_ended(again, reply)
    assert front.pump.metric_values().open_sessions == 1
    other = front.body_of(front.row({**body, "image": png("blue")}))
    assert other["session_id"] != json.loads(first.body)["session_id"]


def test_an_open_that_is_repeated_while_it_runs_is_told_to_both(front):
    for image, status in ((png(), 200), ("bm8gcGljdHVyZQ==", 415)):
        rows = [front.row({"type": "start_session", "image": image, "request_id": RETRY}) for _ in range(2)]
        (first,), (second,) = front.settle(*rows)
        assert (first.status, first.body) == (status, second.body)
    assert front.pump.metric_values().open_sessions == 1


def test_a_closed_session_is_no_answer_to_a_repeated_open(front):
    body = {"type": "start_session", "image": png(), "request_id": RETRY}
    first = front.body_of(front.row(body))["session_id"]
    front.answer(front.row({"type": "close_session"}, first))
    assert front.body_of(front.row(body))["session_id"] != first


def test_the_deadline_reaches_the_engine_and_its_end_the_client(deaf):
    session = opened(deaf)
    row = deaf.start(session, deadline_ms=60_000)
    assert 0 < deaf.commands[-1].sampling.deadline_ms <= 60_000
    deaf.tell(Cancelled(row.request_id, "deadline", Usage(30, 19, 0), Timings(1.0, 2.0, 2.0)))
    told = json.loads(deaf.exchange(row)[0].body)
    assert (told["response_text"], told["finish_reason"]) == ("", "deadline")
    assert told["usage"] == {"prompt_tokens": 30, "cached_tokens": 19, "completion_tokens": 0}
    assert told["timings"] == {"queue_ms": 1.0, "ttft_ms": 2.0, "total_ms": 2.0}


def test_a_clip_is_refused_by_a_model_that_takes_none(front):
    reply = front.answer(front.row({"type": "start_session", "video": [png(), png("blue")]}))
    assert (reply.status, code(reply)) == (415, "unsupported_media")


def test_events_about_nobody_are_passed_over(deaf):
    session = opened(deaf)
    row = deaf.start(session)
    nobody = Finished("nobody", "stop", "", [], [], Usage(0, 0, 0), Timings(0, 0, 0))
    deaf.tell(nobody, Delta("nobody", "x"), TurnFailed("nobody", "x"), OpenFailed("nobody", "x"))
    assert deaf.exchange(row) == [None]
    deaf.tell(TurnFailed(row.request_id, "boom"))
    assert deaf.exchange(row)[0].status == 500


# --- figures and logs ---


def test_the_figures_count_what_happened(front):
    session = front.open()
    front.ask(session)
    front.ask(session, QUESTIONS[1])
    front.answer(front.ask_row("nobody"))
    row = front.start(session)
    figures = front.pump.metric_values()
    assert (figures.open_sessions, figures.running_turns) == (1, 1)
    assert (figures.turns_total, figures.value("llava_refusals_total")) == (2, 1)
    assert {code: count for code, count in figures.refusals_total.items() if count} == {"session_not_found": 1}
    memory = front.engine.memory()
    assert (figures.features_bytes, figures.kv_bytes) == (memory.features_bytes, memory.kv_bytes)
    assert figures.device_bytes == memory.features_bytes + memory.kv_bytes
    front.settle(row, front.cancel_row(session))
    assert front.pump.metric_values().turns_total == 2


def test_logs_hold_no_words_and_no_whole_ids(front, caplog):
    caplog.set_level(logging.DEBUG, logger="llava_sessions")
    session = front.open(session=NEW_SESSION)
    words = front.ask(session, "My very private question")["response_text"]
    front.answer(front.close_row(session))
    assert "session_open" in caplog.text
    assert "turn_done" in caplog.text
    assert "session_close" in caplog.text
    assert "private" not in caplog.text
    assert words.strip() not in caplog.text
    assert session not in caplog.text


# --- with the engine in its thread ---


def test_many_rows_over_the_engines_own_thread_are_all_answered(model, tokens):
    alone = Frontend(model, tokens)
    expected = [alone.ask(alone.open(), question)["response_text"] for question in QUESTIONS]
    front = Frontend(model, tokens, max_sessions=6)
    loop = EngineLoop(front.engine, front.put)
    front.submit, front.step = loop.submit, lambda: None
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        opens = [front.row({"type": "start_session", "image": png()}) for _ in range(6)]
        ids = [json.loads(reply.body)["session_id"] for (reply,) in front.settle(*opens)]
        rows = [front.ask_row(i, QUESTIONS[n % 3], stream=n % 2 == 0) for n, i in enumerate(ids)]
        for n, replies in enumerate(front.settle(*rows)):
            told = lines(replies)
            text = told[-1].get("response_text", "".join(line.get("delta", "") for line in told))
            assert text == expected[n % 3]
        closed = front.settle(*[front.close_row(session) for session in ids])
        assert [reply.status for (reply,) in closed] == [200] * 6
    finally:
        loop.stop()
        thread.join()
    assert front.engine.memory() == Memory()
