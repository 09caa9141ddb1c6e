"""What sessions survive, and who may use them: a lost engine, a new worker, a resume, tokens, idleness, a drain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.serve import service
from llava_sessions.chat.transcript import TurnRecord
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import AskSession, CloseSession, OpenFailed, OpenSession, OutOfCapacity, StopTurn
from llava_sessions.journal.journal import Journal, open_journal
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.torchserve.batch import Reply
from llava_sessions.worker.manager import LAST_LINES_S
from llava_sessions.worker.preparation import Rebuild
from llava_sessions.worker.sessions import GRACE_S, MAX_ENGINE_LOSSES
from tests.support.pump_frontend import NOW, QUESTIONS, TTL, Frontend, code, lines, model, png, tokens

__all__ = ["model", "tokens"]  # fixtures
TOKEN, OTHER = "a-token-of-mine-1234", "a-token-of-others-12"
REQUEST = "00000000-0000-4000-8000-000000000001"


@pytest.fixture
def front(model: Model, tokens: ChatTemplate) -> Frontend:
    return Frontend(model, tokens)


@pytest.fixture
def stored(tmp_path: Path):
    """A journal in a directory; each call is another process's."""
    journals: list[Journal] = []

    def another() -> Journal:
        journals.append(open_journal(str(tmp_path / "journal"), None))
        return journals[-1]

    yield another
    for journal in journals:
        journal.close(timeout_s=10)


def stored_files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "journal").glob("[!.]*/*") if path.is_file())


def undisturbed(front: Frontend, colour: str = "red", **fields) -> list[str]:
    """A chat's three answers."""
    session = front.open(colour)
    return [front.ask(session, question, **fields)["response_text"] for question in QUESTIONS]


# --- the engine is lost ---


def test_a_session_goes_on_after_the_engine_was_lost(front):
    expected = undisturbed(front)
    session = front.open()
    told = []
    for question in QUESTIONS:
        told.append(front.ask(session, question)["response_text"])
        front.lose_engine()
        front.bring_engine()
    front.exchange()
    assert told == expected
    figures = front.pump.metric_values()
    assert (figures.engine_restarts_total, figures.rebuilds_total) == (3, 2)


def test_a_rebuilt_session_holds_the_pictures_of_its_turns_too(front):
    def chat(lose: bool) -> list[str]:
        session, told = front.open(), []
        for question, more in zip(QUESTIONS, ({}, {"image": png("blue")}, {"image": png("green")}), strict=True):
            told.append(front.ask(session, question, **more)["response_text"])
            if lose:
                front.lose_engine()
                front.bring_engine()
        return told

    assert chat(lose=True) == chat(lose=False)


def test_a_running_turn_is_told_to_try_again_and_leaves_no_trace(front):
    expected = undisturbed(front)
    session = front.open()
    assert front.ask(session, QUESTIONS[0])["response_text"] == expected[0]
    row = front.start(session, "Something long?")
    front.step()
    front.lose_engine()
    reply = front.answer(row)
    assert (reply.status, code(reply), reply.headers["Retry-After"]) == (503, "engine_restarting", "3")
    front.bring_engine()
    assert front.ask(session, QUESTIONS[1])["response_text"] == expected[1]


def test_a_stream_that_began_ends_with_the_error_as_its_last_line(front):
    session = front.open()
    row = front.ask_row(session, stream=True, max_new_tokens=200)
    replies = []
    while not replies:
        replies = [reply for reply in front.exchange(row) if reply is not None]
        front.step()
    front.lose_engine()
    (told,) = front.settle(row)
    assert told[-1].more is False
    assert lines(told)[-1]["error"]["code"] == "engine_restarting"
    front.bring_engine()
    assert front.ask(session)["finish_reason"] in ("stop", "length")


def test_nothing_is_taken_while_there_is_no_engine(front):
    session = front.open()
    front.lose_engine()
    for row in (front.ask_row(session), front.row({"type": "start_session", "image": png()})):
        reply = front.answer(row)
        assert (reply.status, code(reply)) == (503, "engine_restarting")
    assert front.answer(front.close_row(session)).status == 200
    assert front.answer(front.ask_row(session)).status == 404


def test_an_open_that_the_engine_had_not_answered_is_refused_and_gives_its_place_back(model, tokens):
    front = Frontend(model, tokens, max_sessions=1)
    heard, front.submit = [], lambda command: heard.append(command)
    row = front.row({"type": "start_session", "image": png()})
    while not heard:
        assert front.exchange(row) == [None]
    del front.submit
    front.lose_engine()
    assert code(front.answer(row)) == "engine_restarting"
    front.bring_engine()
    assert front.open()


def test_a_session_whose_picture_was_still_being_encoded_is_rebuilt_when_it_speaks(front):
    expected = undisturbed(front)
    reply = front.answer(front.row({"type": "start_session", "image": png()}))
    session = json.loads(reply.body)["session_id"]
    front.lose_engine()
    front.bring_engine()
    assert front.ask(session, QUESTIONS[0])["response_text"] == expected[0]


def test_a_close_that_waits_for_the_lost_engine_is_answered(model, tokens):
    front = Frontend(model, tokens, deaf=True)
    session = json.loads(front.answer(front.row({"type": "start_session", "image": png()})).body)["session_id"]
    row = front.close_row(session)
    assert front.exchange(row) == [None]
    assert isinstance(front.commands[-1], CloseSession)
    front.lose_engine()
    assert front.answer(row).status == 200
    assert front.pump.metric_values().open_sessions == 0


def test_a_cancel_of_a_turn_that_is_lost_is_answered(front):
    session = front.open()
    row = front.start(session)
    cancel = front.cancel_row(session)
    front.submit = lambda command: None
    assert front.exchange(row, cancel) == [None, None]
    del front.submit
    front.lose_engine()
    (asked,), (cancelled,) = front.settle(row, cancel)
    assert code(asked) == "engine_restarting"
    assert json.loads(cancelled.body)["success"] is False


def test_a_question_whose_picture_was_loaded_while_the_engine_was_lost_runs_on_the_next_engine(front, tokens):
    session = front.open()
    row = front.ask_row(session, image=png("blue"))
    with tokens.lock:  # nothing is prepared meanwhile
        assert front.exchange(row) == [None]
        front.lose_engine()
        front.bring_engine()
        assert front.exchange(row) == [None]
    reply = front.answer(row)
    assert json.loads(reply.body)["finish_reason"] in ("stop", "length")
    assert front.ask(session, image=png("blue"))["finish_reason"] in ("stop", "length")


def test_a_session_that_the_engine_has_no_room_for_is_refused_that_turn_and_stays_open(model, tokens):
    expected = undisturbed(Frontend(model, tokens))
    front = Frontend(model, tokens)
    session = front.open()
    front.ask(session, QUESTIONS[0])
    front.lose_engine()
    front.bring_engine()
    full = front.engine.device_memory.budget
    front.engine.device_memory.budget = type(full)(device_bytes=1, host_bytes=0)
    reply = front.answer(front.ask_row(session, QUESTIONS[1]))
    assert (reply.status, code(reply)) == (429, "capacity")
    front.engine.device_memory.budget = full
    assert front.ask(session, QUESTIONS[1])["response_text"] == expected[1]


def test_a_rebuild_that_fails_fails_its_turn_only(front):
    session = front.open()
    front.ask(session, QUESTIONS[0])
    front.lose_engine()
    front.bring_engine()
    heard, front.submit = [], lambda command: heard.append(command)
    row = front.ask_row(session, QUESTIONS[1])
    while len(heard) < 2:
        front.exchange(row)
    assert [type(command) for command in heard] == [OpenSession, AskSession]
    front.tell(OpenFailed(session, "a test"))
    reply = front.answer(row)
    assert (reply.status, code(reply)) == (500, "internal")
    del front.submit
    assert front.ask(session, QUESTIONS[1])["finish_reason"] in ("stop", "length")


def test_a_session_that_ran_out_of_memory_behind_its_open_is_rebuilt(model, tokens):
    expected = undisturbed(Frontend(model, tokens))
    front = Frontend(model, tokens)
    session = front.open()
    front.engine.apply(CloseSession(session))
    front.engine.step()
    front.tell(OutOfCapacity(session, None, 10, 0, 0))
    assert front.ask(session, QUESTIONS[0])["response_text"] == expected[0]


def test_a_session_whose_turns_end_engines_again_and_again_takes_no_more_turns(front):
    expected = undisturbed(front)
    poison, other = front.open(), front.open()
    for _ in range(MAX_ENGINE_LOSSES):
        row = front.start(poison)
        front.step()
        front.lose_engine()
        assert code(front.answer(row)) == "engine_restarting"
        front.bring_engine()
    reply = front.answer(front.ask_row(poison))
    assert (reply.status, code(reply)) == (500, "internal")
    assert front.answer(front.close_row(poison)).status == 200
    assert front.ask(other, QUESTIONS[0])["response_text"] == expected[0]


def test_a_session_that_answers_between_two_losses_is_not_blamed_for_them(front):
    session = front.open()
    for _ in range(MAX_ENGINE_LOSSES + 1):
        row = front.start(session)
        front.step()
        front.lose_engine()
        assert code(front.answer(row)) == "engine_restarting"
        front.bring_engine()
        assert front.ask(session)["finish_reason"] in ("stop", "length")


def test_a_rebuild_takes_an_image_token_in_an_answer_for_what_it_is(front, tokens):
    session = front.open()
    transcript = front.table.find(session).transcript
    transcript.append(TurnRecord([5, 6], [tokens.image_token_id, 7], (), None, "", {}))
    command = Rebuild(transcript, ()).command(session)
    start = len(transcript.opening.token_ids)
    assert command.token_ids[start:] == [5, 6, tokens.image_token_id, 7]
    assert command.answer_spans == ((start + 2, start + 4),)


# --- the worker is restarted ---


def test_another_worker_finds_the_sessions_and_answers_as_the_first_would_have(model, tokens, stored):
    expected = undisturbed(Frontend(model, tokens))
    front = Frontend(model, tokens, journal=stored())
    session = front.open()
    body = front.ask(session, QUESTIONS[0])
    assert (body["response_text"], body["durable"]) == (expected[0], True)
    second = Frontend(model, tokens, journal=stored())
    second.pump.recover()
    assert second.pump.metric_values().open_sessions == 1
    assert second.ask(session, QUESTIONS[1])["response_text"] == expected[1]
    third = Frontend(model, tokens, journal=stored())
    third.pump.recover()
    assert third.ask(session, QUESTIONS[2])["response_text"] == expected[2]


def test_an_open_tells_whether_it_is_stored(model, tokens, stored, front):
    row = {"type": "start_session", "image": png()}
    assert Frontend(model, tokens, journal=stored()).body_of(front.row(row))["durable"] is True
    assert "durable" not in front.body_of(front.row(row))


def test_a_turn_that_could_not_be_stored_says_so(model, tokens, tmp_path):
    (tmp_path / "journal").write_text("a file where the folder should be")
    journal = open_journal(str(tmp_path / "journal"), None)
    front = Frontend(model, tokens, journal=journal)
    session = front.open()
    assert front.ask(session)["durable"] is False
    assert front.pump.metric_values().journal_failures_total > 0
    (tmp_path / "journal").unlink()
    assert front.ask(session)["durable"] is True
    journal.close(timeout_s=10)


def test_a_repeated_ask_is_told_its_answer_by_the_next_worker_without_running_again(model, tokens, stored):
    front = Frontend(model, tokens, journal=stored())
    session = front.open()
    first = front.ask(session, request_id=REQUEST, temperature=1.0)
    second = Frontend(model, tokens, journal=stored())
    second.pump.recover()
    again = second.ask(session, request_id=REQUEST, temperature=1.0)
    assert again == first
    assert second.pump.metric_values().turns_total == 0
    assert not any(isinstance(command, AskSession) for command in second.commands)


def test_a_repeated_open_is_told_its_session_by_the_next_worker(model, tokens, stored):
    front = Frontend(model, tokens, journal=stored())
    body = {"type": "start_session", "image": png(), "request_id": REQUEST}
    first = front.body_of(front.row(body))
    second = Frontend(model, tokens, journal=stored())
    second.pump.recover()
    again = second.body_of(second.row(body))
    assert again == {name: value for name, value in first.items() if name != "durable"}
    assert second.pump.metric_values().open_sessions == 1


def test_a_close_removes_what_was_stored(model, tokens, stored, tmp_path):
    front = Frontend(model, tokens, journal=stored())
    session = front.open()
    front.ask(session)
    assert front.journal.flush(10)  # the mark of the turn is removed after the answer
    assert [path.name for path in stored_files(tmp_path)] == ["000000.rec", "000001.rec", "owner"]
    assert front.answer(front.close_row(session)).status == 200
    assert stored_files(tmp_path) == []


def test_a_session_that_was_only_found_again_can_be_closed(model, tokens, stored, tmp_path):
    session = Frontend(model, tokens, journal=stored()).open()
    second = Frontend(model, tokens, journal=stored())
    second.pump.recover()
    assert second.answer(second.close_row(session)).status == 200
    assert [path.name for path in stored_files(tmp_path)] == ["owner"]  # retired: it was claimed to be removed
    third = Frontend(model, tokens, journal=stored())
    third.pump.recover()
    assert third.answer(third.ask_row(session)).status == 404
    assert second.answer(second.ask_row(session)).status == 404


def test_a_damaged_session_is_not_found_and_the_others_go_on(model, tokens, stored, tmp_path):
    front = Frontend(model, tokens, journal=stored())
    damaged, whole = front.open(), front.open("blue")
    front.ask(damaged)
    expected = undisturbed(Frontend(model, tokens), colour="blue")
    assert front.ask(whole, QUESTIONS[0])["response_text"] == expected[0]
    late = Frontend(model, tokens, journal=stored())
    late.pump.recover()
    (record,) = [path for path in stored_files(tmp_path) if path.name == "000001.rec" and damaged in path.read_text()]
    record.write_bytes(record.read_bytes()[:-9] + b"damaged!!")
    second = Frontend(model, tokens, journal=stored())
    second.pump.recover()
    for found in (second, late):  # before it was found again, and after
        reply = found.answer(found.ask_row(damaged))
        assert (reply.status, code(reply)) == (404, "session_not_found")
        assert found.answer(found.ask_row(damaged)).status == 404
    assert second.ask(whole, QUESTIONS[1])["response_text"] == expected[1]
    reply = front.answer(front.ask_row(whole, QUESTIONS[1]))  # it has lost the session to the second instance
    assert (reply.status, code(reply), "Retry-After" in reply.headers) == (503, "session_moved", True)


def test_what_expired_meanwhile_is_told_as_expired(model, tokens, stored):
    session = Frontend(model, tokens, journal=stored()).open()
    second = Frontend(model, tokens, journal=stored())
    second.now_s = NOW + TTL + 1
    second.pump.recover()
    reply = second.answer(second.ask_row(session))
    assert (reply.status, code(reply)) == (410, "session_expired")


def test_an_expired_session_leaves_nothing_stored(model, tokens, stored, tmp_path):
    journal = stored()
    front = Frontend(model, tokens, journal=journal)
    front.open()
    front.now_s = NOW + TTL + GRACE_S
    front.pump.sweep()
    assert journal.flush(timeout_s=10)
    assert stored_files(tmp_path) == []


# --- resume ---


def test_a_session_is_carried_on_under_a_new_id_where_it_is_open(front):
    expected = undisturbed(front)
    old = front.open()
    front.ask(old, QUESTIONS[0])
    body = front.body_of(front.row({"type": "start_session", "resume": old}))
    new = body["session_id"]
    assert new != old
    assert body["turns"] == 1
    assert front.ask(new, QUESTIONS[1])["response_text"] == expected[1]
    assert code(front.answer(front.ask_row(old))) == "session_not_found"
    assert old in front.ended
    front.step()
    assert front.engine.memory().sessions == 2  # the undisturbed one, and this


def test_a_session_is_carried_on_by_another_instance(model, tokens, stored, tmp_path):
    expected = undisturbed(Frontend(model, tokens))
    first = Frontend(model, tokens, journal=stored())
    old = first.open()
    first.ask(old, QUESTIONS[0])
    second = Frontend(model, tokens, journal=stored(), first_row=100)
    new = second.body_of(second.row({"type": "start_session", "resume": old}))["session_id"]
    assert second.ask(new, QUESTIONS[1])["response_text"] == expected[1]
    stored().flush(timeout_s=10)
    third = Frontend(model, tokens, journal=stored())
    third.pump.recover()
    assert code(third.answer(third.ask_row(old))) == "session_not_found"
    assert third.ask(new, QUESTIONS[2])["response_text"] == expected[2]


def test_a_busy_session_is_not_carried_on(front):
    session = front.open()
    row = front.start(session)
    reply = front.answer(front.row({"type": "start_session", "resume": session}))
    assert (reply.status, code(reply)) == (409, "session_busy")
    front.settle(row, front.cancel_row(session))


def test_what_nobody_knows_is_not_carried_on(front):
    reply = front.answer(front.row({"type": "start_session", "resume": "nobody"}))
    assert (reply.status, code(reply)) == (404, "session_not_found")


def test_a_resume_that_is_refused_leaves_the_old_session_as_it_was(model, tokens):
    front = Frontend(model, tokens)
    session = front.open()
    full = front.engine.device_memory.budget
    front.engine.device_memory.budget = type(full)(device_bytes=1, host_bytes=0)
    assert code(front.answer(front.row({"type": "start_session", "resume": session}))) == "capacity"
    front.engine.device_memory.budget = full
    assert front.ask(session)["finish_reason"] in ("stop", "length")


def test_the_old_session_takes_nothing_while_it_is_carried_on(front):
    session = front.open()
    front.submit = lambda command: None
    row = front.row({"type": "start_session", "resume": session})
    assert front.exchange(row) == [None]
    assert front.answer(front.ask_row(session)).status == 404


# --- whose session it is ---


def test_a_session_is_its_callers_who_bring_the_token(front):
    session = front.open(session_token=TOKEN)
    unknown = front.answer(front.ask_row("nobody"))
    for row in (
        front.ask_row(session),
        front.ask_row(session, session_token=OTHER),
        front.close_row(session, session_token=OTHER),
        front.row({"type": "cancel"}, session),
        front.row({"type": "start_session", "resume": session, "session_token": OTHER}),
        front.row({"type": "start_session", "resume": session}),
    ):
        reply = front.answer(row)
        assert (reply.status, reply.body) == (404, unknown.body)
    assert front.ask(session, session_token=TOKEN)["finish_reason"] in ("stop", "length")
    assert front.answer(front.close_row(session, session_token=TOKEN)).status == 200


def test_a_token_for_a_session_without_one_is_refused(front):
    session = front.open()
    assert front.answer(front.ask_row(session, session_token=TOKEN)).status == 404


def test_the_token_holds_after_a_restart_and_is_not_stored(model, tokens, stored, tmp_path):
    session = Frontend(model, tokens, journal=stored()).open(session_token=TOKEN)
    assert all(TOKEN.encode() not in path.read_bytes() for path in stored_files(tmp_path))
    second = Frontend(model, tokens, journal=stored())
    second.pump.recover()
    assert second.answer(second.ask_row(session, session_token=OTHER)).status == 404
    third = Frontend(model, tokens, journal=stored())
    resume = {"type": "start_session", "resume": session}
    assert third.answer(third.row({**resume, "session_token": OTHER})).status == 404
    assert second.ask(session, session_token=TOKEN)["finish_reason"] in ("stop", "length")


# --- idleness, and the end of the server ---


def test_a_session_ends_when_nothing_was_asked_for_its_idle_time(model, tokens):
    front = Frontend(model, tokens, idle_s=20)
    session = front.open()
    front.now_s = NOW + 19
    front.ask(session)
    front.now_s = NOW + 38
    front.ask(session)
    front.now_s = NOW + 58
    assert code(front.answer(front.ask_row(session))) == "session_expired"
    front.now_s += GRACE_S
    front.pump.sweep()
    front.step()
    assert front.engine.memory().sessions == 0


def test_a_server_that_is_about_to_stop_takes_nothing_new_and_lets_turns_finish(front):
    session = front.open()
    row = front.start(session, max_new_tokens=30)
    front.pump.drain()
    for late in (front.ask_row(session), front.row({"type": "start_session", "image": png()})):
        reply = front.answer_beside(row, late)
        assert (reply.status, code(reply)) == (503, "shutting_down")
        assert "Retry-After" in reply.headers
    assert not front.pump.drained
    assert front.body_of(row)["finish_reason"] in ("stop", "length")
    assert front.answer(front.close_row(session)).status == 200
    assert front.pump.drained


def test_turns_that_are_still_running_at_the_end_are_cut_with_a_last_line(front):
    session = front.open()
    row = front.ask_row(session, stream=True, max_new_tokens=200)
    words = []
    while not words:
        words = [reply for reply in front.exchange(row) if reply is not None]
        front.step()
    front.pump.drain()
    front.skipped_s += LAST_LINES_S
    front.pump.sweep()
    assert isinstance(front.commands[-1], StopTurn)
    (told,) = front.settle(row)
    last = lines(told)[-1]
    assert last["finish_reason"] == "shutdown"
    assert last["usage"]["completion_tokens"] < 200
    assert front.pump.drained


@pytest.mark.parametrize("step_s", [1, 6, 12])
def test_the_cut_leaves_time_for_a_long_step_that_runs_then(front, step_s):
    """The engine's steps take so long on the clock. Sweeps come once a second meanwhile."""
    session = front.open()
    row = front.ask_row(session, stream=True, max_new_tokens=100, ignore_eos=True)
    front.longest_step_s = float(step_s)
    while not any(reply is not None for reply in front.exchange(row)):
        front.step()
    front.pump.drain()
    drained_s = 0
    replies: list[Reply] = []
    while not replies or replies[-1].more:
        for _ in range(step_s):
            front.skipped_s += 1
            drained_s += 1
            front.pump.sweep()
            replies += [reply for reply in front.exchange(row) if reply is not None]
        front.step()
        replies += [reply for reply in front.exchange(row) if reply is not None]
    assert lines(replies)[-1]["finish_reason"] == "shutdown"
    assert step_s <= drained_s < service.DRAIN_S
