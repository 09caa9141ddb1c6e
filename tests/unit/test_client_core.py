"""The core of llava_sessions_client: what it sends, repeats, and returns. No network."""

from __future__ import annotations

import json
import re
from collections import deque
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import llava_sessions_client as client
from llava_sessions_client import (
    AnswerChanged,
    ApiError,
    Busy,
    ChatClosed,
    ConnectionFailed,
    ContextLengthExceeded,
    Description,
    InvalidRequest,
    OverCapacity,
    SessionExpired,
    SessionLost,
    SessionMoved,
    TimedOut,
    TooLarge,
    Unavailable,
)
from llava_sessions_client.answers import Answer, Turn
from llava_sessions_client.clips import Clip
from llava_sessions_client.conversation import MAX_REPLAYS, Conversation
from llava_sessions_client.effects import Call, Left, Piece, Sleep, Start
from llava_sessions_client.errors import api_error
from llava_sessions_client.lines import split_lines
from llava_sessions_client.pictures import picture_of
from llava_sessions_client.wire import Reply
from tests.support.client_script import CANCELLED, CLOSED, OPENED, Script, answer, completion, lines, refusal, settings
from tests.support.pictures import PNG

CUT = ConnectionFailed("the connection broke")
REFUSED = ConnectionFailed("no server", connected=False)
LATE = TimedOut("no reply")
PICTURE = picture_of(PNG, "a.png")
MOVED = refusal(503, "session_moved", retry_after_s=2.0)


def opened(*results: Any, turns: tuple[Turn, ...] = (), on_lost: str = "raise", **timeouts: float) -> Script:
    """Return the script of a conversation whose session is open; `results` are those of its later requests."""
    conversation = Conversation(settings(**timeouts), (PICTURE,), turns, on_lost)
    script = Script(conversation, OPENED, *results)
    script.run(conversation.open())
    script.bodies.clear()
    script.sessions.clear()
    return script


def ask(script: Script, text: str = "Which?", **options: Any) -> Answer:
    return script.run(script.conversation.ask(text, (), options, stream=False))


def stream(script: Script, text: str = "Which?", leave_after: int | None = None, **options: Any) -> Answer:
    return script.run(script.conversation.ask(text, (), options, stream=True), leave_after)


def texts(script: Script) -> list[str]:
    """Return the texts of the messages of the latest request."""
    contents = [message["content"] for message in script.bodies[-1]["messages"]]
    return [content if isinstance(content, str) else content[-1]["text"] for content in contents]


def turn(text: str, reply: str) -> Turn:
    return Turn(text, Answer(reply))


def test_lines_end_at_lf_only_and_parts_may_end_anywhere() -> None:
    data = lines("Es ", "grün", " 🟩", "a\u2028b\u2029c\x85d\x0be", ".")
    expected = data.split(b"\n")[:-1]
    for cut in range(len(data) + 1):
        assert list(split_lines([data[:cut], data[cut:]])) == expected
    assert list(split_lines([data[:-1]])) == expected, "a body that ends without LF"


# --- open and close ---------------------------------------------------------------------------------------------------


def test_an_open_has_the_picture_and_its_reply_the_session() -> None:
    conversation = Conversation(settings(), (PICTURE,))
    script = Script(conversation, OPENED)
    script.run(conversation.open())
    [body] = script.bodies
    assert (body["type"], body["image"]) == ("start_session", PICTURE.base64)
    assert len(body["request_id"]) >= 16
    assert script.sessions == [""]
    assert (conversation.session_id, conversation.expires_at) == ("abc-1", datetime(2030, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("failure", [CUT, LATE, MOVED, refusal(502, "x"), refusal(429, "capacity", retry_after_s=1.0)])
def test_an_open_is_repeated_with_its_request_id(failure: Any) -> None:
    conversation = Conversation(settings(), (PICTURE,))
    script = Script(conversation, failure, failure, OPENED)
    script.run(conversation.open())
    assert len({body["request_id"] for body in script.bodies}) == 1
    assert script.bodies[0] == script.bodies[1] == script.bodies[2]


def test_an_open_whose_replies_are_all_lost_is_closed() -> None:
    conversation = Conversation(settings(), (PICTURE,))
    script = Script(conversation, *[CUT] * 5, OPENED, CLOSED)
    with pytest.raises(ConnectionFailed, match="broke"):
        script.run(conversation.open())
    *opens, close = script.bodies
    assert len(opens) == 6
    assert len({body["request_id"] for body in opens}) == 1
    assert (close, script.sessions[-1]) == ({"type": "close_session"}, "abc-1")


def test_an_open_that_never_reached_a_server_is_given_up_soon() -> None:
    conversation = Conversation(settings(), (PICTURE,))
    script = Script(conversation, *[REFUSED] * 3)
    with pytest.raises(ConnectionFailed):
        script.run(conversation.open())
    assert len(script.bodies) == 3


def test_an_open_on_sagemaker_is_confirmed() -> None:
    conversation = Conversation(replace(settings(), confirm_s=60), (PICTURE,))
    script = Script(conversation, CUT, OPENED, CUT, CANCELLED)
    script.run(conversation.open())
    *opens, _, confirmation = script.bodies
    assert [body["confirm_s"] for body in opens] == [60, 60]
    assert (confirmation, script.sessions[-1]) == ({"type": "cancel"}, "abc-1")


def test_a_close_is_repeated_and_a_lost_session_is_closed() -> None:
    for results in ([CUT, CLOSED], [refusal(404, "session_not_found")], [refusal(410, "session_expired")]):
        script = opened(*results)
        script.run(script.conversation.close())
        script.run(script.conversation.close())
        assert not script.results
        with pytest.raises(ChatClosed):
            ask(script)


# --- questions --------------------------------------------------------------------------------------------------------


def test_a_question_has_its_options_and_the_answer_its_facts() -> None:
    script = opened(answer("Two.", durable=True, token_ids=[1, 2]))
    got = ask(script, "How many?", max_new_tokens=9, timeout_s=20.0)
    [body] = script.bodies
    assert {**body, "request_id": "x"} == {
        "type": "send_text_prompt",
        "prompt_text": "How many?",
        "max_new_tokens": 9,
        "deadline_ms": 20_000,
        "request_id": "x",
    }
    assert script.sessions == ["abc-1"]
    assert (str(got), got.finish_reason, got.durable, got.token_ids) == ("Two.", "stop", True, (1, 2))
    assert (got.usage.computed_tokens, got.timings.ttft_ms, got.request_id) == (2, 20.0, body["request_id"])
    assert script.conversation.turns == (Turn("How many?", got),)


def test_a_sampled_answer_has_a_seed_that_repeats() -> None:
    script = opened(CUT, answer("A."), answer("B."))
    ask(script, temperature=0.7)
    first, second = script.bodies
    assert first == second
    assert 0 <= first["seed"] < 2**63
    ask(script, temperature=0.7, seed=5)
    assert script.bodies[-1]["seed"] == 5
    assert first["request_id"] != script.bodies[-1]["request_id"]


@pytest.mark.parametrize(
    "failure",
    [CUT, REFUSED, LATE, MOVED, refusal(503, "engine_restarting"), refusal(504, "timeout"), answer("x").body[:9]],
)
def test_a_question_is_repeated_with_the_same_body(failure: Any) -> None:
    from llava_sessions_client.wire import Reply

    failure = Reply(200, failure) if isinstance(failure, bytes) else failure
    script = opened(failure, answer("Two."))
    assert ask(script).text == "Two."
    assert script.bodies[0] == script.bodies[1]
    assert len(script.sleeps) == 1
    assert len(script.conversation.turns) == 1


def test_the_pause_is_at_least_retry_after_and_grows() -> None:
    script = opened(MOVED, CUT, CUT, answer("Two."))
    ask(script)
    assert script.sleeps[0] == 2.0
    assert 0.25 <= script.sleeps[1] <= 0.5
    assert 0.5 <= script.sleeps[2] <= 1.0


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_request", InvalidRequest),
        (404, "session_not_found", SessionLost),
        (410, "session_expired", SessionExpired),
        (409, "session_busy", Busy),
        (413, "too_large", TooLarge),
        (415, "unsupported_media", InvalidRequest),
        (422, "context_length_exceeded", ContextLengthExceeded),
        (429, "capacity", OverCapacity),
    ],
)
def test_a_refusal_is_raised_at_once_and_leaves_no_doubt(status: int, code: str, kind: type[Exception]) -> None:
    script = opened(refusal(status, code), answer("Two."))
    with pytest.raises(kind, match=rf"{status} {code}: Why\."):
        ask(script)
    ask(script)
    assert [body["type"] for body in script.bodies] == ["send_text_prompt"] * 2


def test_the_class_of_an_error_follows_its_code_then_its_status() -> None:
    assert type(api_error(503, "session_moved", "")) is SessionMoved
    assert type(api_error(200, "engine_restarting", "")) is Unavailable
    assert type(api_error(413, "unexpected_reply", "")) is TooLarge
    assert issubclass(SessionExpired, SessionLost)


def test_retries_end_with_the_last_error_and_with_the_time() -> None:
    script = opened(*[MOVED] * 5)
    with pytest.raises(SessionMoved):
        ask(script)
    script = opened(MOVED, answer("Two."))
    with pytest.raises(SessionMoved):
        ask(script, timeout_s=1.0)
    assert script.sleeps == [], "a pause that ends after the time-out is not begun"


# --- doubt: the server may have a turn that the caller has not --------------------------------------------------------


def test_a_question_that_failed_never_becomes_a_turn() -> None:
    script = opened(answer("Two."), *[LATE] * 5, CANCELLED, completion("Red."), answer("Blue."))
    ask(script, "First?")
    with pytest.raises(TimedOut):
        ask(script, "Lost?")
    assert script.bodies[-1] == {"type": "cancel"}
    assert ask(script, "Second?", max_new_tokens=7).text == "Red."
    body = script.bodies[-1]
    assert body["messages"] == [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Second?"},
    ]
    assert body["max_completion_tokens"] == 7
    assert script.sessions[-1] == "abc-1"
    assert ask(script, "Third?").text == "Blue."
    assert script.bodies[-1]["type"] == "send_text_prompt", "the server's transcript is known again"
    assert [each.text for each in script.conversation.turns] == ["First?", "Second?", "Third?"]


def test_a_session_that_still_runs_the_callers_own_question_is_asked_again() -> None:
    busy = refusal(409, "session_busy")
    script = opened(*[LATE] * 5, CUT, CUT, CUT, CUT, CUT, busy, completion("Red."))
    with pytest.raises(TimedOut):
        ask(script, "Lost?")
    script.results = type(script.results)([busy, completion("Red.")])
    assert ask(script, "Second?").text == "Red."


# --- streams ----------------------------------------------------------------------------------------------------------


def test_pieces_arrive_however_the_body_is_cut() -> None:
    data = lines("Es ", "ist grün", " 🟩.")
    for size in (1, 2, 3, 7, len(data)):
        script = opened([data[start : start + size] for start in range(0, len(data), size)])
        got = stream(script)
        assert (got.text, script.pieces) == ("Es ist grün 🟩.", ["Es ", "ist grün", " 🟩."])
        assert script.bodies[0]["stream"] is True
        assert 0 < got.ttft_s <= got.total_s


@pytest.mark.parametrize("cut", [CUT, LATE, b""])
def test_a_cut_stream_is_repeated_and_each_piece_delivered_once(cut: Any) -> None:
    script = opened([lines("There ", "are", end=False), cut], [lines("There", " are two", " shapes.")])
    got = stream(script)
    assert script.bodies[0] == script.bodies[1]
    assert script.pieces == ["There ", "are", " two", " shapes."]
    assert got.text == "There are two shapes."
    assert len(script.conversation.turns) == 1


def test_a_stream_that_ends_with_an_error_line_is_repeated_or_raised() -> None:
    restarting = b'{"error": {"code": "engine_restarting", "message": "Why."}}\n'
    script = opened([lines("A", end=False) + restarting], [lines("A", "B")])
    assert stream(script).text == "AB"
    assert script.pieces == ["A", "B"]
    script = opened([b'{"error": {"code": "internal", "message": "Why."}}\n'])
    with pytest.raises(Exception, match="internal"):
        stream(script)


def test_another_answer_than_the_delivered_one_is_an_error_that_has_it() -> None:
    for second in (["There is", " one."], ["Th"]):
        script = opened([lines("There are", end=False), CUT], [lines(*second)])
        with pytest.raises(AnswerChanged) as raised:
            stream(script)
        assert raised.value.answer.text == "".join(second)
        assert script.pieces == ["There are"]
        assert [each.answer.text for each in script.conversation.turns] == ["".join(second)]


def test_leaving_a_stream_cancels_the_turn() -> None:
    script = opened([lines("A", "B")], CANCELLED, completion("C."))
    with pytest.raises(Left):
        stream(script, leave_after=1)
    assert (script.aborts, script.bodies[-1]) == (1, {"type": "cancel"})
    assert script.conversation.turns == ()
    ask(script, "Next?")
    assert script.bodies[-1]["messages"] == [{"role": "user", "content": "Next?"}]


def test_a_turn_that_another_client_cancelled_is_no_turn() -> None:
    script = opened(answer("Tw", finish_reason="cancelled"), completion("C."))
    assert ask(script).finish_reason == "cancelled"
    assert script.conversation.turns == ()
    ask(script)
    assert "messages" in script.bodies[-1]


# --- lost sessions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["session_not_found", "session_expired"])
def test_a_lost_session_is_opened_again_with_its_history(code: str) -> None:
    lost = refusal(410 if code == "session_expired" else 404, code)
    again = type(OPENED)(200, b"{}", "abc-2; Expires=2031-01-01T00:00:00Z")
    script = opened(answer("Two."), lost, again, answer("Red."), on_lost="replay")
    first = ask(script, "First?")
    got = ask(script, "Second?")
    _, asked, reopened, repeated = script.bodies
    assert reopened["history"] == [{"prompt_text": "First?", "response_text": "Two."}]
    assert reopened["image"] == PICTURE.base64
    assert {**asked, "request_id": ""} == {**repeated, "request_id": ""}
    assert asked["request_id"] != repeated["request_id"]
    assert script.sessions == ["abc-1", "abc-1", "", "abc-2"]
    assert (got.text, got.replayed, first.replayed) == ("Red.", True, False)
    assert script.conversation.turns == (Turn("First?", first), Turn("Second?", got))


def test_a_session_that_is_lost_during_a_stream_delivers_the_rest() -> None:
    lost = refusal(404, "session_not_found")
    script = opened([lines("There ", end=False), CUT], lost, OPENED, [lines("There are", " two.")], on_lost="replay")
    got = stream(script)
    assert script.pieces == ["There ", "are", " two."]
    assert (got.text, got.replayed) == ("There are two.", True)


@pytest.mark.parametrize(
    ("results", "at", "text"),
    [
        ([[lines("A", end=False), CUT]], Sleep, "A"),  # in the pause before a retry
        ([refusal(404, "session_not_found")], Start, ""),  # in the attempt that finds the session lost
        ([refusal(404, "session_not_found"), OPENED], Call, ""),  # while the session is opened again
    ],
)
def test_a_cancel_between_two_attempts_begins_no_further_one(results: list[Any], at: type, text: str) -> None:
    history = (turn("Which?", "Red."), turn("Where?", "Left."))
    script = opened(*results, turns=history, on_lost="replay")
    script.during = lambda effect: isinstance(effect, at) and script.conversation.stop()
    got = script.run(script.conversation.rewrite(0, "How many?", {}, stream=True))
    assert (got.text, got.finish_reason, script.results) == (text, "cancelled", deque())
    assert script.conversation.turns == history
    assert script.conversation.in_doubt


def test_a_lost_session_is_raised_without_replay_and_replays_are_bounded() -> None:
    lost = refusal(404, "session_not_found")
    script = opened(lost)
    with pytest.raises(SessionLost):
        ask(script)
    script = opened(*[lost, OPENED] * MAX_REPLAYS, lost, on_lost="replay")
    with pytest.raises(SessionLost):
        ask(script)
    assert not script.results


def test_an_instance_that_sagemaker_does_not_reach_is_lost_after_retries() -> None:
    gone = Unavailable(503, "ServiceUnavailable", "No instance.")
    script = opened(*[gone] * 3, OPENED, answer("Two."), on_lost="replay")
    assert ask(script).replayed
    script = opened(*[gone] * 5)
    with pytest.raises(Unavailable):
        ask(script)


# --- clips ------------------------------------------------------------------------------------------------------------


FILE = Clip(b"clip", sampled_frames=3, name="a.mp4")
FILE_URL = "data:video/mp4;base64,Y2xpcA=="
FRAMES = Clip(frames=(PICTURE, PICTURE))


def test_a_session_is_opened_on_a_clip_and_asked_about_others() -> None:
    conversation = Conversation(settings(), (), clip=FILE)
    script = Script(conversation, OPENED, answer("Two."), answer("Three."))
    script.run(conversation.open())
    for text, clip in (("Which?", FRAMES), ("And here?", None)):
        script.run(conversation.ask(text, (PICTURE,), {}, stream=False, clip=clip))
    opening, first, second = script.bodies
    assert (opening["type"], opening["video"], opening["video_frames"]) == ("start_session", FILE_URL, 3)
    assert "image" not in opening
    assert (first["image"], first["video"]) == (PICTURE.base64, [PICTURE.base64] * 2)
    assert "video_frames" not in first
    assert "video" not in second
    assert [turn.clip for turn in conversation.turns] == [FRAMES, None]


def test_a_lost_session_is_opened_again_with_its_clips() -> None:
    conversation = Conversation(settings(), (), on_lost="replay", clip=FRAMES)
    lost = refusal(404, "session_not_found")
    script = Script(conversation, OPENED, answer("Two."), lost, OPENED, answer("Three."))
    script.run(conversation.open())
    script.run(conversation.ask("Which?", (), {}, stream=False, clip=FILE))
    assert script.run(conversation.ask("And here?", (), {}, stream=False)).replayed
    again = script.bodies[3]
    assert again["video"] == [PICTURE.base64] * 2
    assert (again["history"][0]["video"], again["history"][0]["video_frames"]) == (FILE_URL, 3)


@pytest.mark.parametrize(("clip", "sent"), [(None, []), (FRAMES, [FILE, FRAMES])])
def test_a_rewrite_repeats_the_clip_of_the_open_if_the_server_needs_it(clip: Clip | None, sent: list[Clip]) -> None:
    conversation = Conversation(settings(), (), clip=FILE)
    script = Script(conversation, OPENED, answer("Two."), completion("Three."))
    script.run(conversation.open())
    script.run(conversation.ask("Which?", (), {}, stream=False, clip=clip))
    script.run(conversation.rewrite(0, "And now?", {}, stream=False))
    [message] = script.bodies[-1]["messages"]
    parts = [{"type": "video_url", "video_url": {"url": one.data_url}} for one in sent]
    if sent:
        parts[0]["video_url"]["video_frames"] = 3
        assert parts[1]["video_url"]["url"] == f"data:video/jpeg;base64,{PICTURE.base64},{PICTURE.base64}"
    assert message["content"] == ([*parts, {"type": "text", "text": "And now?"}] if sent else "And now?")
    assert conversation.turns == (Turn("And now?", conversation.turns[0].answer, (), clip),)


# --- edits ------------------------------------------------------------------------------------------------------------


def test_an_edit_sends_the_conversation_up_to_its_turn() -> None:
    history = (turn("First?", "Two."), Turn("And here?", Answer("Red."), (PICTURE,)), turn("Third?", "Blue."))
    script = opened(completion("Green."), turns=history)
    got = script.run(script.conversation.rewrite(1, "Not here?", {}, stream=False))
    [body] = script.bodies
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE.base64}"}}
    assert body["messages"] == [
        {"role": "user", "content": [shown, {"type": "text", "text": "First?"}]},
        {"role": "assistant", "content": "Two."},
        {
            "role": "user",
            "content": [shown, {"type": "text", "text": "Not here?"}],
        },
    ]
    assert (got.text, got.usage.cached_tokens, got.timings.ttft_ms) == ("Green.", 3, 20.0)
    assert script.conversation.turns == (history[0], Turn("Not here?", got, (PICTURE,)))


@pytest.mark.parametrize(("has_history", "shown", "sent"), [(False, 0, 0), (False, 1, 2), (True, 0, 1), (True, 1, 2)])
def test_a_rewrite_repeats_the_pictures_of_the_open_if_the_server_needs_them(
    has_history: bool, shown: int, sent: int
) -> None:
    first = Turn("First?", Answer("Two."), (PICTURE,) * shown)
    script = opened(answer("Two."), completion("Green."), turns=(first,) if has_history else ())
    script.run(script.conversation.ask("First?", first.pictures, {}, stream=False))
    script.run(script.conversation.rewrite(0, None, {}, stream=False))
    content = script.bodies[-1]["messages"][0]["content"]
    assert [part["type"] for part in content if isinstance(part, dict)] == (
        ["image_url"] * sent + ["text"] if sent else []
    )
    assert len(script.conversation.turns[0].pictures) == shown


def test_a_retry_repeats_the_last_question_and_an_edit_needs_a_turn() -> None:
    script = opened(completion("Three."), turns=(turn("First?", "Two."),))
    script.run(script.conversation.rewrite(-1, None, {"temperature": 0.5}, stream=False))
    assert texts(script) == ["First?"]
    assert "seed" in script.bodies[0]
    with pytest.raises(IndexError):
        script.run(script.conversation.rewrite(1, "x", {}, stream=False))


def test_a_failed_edit_keeps_the_old_turns() -> None:
    history = (turn("First?", "Two."), turn("Second?", "Red."))
    script = opened(*[LATE] * 5, CANCELLED, completion("Blue."), turns=history)
    with pytest.raises(TimedOut):
        script.run(script.conversation.rewrite(0, "Changed?", {}, stream=False))
    assert script.conversation.turns == history
    ask(script, "Third?")
    assert texts(script) == [
        *("First?", "Two.", "Second?", "Red.", "Third?"),
    ]


def test_a_stopped_edit_is_no_turn_although_its_form_has_no_reason_for_it() -> None:
    before = turn("First?", "Two.")
    script = opened(completion("C."), turns=(before,))
    core = script.conversation.rewrite(0, "Changed?", {}, stream=False)
    assert isinstance(next(core), Call)
    assert script.conversation.stop().body == {"type": "cancel"}
    with pytest.raises(StopIteration) as ended:
        core.send(completion("Thr", "length"))
    assert ended.value.value.finish_reason == "cancelled"
    assert script.conversation.turns == (before,)
    ask(script, "Next?")
    assert texts(script) == ["First?", "Two.", "Next?"]


# --- descriptions -----------------------------------------------------------------------------------------------------


def test_a_description_says_where_the_session_is() -> None:
    memory = {"kv_bytes": 0, "offloaded_bytes": 7, "features_bytes": 3}
    facts = {"session_id": "abc-1", "expires": "2030-01-01T00:00:05Z", "is_answering": False}
    reply = {**facts, "residency": "offloaded", "cached_tokens": 9, "memory": memory}
    script = opened(Reply(200, json.dumps(reply).encode()), Reply(200, b"{}"))
    found = script.run(script.conversation.describe())
    assert script.bodies == [{"type": "describe_session"}]
    assert found == Description("offloaded", datetime(2030, 1, 1, 0, 0, 5, tzinfo=UTC), False, 9, 0, 7, 3)
    with pytest.raises(ConnectionFailed, match="must be a description"):
        script.run(script.conversation.describe())


@pytest.mark.parametrize("results", [[refusal(429, "capacity")], [OPENED, refusal(500, "internal")]])
def test_an_edit_whose_replay_failed_keeps_the_old_turns(results: list[Any]) -> None:
    history = (turn("First?", "Two."), turn("Second?", "Red."))
    lost = refusal(404, "session_not_found")
    script = opened(lost, *results, completion("Blue."), turns=history, on_lost="replay")
    with pytest.raises(ApiError):
        script.run(script.conversation.rewrite(0, "Changed?", {}, stream=False))
    assert script.conversation.turns == history
    ask(script, "Third?")
    assert texts(script) == [
        *("First?", "Two.", "Second?", "Red.", "Third?"),
    ]


@pytest.mark.parametrize("status", [500, 507])
def test_torchserves_reply_for_a_dead_worker_is_repeated(status: int) -> None:
    body = b'{"code": 500, "type": "InternalServerException", "message": "Worker died."}'
    script = opened(Reply(status, body), answer("Two."))
    assert str(ask(script)) == "Two."
    with pytest.raises(ApiError, match="internal"):
        ask(opened(refusal(500, "internal")))


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_wait_until_a_question_is_answered() -> None:
    script = opened(refusal(413, "too_large"), answer("Two."), answer("Red."))
    script.conversation.waiting = (PICTURE,)
    with pytest.raises(TooLarge):
        ask(script)
    ask(script)
    ask(script)
    assert ["image" in body for body in script.bodies] == [True, True, False]
    assert [each.pictures for each in script.conversation.turns] == [(PICTURE,), ()]


def test_a_picture_that_is_added_during_an_answer_waits_for_the_next_question() -> None:
    script = opened([lines("A", "B")], answer("Two."))
    script.conversation.waiting = (PICTURE,)
    core = script.conversation.ask("Which?", (), {}, stream=True)
    added = picture_of(PNG, "b.png")
    perform = script._perform

    def add_with_the_first_piece(effect: Any) -> Any:
        if isinstance(effect, Piece) and not script.pieces:
            script.conversation.waiting += (added,)
        return perform(effect)

    script._perform = add_with_the_first_piece
    script.run(core)
    assert script.conversation.waiting == (added,)
    ask(script)
    assert [each.pictures for each in script.conversation.turns] == [(PICTURE,), (added,)]


def test_pictures_of_a_cancelled_question_wait_and_those_of_a_changed_answer_do_not() -> None:
    script = opened(answer("Tw", finish_reason="cancelled"))
    script.conversation.waiting = (PICTURE,)
    ask(script)
    assert script.conversation.waiting == (PICTURE,)
    script = opened([lines("There are", end=False), CUT], [lines("Th")])
    script.conversation.waiting = (PICTURE,)
    with pytest.raises(AnswerChanged):
        stream(script)
    assert script.conversation.waiting == ()


# --- replies of something else ----------------------------------------------------------------------------------------


def test_an_open_whose_reply_names_no_session_is_an_error() -> None:
    conversation = Conversation(settings(), (PICTURE,))
    with pytest.raises(ApiError, match="X-Amzn-SageMaker-Session-Id") as raised:
        Script(conversation, Reply(200, b"<html>")).run(conversation.open())
    assert raised.value.code == "unexpected_reply"


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": "no"}',
        b'{"choices": null}',
        b'{"choices": [1]}',
        b'{"choices": [{"message": "x", "finish_reason": "stop"}]}',
        b'{"choices": []}',
        b'{"response_text": "x", "finish_reason": "stop", "usage": 3}',
        b'{"response_text": "x", "finish_reason": "stop", "timings": [1]}',
    ],
)
def test_a_reply_of_another_form_is_an_error_of_the_client(body: bytes) -> None:
    for run, reply in ((ask, Reply(200, body)), (stream, [body + b"\n"])):
        with pytest.raises((ApiError, ConnectionFailed)):
            run(opened(*[reply] * 5, CANCELLED))


# --- the end of a chat during a question ------------------------------------------------------------------------------


@pytest.mark.parametrize("closed_at", ["the question", "the open"])
def test_a_chat_that_is_closed_during_a_question_leaves_no_session(closed_at: str) -> None:
    second = replace(OPENED, announced="abc-2; Expires=2030-01-01T00:00:00Z")
    script = opened(refusal(404, "session_not_found"), second, CLOSED, on_lost="replay")
    perform = script._perform

    def close_meanwhile(effect: Any) -> Any:
        result = perform(effect)
        if isinstance(effect, Call) and len(script.bodies) == (1 if closed_at == "the question" else 2):
            script.conversation.closed = True
        return result

    script._perform = close_meanwhile
    with pytest.raises(ChatClosed):
        ask(script)
    opens = [body for body in script.bodies if body["type"] == "start_session"]
    closes = [
        session for body, session in zip(script.bodies, script.sessions, strict=True) if body["type"] == "close_session"
    ]
    assert len(opens) == len(closes) == (0 if closed_at == "the question" else 1)
    assert script.conversation.closed


def test_the_table_of_errors_has_every_error() -> None:
    page = (Path(__file__).parents[2] / "docs" / "client.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \|.*\|.*\|$", page.partition("## Errors")[2], re.MULTILINE))
    kinds = {kind for kind in vars(client).values() if isinstance(kind, type) and issubclass(kind, client.ClientError)}
    assert named == {kind.__name__ for kind in kinds} - {"ClientError", "ApiError"}
    assert [name for name in client.__all__ if not hasattr(client, name)] == []
