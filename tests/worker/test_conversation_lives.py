"""Random lives of conversations: whatever happens, the engine has the tokens and pictures that the worker believes.

Also: no session is in the engine that the worker forgot, and the index names no session that has ended.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from llava_sessions.engine.model import Model
from llava_sessions.journal.journal import Journal
from llava_sessions.journal.stores import DirectoryStore
from llava_sessions.text.chat_template import ChatTemplate
from tests.support.pump_frontend import QUESTIONS, Frontend, png, tokens
from tests.worker.test_conversations import (
    Reference,
    answered,
    chat,
    chat_row,
    implicit,
    model,
    reference,
    submit,
    text_of,
    user,
)

__all__ = ["model", "reference", "tokens"]  # fixtures

STEPS = 25
COLOURS = ["red", "green", "blue", "yellow"]


def agree(front: Frontend) -> None:
    """Assert that worker and engine agree on all sessions. No turn runs."""
    assert {session.id for session in front.table if session.in_engine} == front.engine.sessions.keys()
    for session in front.table:
        if not session.in_engine:
            continue
        held = front.engine.sessions[session.id]
        keys = tuple(picture.key for picture in held.pictures)
        if session.conversation is None:
            assert (held.token_ids, keys) == (session.known_transcript.token_ids, session.picture_keys)
        else:  # the next turn drops what the engine has beyond
            token_ids = session.conversation.token_ids.tolist()
            assert held.token_ids[: len(token_ids)] == token_ids
            assert keys[: len(session.picture_keys)] == session.picture_keys
            assert len(session.conversation.starts) == len(session.picture_keys)
    links = {session.id: set(session.held_conversation.links) for session in implicit(front)}
    indexed: dict[str, set[int]] = {session_id: set() for session_id in links}
    for link, sessions in front.pump._manager._conversations._by_link.items():
        for session_id in sessions:
            indexed[session_id].add(link)
    assert indexed == links


class Life:
    """A session with a header and the conversation that its client has, and the same conversation without a header."""

    def __init__(self, front: Frontend, reference: Reference, draw: random.Random) -> None:
        self.front = front
        self.reference = reference
        self.draw = draw
        self.session = front.open("red")
        self.messages = [user(QUESTIONS[0], "red")]

    def question(self) -> dict[str, Any]:
        return user(self.draw.choice(QUESTIONS), *self.draw.sample(COLOURS, self.draw.randrange(2)))

    def send(self) -> None:
        completion = chat(self.front, self.messages, self.session)
        assert text_of(completion) == self.reference.answer(self.messages)
        self.messages += [answered(text_of(completion)), self.question()]

    def edit(self) -> None:
        at = self.draw.randrange(0, len(self.messages), 2)
        self.messages[at:] = [user(self.draw.choice(QUESTIONS) + " edited", *self.draw.sample(COLOURS, at == 0))]
        self.send()

    def ask(self) -> None:
        """Ask in the native words, which follow the session's transcript."""
        if len(self.messages) > 2:
            asked = self.front.ask(self.session, QUESTIONS[1], image=png("blue"))["response_text"]
            self.messages[-1:] = [user(QUESTIONS[1], "blue"), answered(asked), self.question()]

    def send_without_a_header(self) -> None:
        messages = self.messages[: self.draw.randrange(1, len(self.messages) + 1, 2)]
        assert text_of(chat(self.front, messages)) == self.reference.answer(messages)

    def leave(self) -> None:
        """Leave in the middle of an answer behind half an answer, or before the engine has the question."""
        messages = [*self.messages[:-1], user("another question", *self.draw.sample(COLOURS, 1))]
        if len(messages) > 2:
            text = messages[-2]["content"]
            messages[-2] = answered(text[: len(text) // 2])
        session = self.draw.choice([self.session, None])
        row = chat_row(self.front, messages, session, max_tokens=200, ignore_eos=True)
        if self.draw.random() < 0.3:
            self.front.exchange(row)
            return
        submit(self.front, row)
        for _ in range(self.draw.randrange(5)):
            self.front.step()

    def lose_the_engine(self) -> None:
        self.front.lose_engine()
        self.front.bring_engine()

    def resume(self) -> None:
        reply = self.front.body_of(self.front.row({"type": "start_session", "resume": self.session}))
        self.session = reply["session_id"]

    def settle(self) -> None:
        """Let the engine finish, with no request."""
        self.front.exchange()
        while self.front.engine.has_work:
            self.front.step()
            self.front.exchange()


@pytest.mark.parametrize("seed", range(2))
def test_worker_and_engine_agree(
    model: Model, tokens: ChatTemplate, reference: Reference, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    front = Frontend(model, tokens, journal=Journal([DirectoryStore(str(tmp_path))]))
    front.table.max_implicit = 3  # so that sessions are evicted too
    life = Life(front, reference, draw)
    acts = [life.send, life.edit, life.ask, life.send_without_a_header, life.leave, life.lose_the_engine, life.resume]
    for _ in range(STEPS):
        draw.choice(acts)()
        life.settle()
        agree(front)
