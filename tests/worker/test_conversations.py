"""Conversations that clients send whole, over a real engine on a tiny checkpoint: answers, reuse, limits."""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import AskSession, CloseSession, OpenSession
from llava_sessions.journal.journal import Journal
from llava_sessions.journal.stores import DirectoryStore
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.torchserve.batch import Reply, Row
from llava_sessions.worker import questions
from llava_sessions.worker.sessions import Session
from tests.support.pump_frontend import QUESTIONS, Frontend, code, png, tokens

__all__ = ["tokens"]  # a fixture

CHAT = {"url_path": "v1/chat/completions"}


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[Model]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny model only loses by more
    yield Model.load(tiny, "float32", "cpu")
    torch.set_num_threads(threads)


@pytest.fixture
def front(model: Model, tokens: ChatTemplate) -> Frontend:
    return Frontend(model, tokens)


def implicit(front: Frontend) -> list[Session]:
    return [session for session in front.table if session.conversation is not None]


def user(text: str, *colours: str) -> dict[str, Any]:
    pictures = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(one)}"}} for one in colours]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def answered(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def chat_row(front: Frontend, messages: list[dict[str, Any]], session: str | None = None, **fields: Any) -> Row:
    body = {"model": "m", "messages": messages, "max_tokens": 6, **fields}
    return front.row(json.dumps(body).encode(), session, CHAT)


def chat(front: Frontend, messages: list[dict[str, Any]], session: str | None = None, **fields: Any) -> dict[str, Any]:
    reply = front.answer(chat_row(front, messages, session, **fields))
    assert reply.status == 200, reply.body
    body: dict[str, Any] = json.loads(reply.body)
    return body


def submit(front: Frontend, row: Row, *held: Row) -> None:
    """Send a question to the engine, which makes no step."""
    while not any(isinstance(one, AskSession) and one.turn_id == row.request_id for one in front.commands):
        assert front.exchange(row, *held) == [None] * (1 + len(held))


def text_of(completion: dict[str, Any]) -> str:
    text: str = completion["choices"][0]["message"]["content"]
    return text


def cached(completion: dict[str, Any]) -> int:
    count: int = completion["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


class Reference:
    """`generate` of transformers on a conversation that its own processor has rendered."""

    def __init__(self, checkpoint: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)

    def answer(self, messages: list[dict[str, Any]], max_new_tokens: int = 6) -> str:
        pictures = []
        rendered = []
        for message in messages:
            parts = message["content"]
            if isinstance(parts, str):
                parts = [{"type": "text", "text": parts}]
            for part in parts:
                if part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                    pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
            shown = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
            rendered.append({"role": message["role"], "content": shown})
        text = self.processor.apply_chat_template(rendered, add_generation_prompt=True, tokenize=False)
        # As `apply_chat_template` with `tokenize`: no second start token.
        bos = self.processor.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        inputs = self.processor(text=text, images=pictures or None, return_tensors="pt", add_special_tokens=special)
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        ids = out[0, inputs["input_ids"].shape[1] :]
        answer: str = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return answer


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Reference:
    return Reference(tiny)


def test_a_conversation_is_continued_without_computing_it_again(front: Frontend, reference: Reference) -> None:
    messages = [user(QUESTIONS[0], "red")]
    counts = []
    for question in (*QUESTIONS[1:], None):
        completion = chat(front, messages)
        assert text_of(completion) == reference.answer(messages)
        counts.append((completion["usage"]["prompt_tokens"], cached(completion)))
        messages += [answered(text_of(completion)), user(question or "")]
    assert counts[0][1] == 0
    assert all(later_cached >= earlier for (earlier, _), (_, later_cached) in itertools.pairwise(counts))
    assert sum(isinstance(command, OpenSession) for command in front.commands) == 1


def test_a_regenerated_answer_runs_in_a_fork_and_later_ones_replace_it(front: Frontend, reference: Reference) -> None:
    messages = [user(QUESTIONS[0], "red")]
    first = chat(front, messages)
    continued = [*messages, answered(text_of(first)), user(QUESTIONS[1])]
    for _ in range(3):
        again = chat(front, messages)
        assert text_of(again) == text_of(first)
        assert cached(again) == again["usage"]["prompt_tokens"] - 1
    assert len(implicit(front)) == 2
    completion = chat(front, continued)
    assert text_of(completion) == reference.answer(continued)
    assert cached(completion) >= first["usage"]["prompt_tokens"]


def test_a_fork_that_another_conversation_takes_is_no_attempt_any_more(front: Frontend) -> None:
    front.table.max_implicit = 2
    first = [user(QUESTIONS[0], "red")]
    continued = [*first, answered(text_of(chat(front, first))), user(QUESTIONS[1])]
    continued += [answered(text_of(chat(front, continued))), user(QUESTIONS[2])]
    chat(front, first)  # regenerated in a fork
    (fork,) = [one for one in implicit(front) if one.held_conversation.fork_base is not None]
    running = chat_row(front, continued, max_tokens=200, ignore_eos=True)
    submit(front, running)
    row = chat_row(front, [user("something else", "red")])
    submit(front, row, running)
    assert front.settle_with(row, running).status == 200
    assert fork.held_conversation.fork_base is None


def test_half_an_answer_and_a_trimmed_one_are_continued_as_sent(front: Frontend, reference: Reference) -> None:
    messages = [user(QUESTIONS[0], "blue")]
    first = chat(front, messages)
    whole = text_of(first)
    half = [*messages, answered(whole[: len(whole) // 2]), user(QUESTIONS[1])]
    completion = chat(front, half)
    assert text_of(completion) == reference.answer(half)
    assert cached(completion) >= first["usage"]["prompt_tokens"] - 1


def test_a_conversation_that_was_never_seen_is_prefilled(front: Frontend, reference: Reference) -> None:
    messages = [
        user(QUESTIONS[0], "red"),
        answered("an answer of another server"),
        user(QUESTIONS[1], "green", "blue"),
        answered("two more"),
        user(QUESTIONS[2]),
    ]
    completion = chat(front, messages)
    assert text_of(completion) == reference.answer(messages)
    assert cached(completion) == 0
    assert sum(isinstance(command, AskSession) for command in front.commands) == 1


def test_text_alone_is_answered(front: Frontend, reference: Reference) -> None:
    messages = [user("a title for this chat")]
    assert text_of(chat(front, messages)) == reference.answer(messages)


@dataclass
class Dialogue:
    """A conversation of the random test."""

    messages: list[dict[str, Any]] = field(default_factory=list)


@pytest.mark.parametrize("seed", range(3))
def test_random_edits_equal_generate(front: Frontend, reference: Reference, seed: int) -> None:
    """Ten conversations; each step continues, edits, regenerates, trims or goes back, and is compared."""
    draw = random.Random(seed)
    colours = ["red", "green", "blue"]
    front.table.max_implicit = 5  # so that sessions are evicted too
    dialogues = [Dialogue([user(QUESTIONS[0], draw.choice(colours))]) for _ in range(10)]
    for _ in range(40):
        dialogue = draw.choice(dialogues)
        messages = dialogue.messages
        change = draw.choice(["continue", "edit", "regenerate", "trim", "back", "continue"])
        if change == "edit":
            at = draw.randrange(0, len(messages), 2)
            messages[at:] = [user(draw.choice(QUESTIONS) + " edited", *draw.sample(colours, draw.randrange(2)))]
        elif change == "trim" and len(messages) > 1:
            text = messages[-2]["content"]
            messages[-2] = answered(text[: draw.randrange(len(text) + 1)])
        elif change == "back" and len(messages) > 2:
            del messages[-2:]
        text = text_of(chat(front, messages))
        assert text == reference.answer(messages), change
        if change == "continue":
            pictures = draw.sample(colours, 1) if draw.random() < 0.2 else []
            messages += [answered(text), user(draw.choice(QUESTIONS), *pictures)]


def test_a_busy_conversation_is_forked(front: Frontend, reference: Reference) -> None:
    messages = [user(QUESTIONS[0], "red")]
    first = chat(front, messages)
    messages += [answered(text_of(first)), user(QUESTIONS[1])]
    running = chat_row(front, messages, max_tokens=200, ignore_eos=True)
    submit(front, running)
    assert len(implicit(front)) == 1
    row = chat_row(front, messages)
    submit(front, row, running)
    assert len(implicit(front)) == 2
    completion = json.loads(front.settle_with(row, running).body)
    assert text_of(completion) == reference.answer(messages)
    assert cached(completion) >= first["usage"]["prompt_tokens"] - 1


def test_the_least_recently_used_idle_conversation_is_closed_for_a_new_one(front: Frontend) -> None:
    front.table.max_implicit = 2
    named = front.open("green")
    for colour in ("red", "green", "blue"):
        chat(front, [user(QUESTIONS[0], colour)])
    assert len(implicit(front)) == 2
    assert cached(chat(front, [user(QUESTIONS[0], "red")])) == 0
    assert front.ask(named)["finish_reason"] in ("stop", "length")


def test_a_picture_of_the_session_that_is_closed_for_a_new_one_is_sent_again(front: Frontend) -> None:
    front.table.max_implicit = 1
    for label in ("one", "two"):  # the second conversation has no tokens in common with the first one
        assert cached(chat(front, [user(QUESTIONS[0], "red")], user=label)) == 0


def test_no_place_for_a_conversation_is_429(front: Frontend) -> None:
    front.table.max_implicit = 1
    running = chat_row(front, [user(QUESTIONS[0], "red")], max_tokens=200, ignore_eos=True)
    submit(front, running)
    reply = front.settle_beside(running, chat_row(front, [user(QUESTIONS[0], "blue")]))
    assert (reply.status, code(reply)) == (429, "capacity")


def test_a_client_that_leaves_keeps_what_it_has_read(front: Frontend, reference: Reference) -> None:
    messages = [user(QUESTIONS[0], "red")]
    row = chat_row(front, messages, stream=True, max_tokens=200, ignore_eos=True)
    read: list[Reply] = []
    while len(read) < 4:
        (reply,) = front.exchange(row)
        read += [reply] if reply is not None else []
        front.step()
    front.exchange()  # TorchServe does not list the row any more
    while front.engine.has_work:
        front.step()
        front.exchange()
    half = "".join(
        event["choices"][0]["delta"].get("content") or ""
        for reply in read
        for event in (json.loads(line[6:]) for line in reply.body.splitlines() if line.startswith("data: "))
    )
    continued = [*messages, answered(half), user(QUESTIONS[1])]
    completion = chat(front, continued)
    assert text_of(completion) == reference.answer(continued)
    assert cached(completion) > 0


def test_a_client_that_leaves_after_the_crop_has_shortened_the_conversation(
    front: Frontend, reference: Reference
) -> None:
    front.table.max_implicit = 1
    messages = [user(QUESTIONS[0], "red")]
    whole = text_of(chat(front, messages))
    half = [*messages, answered(whole[: len(whole) // 2]), user(QUESTIONS[1], "green", "blue")]
    for steps in range(3):  # the first one crops the session, and encodes one picture
        row = chat_row(front, half, max_tokens=200, ignore_eos=True)
        submit(front, row)
        for _ in range(steps):
            front.step()
        front.exchange()
        while front.engine.has_work:
            front.step()
            front.exchange()
        (session,) = implicit(front)
        held = session.held_conversation.token_ids.tolist()
        assert front.engine.sessions[session.id].token_ids[: len(held)] == held
        continued = [*messages, answered(whole), user(QUESTIONS[2])]
        assert text_of(chat(front, continued)) == reference.answer(continued)


def test_a_client_that_leaves_before_the_first_token_leaves_nothing(front: Frontend) -> None:
    row = chat_row(front, [user(QUESTIONS[0], "red")])
    front.exchange(row)
    front.exchange()
    while front.engine.has_work:
        front.step()
        front.exchange()
    assert implicit(front) == []
    assert not front.engine.sessions


def test_a_lost_engine_takes_implicit_sessions_along(front: Frontend, reference: Reference) -> None:
    messages = [user(QUESTIONS[0], "red")]
    messages += [answered(text_of(chat(front, messages))), user(QUESTIONS[1])]
    front.lose_engine()
    front.bring_engine()
    completion = chat(front, messages)
    assert text_of(completion) == reference.answer(messages)
    assert cached(completion) == 0
    assert len(implicit(front)) == 1


def test_implicit_sessions_expire(front: Frontend) -> None:
    chat(front, [user(QUESTIONS[0], "red")])
    front.now_s += 1e4
    front.pump.sweep()
    front.exchange()
    assert implicit(front) == []
    assert not front.engine.sessions


def test_no_time_is_left_for_a_journal_that_stores_nothing(model: Model, tokens: ChatTemplate, tmp_path: Path) -> None:
    front = Frontend(model, tokens, journal=Journal([DirectoryStore(str(tmp_path))]))
    began_s = time.monotonic()
    row = chat_row(front, [user(QUESTIONS[0], "red")], deadline_ms=60_000)
    submit(front, row)
    passed_ms = (time.monotonic() - began_s) * 1e3
    (sent,) = [command for command in front.commands if isinstance(command, AskSession)]
    assert sent.sampling.deadline_ms >= 60_000 - passed_ms - 1
    front.settle(row)


def test_implicit_sessions_have_the_idle_limit(model: Model, tokens: ChatTemplate) -> None:
    front = Frontend(model, tokens, idle_s=5.0)
    chat(front, [user(QUESTIONS[0], "red")])
    for passed_s, left in ((6.0, 1), (2.0, 0)):  # a session is kept for two more seconds
        front.now_s += passed_s
        front.pump.sweep()
        front.exchange()
        assert len(implicit(front)) == left


def test_no_client_reaches_an_implicit_session_by_its_id(front: Frontend) -> None:
    chat(front, [user(QUESTIONS[0], "red")])
    (session,) = implicit(front)
    for row in (front.ask_row(session.id), front.close_row(session.id), front.cancel_row(session.id)):
        assert front.answer(row).status == 404
    assert implicit(front) == [session]


def test_labels_keep_conversations_apart(front: Frontend) -> None:
    messages = [user(QUESTIONS[0], "red")]
    messages += [answered(text_of(chat(front, messages, user="one"))), user(QUESTIONS[1])]
    assert cached(chat(front, messages, user="two")) == 0
    assert cached(chat(front, messages)) == 0
    assert cached(chat(front, messages, user="one")) > 0


def test_session_tokens_keep_conversations_apart(front: Frontend) -> None:
    front.open("red", session_token="secret-of-tenant-1")
    messages = [user(QUESTIONS[0], "red")]
    for token in ({}, {"session_token": "secret-of-tenant-1"}, {"session_token": "secret-of-tenant-2"}):
        before = len(front.commands)
        assert cached(chat(front, messages, **token)) == 0
        assert cached(chat(front, messages, **token)) > 0
        opened = [command for command in front.commands[before:] if isinstance(command, OpenSession)]
        assert len({command.salt for command in opened}) == 1
    # A picture of one tenant is not a picture of another.
    keys = {key for session in front.table for key in session.picture_keys}
    assert len(keys) == 3


def test_without_sharing_nothing_of_another_request_is_found(model: Model, tokens: ChatTemplate) -> None:
    front = Frontend(model, tokens, share_pictures=False)
    front.open("red")
    for messages in ([user(QUESTIONS[0], "red")], [user(QUESTIONS[0])]):
        for _ in range(2):
            assert cached(chat(front, messages)) == 0
    assert implicit(front) == []
    session = front.open("red")
    first = chat(front, [user(QUESTIONS[0], "red")], session)
    later = [user(QUESTIONS[0], "red"), answered(text_of(first)), user(QUESTIONS[1])]
    assert cached(chat(front, later, session)) >= first["usage"]["prompt_tokens"]


def test_a_picture_is_read_and_decoded_once(front: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_sessions.worker import pictures as loading
    from llava_sessions.worker import reading

    decoded = []
    load_bytes = loading.load_bytes
    monkeypatch.setattr(loading, "load_bytes", lambda data, limits: decoded.append(data) or load_bytes(data, limits))
    read = []
    read_picture = reading.read_picture
    monkeypatch.setattr(reading, "read_picture", lambda *given: read.append(given) or read_picture(*given))
    messages = [user(QUESTIONS[0], "red")]
    for _ in range(3):
        messages += [answered(text_of(chat(front, messages))), user(QUESTIONS[1])]
    assert len(decoded) == 1
    assert len(read) == 1
    opened = [command for command in front.commands if isinstance(command, OpenSession | AskSession)]
    assert sum(bool(picture.inputs) for command in opened for picture in command.pictures) == 1


# --- sessions with a name ---


def test_messages_continue_a_session_that_was_opened_on_a_picture(front: Frontend, reference: Reference) -> None:
    session = front.open("red")
    said = front.ask(session, QUESTIONS[0])["response_text"]
    messages = [user(QUESTIONS[0]), answered(said), user(QUESTIONS[1])]
    completion = chat(front, messages, session)
    with_picture = [user(QUESTIONS[0], "red"), *messages[1:]]
    assert text_of(completion) == reference.answer(with_picture)
    repeated = chat(front, [*with_picture, answered(text_of(completion)), user(QUESTIONS[2])], session)
    assert cached(repeated) >= completion["usage"]["prompt_tokens"]
    # The last token of an answer has no KV until the next question.
    native = front.ask(session, QUESTIONS[0])["usage"]
    assert native["cached_tokens"] >= repeated["usage"]["total_tokens"] - 2


@pytest.mark.parametrize("first", [{"role": "system", "content": "Be brief."}, answered("How can I help?")])
def test_a_message_before_the_pictures_of_an_opening_counts(
    front: Frontend, reference: Reference, first: dict[str, Any]
) -> None:
    session = front.open("red")
    reply = front.answer(chat_row(front, [first, user(QUESTIONS[0])], session))
    assert (reply.status, code(reply)) == (400, "invalid_request")
    messages = [first, user(QUESTIONS[0], "red")]
    completion = chat(front, messages, session)
    assert text_of(completion) == reference.answer(messages)
    assert completion["usage"]["prompt_tokens"] == chat(front, messages)["usage"]["prompt_tokens"]
    later = [*messages, answered(text_of(completion)), user(QUESTIONS[1])]
    assert cached(chat(front, later, session)) >= completion["usage"]["prompt_tokens"]


def test_an_edit_rewrites_a_session_with_a_name(front: Frontend, reference: Reference) -> None:
    session = front.open("red")
    messages = [user(QUESTIONS[0], "red")]
    messages += [answered(text_of(chat(front, messages, session))), user(QUESTIONS[1])]
    chat(front, messages, session)
    edited = [*messages[:2], user("something else")]
    completion = chat(front, edited, session)
    assert text_of(completion) == reference.answer(edited)
    other_picture = [user(QUESTIONS[0], "blue")]
    completion = chat(front, other_picture, session)
    assert text_of(completion) == reference.answer(other_picture)
    assert len(front.table) == 1
    transcript = front.table.find(session).known_transcript
    assert (len(transcript.turns), len(transcript.log)) == (1, 4)
    later = front.ask(session, QUESTIONS[2])["response_text"]
    whole = [*other_picture, answered(text_of(completion)), user(QUESTIONS[2])]
    assert later == reference.answer(whole)


@pytest.mark.parametrize("limit", ["MAX_REPLACED_TURNS", "MAX_REPLACED_BYTES"])
def test_a_session_whose_turns_were_replaced_too_often_goes_on_in_a_new_one(
    model: Model, tokens: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    front = Frontend(model, tokens, journal=Journal([DirectoryStore(str(tmp_path))]))
    session = front.open("red")
    size = len(base64.b64decode(png("blue")))
    monkeypatch.setattr(questions, limit, {"MAX_REPLACED_TURNS": 2, "MAX_REPLACED_BYTES": 2 * size}[limit])
    for _ in range(3):  # the first one replaces the opening only
        chat(front, [user(QUESTIONS[0], "blue")], session)
    refused = front.answer(chat_row(front, [user(QUESTIONS[0], "blue")], session))
    assert (refused.status, code(refused)) == (400, "invalid_request")
    resumed = front.body_of(front.row({"type": "start_session", "resume": session}))["session_id"]
    chat(front, [user(QUESTIONS[0], "blue")], resumed)


def test_a_rewritten_session_is_rebuilt_after_the_engine(front: Frontend, reference: Reference) -> None:
    session = front.open("red")
    messages = [user(QUESTIONS[0], "blue")]
    messages += [answered(text_of(chat(front, messages, session))), user(QUESTIONS[1], "green", "red")]
    messages += [answered(text_of(chat(front, messages, session)))]
    front.lose_engine()
    front.bring_engine()
    said = front.ask(session, QUESTIONS[2])["response_text"]
    assert said == reference.answer([*messages, user(QUESTIONS[2])])


def test_a_cancelled_edit_leaves_the_session_as_it_was(front: Frontend, reference: Reference) -> None:
    session = front.open("red")
    said = front.ask(session, QUESTIONS[0])["response_text"]
    running = chat_row(front, [user("another question", "red")], session, max_tokens=200, ignore_eos=True)
    submit(front, running)
    for _ in range(3):
        front.step()
    _, (cancelled,) = front.settle(running, front.cancel_row(session))
    assert json.loads(cancelled.body)["success"] is True
    after = front.ask(session, QUESTIONS[1])["response_text"]
    assert after == reference.answer([user(QUESTIONS[0], "red"), answered(said), user(QUESTIONS[1])])


@pytest.mark.parametrize("is_named", [True, False])
def test_a_running_turn_has_dropped_the_pictures_that_it_does_not_keep(front: Frontend, is_named: bool) -> None:
    front.table.max_implicit = 1
    named, other = front.open("red"), front.open("green")
    session = named if is_named else None
    messages = [user(QUESTIONS[0], "red")]
    messages += [answered(text_of(chat(front, messages, session))), user(QUESTIONS[1], "blue")]
    chat(front, messages, session)
    running = chat_row(front, [*messages[:2], user("edited")], session, max_tokens=200, ignore_eos=True)
    submit(front, running)
    front.step()
    row = chat_row(front, [user(QUESTIONS[0], "blue")], other)
    submit(front, row, running)
    reply = front.settle_with(row, running)
    assert reply.status == 200, reply.body


def test_an_empty_session_is_filled_by_messages_or_natively(front: Frontend, reference: Reference) -> None:
    for native in (False, True):
        reply = front.answer(front.row({"requestType": "NEW_SESSION"}))
        assert reply.status == 200, reply.body
        session = json.loads(reply.body)["session_id"]
        messages = [user(QUESTIONS[0], "red")]
        if native:
            said = front.ask(session, QUESTIONS[0], image=png("red"))["response_text"]
        else:
            said = text_of(chat(front, messages, session))
        assert said == reference.answer(messages)
        later = front.ask(session, QUESTIONS[1])["response_text"]
        assert later == reference.answer([*messages, answered(said), user(QUESTIONS[1])])


def test_a_session_is_opened_with_a_history(front: Frontend, reference: Reference) -> None:
    history = [
        {"prompt_text": QUESTIONS[0], "response_text": "red and round"},
        {"prompt_text": QUESTIONS[1], "images": [png("blue"), png("green")], "response_text": "two more"},
    ]
    body = {"type": "start_session", "image": png("red"), "history": history}
    reply = front.answer(front.row(body))
    assert reply.status == 200, reply.body
    opened = json.loads(reply.body)
    assert opened["turns"] == 2
    messages = [
        user(QUESTIONS[0], "red"),
        answered("red and round"),
        user(QUESTIONS[1], "blue", "green"),
        answered("two more"),
        user(QUESTIONS[2]),
    ]
    while front.engine.has_work:
        front.step()
    answer = front.ask(opened["session_id"], QUESTIONS[2])
    assert answer["response_text"] == reference.answer(messages)
    assert answer["usage"]["cached_tokens"] == opened["usage"]["prompt_tokens"]
    front.lose_engine()
    front.bring_engine()
    messages += [answered(answer["response_text"]), user(QUESTIONS[0])]
    assert front.ask(opened["session_id"], QUESTIONS[0])["response_text"] == reference.answer(messages)


def test_closing_leaves_nothing(front: Frontend) -> None:
    session = front.open("red")
    chat(front, [user(QUESTIONS[0], "blue")], session)
    assert front.answer(front.close_row(session)).status == 200
    assert not front.engine.sessions
    assert isinstance(front.commands[-1], CloseSession)
