"""Who a request is from, and whether it was sent before: labels of SageMaker, session tokens, shared pictures."""

from __future__ import annotations

import json

import pytest

from llava_sessions.engine import prefixes
from llava_sessions.errors import Refused
from llava_sessions.ipc.messages import AskSession, Closed, CloseSession, OpenSession
from llava_sessions.protocol.constants import INFERENCE_HEADER
from llava_sessions.worker.sessions import LABEL_S, SessionTable
from tests.support.pump_frontend import NOW, QUESTIONS, Frontend, code, model, png, tokens

__all__ = ["model", "tokens"]

LABEL = {INFERENCE_HEADER.lower(): "one-label-for-the-whole-chat"}
MINE, THEIRS = "m" * 16, "t" * 16


@pytest.fixture
def front(model, tokens) -> Frontend:
    return Frontend(model, tokens)


@pytest.fixture
def deaf(model, tokens) -> Frontend:
    return Frontend(model, tokens, deaf=True)


def labelled_ask(front: Frontend, session: str, prompt: str = QUESTIONS[0], **fields):
    body = {"type": "send_text_prompt", "prompt_text": prompt, "max_new_tokens": 6, **fields}
    return front.row(body, session, LABEL)


# --- Inference-Id ---


def test_two_opens_with_one_inference_id_share_no_session(front):
    body = {"type": "start_session", "image": png()}
    rows = [front.row(body, headers=LABEL) for _ in range(2)]
    replies = [json.loads(reply.body) for (reply,) in front.settle(*rows)]
    replies.append(front.body_of(front.row(body, headers=LABEL)))
    assert len({reply["session_id"] for reply in replies}) == 3


def test_an_inference_id_joins_a_retry_to_the_running_question(front):
    session = front.open()
    rows = [labelled_ask(front, session) for _ in range(2)]
    (first,), (second,) = front.settle(*rows)
    assert first.body == second.body
    assert front.pump.metric_values().turns_total == 1


def test_an_inference_id_finds_the_answer_for_ten_seconds(front):
    session = front.open()
    first = front.body_of(labelled_ask(front, session))
    between = front.body_of(labelled_ask(front, session, QUESTIONS[1]))
    front.now_s += LABEL_S - 0.5
    assert front.body_of(labelled_ask(front, session)) == first
    assert front.body_of(labelled_ask(front, session, QUESTIONS[1])) == between
    front.now_s += 1.0
    later = front.body_of(labelled_ask(front, session))
    assert later["usage"]["prompt_tokens"] > between["usage"]["prompt_tokens"]
    assert front.pump.metric_values().turns_total == 3


def test_a_request_id_is_a_key_for_longer_and_goes_before_the_label(front):
    session = front.open()
    keyed = {"request_id": "one-question-of-this-chat"}
    first = front.body_of(labelled_ask(front, session, **keyed))
    front.now_s += 2 * LABEL_S
    assert front.body_of(labelled_ask(front, session, **keyed)) == first
    other = front.body_of(labelled_ask(front, session, request_id="another-question-of-it"))
    assert other["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]


# --- tokens ---


def test_a_close_during_a_close_needs_the_token(deaf):
    session = deaf.open(session_token=MINE)
    first = deaf.close_row(session, session_token=MINE)
    assert deaf.exchange(first) == [None]
    assert any(isinstance(command, CloseSession) for command in deaf.commands)
    for fields in ({}, {"session_token": THEIRS}):
        foreign = deaf.answer_beside(first, deaf.close_row(session, **fields))
        assert (foreign.status, code(foreign)) == (404, "session_not_found")
    again = deaf.close_row(session, session_token=MINE)
    assert deaf.exchange(first, again) == [None, None]
    deaf.tell(Closed(session))
    replies = deaf.exchange(first, again)
    assert [json.loads(reply.body)["success"] for reply in replies] == [True, True]


def test_a_session_that_has_ended_is_known_to_its_token_only(front):
    closed = front.open(session_token=MINE)
    front.answer(front.close_row(closed, session_token=MINE))
    for fields in ({}, {"session_token": THEIRS}):
        assert code(front.answer(front.close_row(closed, **fields))) == "session_not_found"
    assert json.loads(front.answer(front.close_row(closed, session_token=MINE)).body)["success"] is True


def test_an_expired_session_is_unknown_to_another_token():
    table = SessionTable(2, 60.0)
    session = table.reserve("a")
    session.token_digest = "mine"
    table.end(session, "expired")
    codes = []
    for digest in ("mine", "theirs", None):
        with pytest.raises(Refused) as refused:
            table.get("a", NOW, digest)
        codes.append(refused.value.code)
    assert codes == ["session_expired", "session_not_found", "session_not_found"]


# --- shared pictures ---


def picture_work(front: Frontend, **fields) -> None:
    """Open a session on one picture, and ask about another one."""
    session = front.open(**fields)
    front.ask(session, image=png("blue"), **fields)


def _pictures(command, session: str):
    is_of_session = isinstance(command, OpenSession | AskSession) and command.session_id == session
    return command.pictures if is_of_session else ()


def test_sessions_share_pictures_with_sessions_of_the_same_token_only(front, monkeypatch):
    encoded: list[str] = []
    encode = front.engine.model.encode_batch

    def encode_batch(pictures):
        encoded.extend(picture.key for picture in pictures)
        return encode(pictures)

    monkeypatch.setattr(front.engine.model, "encode_batch", encode_batch)
    copied: list[str] = []

    def copy_opening(session, others):
        prefixes.copy_opening(session, others)
        if session.kv.length:
            copied.append(session.id)

    monkeypatch.setattr("llava_sessions.engine.engine.copy_opening", copy_opening)
    work = []
    for fields in ({}, {}, {"session_token": MINE}, {"session_token": MINE}, {"session_token": THEIRS}):
        encoded.clear()
        copied.clear()
        picture_work(front, **fields)
        work.append((len(encoded), len(copied)))
    # An open and a question that show two pictures encode both; with the pictures of another session they encode none.
    assert work == [(2, 0), (0, 1), (2, 0), (0, 1), (2, 0)]


def test_a_rebuilt_session_has_the_pictures_of_its_token(front):
    session = front.open(session_token=MINE)
    before = [picture.key for command in front.commands for picture in _pictures(command, session)]
    front.ask(session, image=png("blue"), session_token=MINE)
    front.lose_engine()
    front.bring_engine()
    front.commands.clear()
    front.ask(session, session_token=MINE)
    (rebuilt,) = (command for command in front.commands if isinstance(command, OpenSession))
    assert [picture.key for picture in rebuilt.pictures][:1] == before
    other = front.open("blue", session_token=THEIRS)
    theirs = {picture.key for command in front.commands for picture in _pictures(command, other)}
    assert not theirs & {picture.key for picture in rebuilt.pictures}
