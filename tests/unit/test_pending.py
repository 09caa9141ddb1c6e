"""The reply to a pending request in each form: pieces, the end of a stream, errors, and a client that comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llava_sessions.config import RequestLimits
from llava_sessions.errors import Refused
from llava_sessions.ipc.messages import Timings, Usage
from llava_sessions.protocol import replies
from llava_sessions.protocol.openai import OpenAIForm, RefusedChat
from llava_sessions.protocol.replies import NativeForm, ReplyForm
from llava_sessions.torchserve.batch import Reply, Row
from llava_sessions.worker.arrivals import Arrivals
from llava_sessions.worker.inbox import Inbox
from llava_sessions.worker.pending import PendingRequest, PendingTable

FACTS = replies.answer_facts("s1", "stop", Usage(5, 4, 2), Timings(0.1, 1.0, 2.0), None)
SSE = OpenAIForm(completion_id="c1", model="m")
LINES = OpenAIForm(completion_id="c1", model="m", is_sse=False)
FORMS: list[ReplyForm] = [NativeForm(), SSE, LINES]
CONTENT_TYPES = ["application/x-ndjson", "text/event-stream", "application/x-ndjson"]


def row(**headers: str) -> Row:
    return Row("r1", "q1", False, headers, b"{}")


def pending(form: ReplyForm, streamed: bool = True) -> PendingRequest:
    request = PendingRequest(row(), form=form)
    request.streamed = streamed
    return request


def objects(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def text_of(objects: list[Any]) -> str:
    """Return the text of a stream of any form."""
    sent = [one for one in objects if one != "[DONE]"]
    return "".join(one["delta"] if "delta" in one else one["choices"][0]["delta"].get("content", "") for one in sent)


@pytest.mark.parametrize(("form", "content_type"), list(zip(FORMS, CONTENT_TYPES, strict=True)))
def test_the_pieces_of_all_steps_are_the_answer(form: ReplyForm, content_type: str) -> None:
    request = pending(form)
    assert (request.content_type, request.has_output, request.take_chunk()) == (content_type, False, "")
    request.stream("There")
    request.stream("")
    request.stream(" are")
    assert request.has_output
    first = request.take_chunk()
    assert not request.has_output
    request.head_sent = True
    request.stream(" two.")
    request.answer("There are two.", FACTS)
    final = request.take_final()
    assert (final.more, final.content_type) == (False, content_type)
    assert text_of(objects(first + final.body)) == "There are two."


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_whose_text_is_known_at_once_is_one_reply(form: ReplyForm) -> None:
    request = pending(form)
    request.stream("Two.")
    request.answer("Two.", FACTS)
    assert text_of(objects(request.take_final().body)) == "Two."


def test_lines_are_one_object_a_step() -> None:
    request = pending(LINES)
    for text in ("a", "b", "c"):
        request.stream(text)
    assert len(objects(request.take_chunk())) == 1
    request.stream("d")
    request.answer("abcd", FACTS)
    assert len(objects(request.take_final().body)) == 1


def test_the_role_is_sent_once() -> None:
    for form in (SSE, LINES):
        request = pending(form)
        chunks = []
        for text in ("a", "b"):
            request.stream(text)
            chunks += objects(request.take_chunk())
        request.answer("ab", FACTS)
        chunks += objects(request.take_final().body)
        assert json.dumps(chunks).count('"role"') == 1
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_answer_is_one_body(form: ReplyForm) -> None:
    request = pending(form, streamed=False)
    request.stream("Two.")
    assert not request.has_output
    request.answer("Two.", FACTS)
    final = request.take_final()
    assert (final.status, final.more, final.content_type) == (200, None, "application/json")
    assert json.loads(final.body) == form.whole("Two.", FACTS)


@pytest.mark.parametrize("form", FORMS)
def test_an_error_before_the_status_has_its_own(form: ReplyForm) -> None:
    request = pending(form)
    request.stream("lost")
    request.refuse(Refused("engine_restarting", "Try again.", retry_after_s=3))
    final = request.take_final()
    assert (final.status, final.headers) == (503, {"Retry-After": "3"})
    assert json.loads(final.body) == form.error(Refused("engine_restarting", "Try again."))


def test_an_error_of_the_context_has_openais_status_in_openais_form() -> None:
    statuses = {}
    for name, form in (("native", NativeForm()), ("openai", SSE)):
        request = pending(form)
        request.refuse(Refused("context_length_exceeded", "Too long."))
        statuses[name] = request.take_final().status
    assert statuses == {"native": 422, "openai": 400}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streamed", [True, False])
def test_an_error_after_the_status_ends_the_reply(form: ReplyForm, streamed: bool) -> None:
    request = pending(form, streamed)
    request.stream("Tw")
    request.head_sent = True
    refused = Refused("internal", "No.")
    request.refuse(refused)
    final = request.take_final()
    sent = objects(final.body)
    is_sse = form is SSE and streamed
    assert sent[-1] == "[DONE]" if is_sse else sent[-1] == form.error(refused)
    assert form.error(refused) in sent
    assert final.more is False
    assert text_of([one for one in sent if "error" not in one]) == ("Tw" if streamed else "")


def test_the_form_of_an_error_is_known_by_the_path_or_by_the_body() -> None:
    table = PendingTable()
    native = table.add(row())[0]
    native.refuse(Refused("invalid_request", "x"))
    assert json.loads(native.take_final().body) == {"error": {"code": "invalid_request", "message": "x"}}
    for headers, error in (
        ({"url_path": "v1/chat/completions"}, Refused("invalid_request", "x")),
        ({}, RefusedChat("invalid_request", "x")),
    ):
        request = table.add(row(**headers))[0]
        request.refuse(error)
        assert json.loads(request.take_final().body)["error"] == {
            "message": "x",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_request",
        }


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "invalid_request_error"),
        ({"messages": []}, "invalid_request_error"),
        ({"type": "close_session", "session_id": "s1"}, None),
    ],
)
def test_an_error_of_a_request_that_was_read_has_the_form_of_its_words(body: dict, error: str | None) -> None:
    arrivals = Arrivals(Inbox(), RequestLimits(), 10_000)
    request = PendingTable().add(row())[0]
    arrivals.add(request, json.dumps(body).encode())

    def start(*_: object) -> None:
        raise Refused("session_not_found", "x")

    arrivals.start_ready(start)
    assert json.loads(request.take_final().body)["error"].get("type") == error


def test_a_client_that_was_dropped_receives_the_known_end_in_its_form() -> None:
    table = PendingTable()
    request = table.add(row())[0]
    request.form = LINES
    request.streamed = True
    request.stream("a")
    request.take_chunk()
    request.head_sent = True
    request.stream("b")
    request.answer("ab", FACTS)
    assert table.drop_missing(active=set()) == [request]
    back, has_returned = table.add(row())
    assert (has_returned, back.head_sent) == (True, True)
    (last,) = objects(back.take_final().body)
    assert last["choices"][0]["delta"] == {"content": "b"}


def test_a_dropped_client_without_an_end_starts_anew() -> None:
    table = PendingTable()
    request = table.add(row())[0]
    request.streamed = True
    request.stream("a")
    table.drop_missing(active=set())
    back, _ = table.add(row())
    assert (back.has_output, back.final) == (False, None)


def test_a_reply_of_another_kind_is_unchanged() -> None:
    request = pending(NativeForm(), streamed=False)
    request.reply({"success": True}, {"a": "b"})
    assert request.take_final() == Reply('{"success": true}', headers={"a": "b"})
    with pytest.raises(RuntimeError, match="last reply already"):
        request.reply({})
