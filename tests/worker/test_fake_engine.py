"""The fake engine gives the same events as the real one for the same commands."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from llava_sessions.engine.budget import choose_budget
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import (
    AskSession,
    CloseSession,
    Delta,
    DescribeSession,
    Event,
    Finished,
    OpenSession,
    Sampling,
    StopTurn,
)
from llava_sessions.text.chat_template import ChatTemplate
from tests.support.fake_engine import IMAGE_TOKEN, FakeEngine
from tests.support.pump_frontend import model, tokens

__all__ = ["model", "tokens"]  # fixtures
STEP = "one step"
# Commands by name, and steps. After the last one the engine steps as long as it has work.
SCRIPTS: dict[str, list[Any]] = {
    "open, then ask": ["open a", STEP, "ask a 1", "ask a 2"],
    "ask together with the open": ["open a", "ask a 1"],
    "two sessions": ["open a", "open b", "ask b 1", "ask a 2"],
    "open twice": ["open a", STEP, "open a", "ask a 1"],
    "ask an unknown session": ["ask a 1"],
    "ask again while it answers": ["open a", STEP, "ask a 1", STEP, "ask a 2"],
    "close before a step": ["open a", "close a"],
    "close while it answers": ["open a", STEP, "ask a 1", STEP, "close a", "ask a 2"],
    "close an unknown session": ["close a"],
    "open again after a close": ["open a", STEP, "close a", "open a", "ask a 1"],
    "stop before the first token": ["open a", STEP, "ask a 1", "stop 1 keep"],
    "stop and keep the answer": ["open a", STEP, "ask a 1", STEP, "stop 1 keep"],
    "stop and roll back": ["open a", STEP, "ask a 1", STEP, "stop 1", "ask a 2"],
    "stop an unknown turn": ["open a", "stop 9"],
    "stop twice": ["open a", STEP, "ask a 1", STEP, "stop 1", "stop 1"],
    "an empty session": ["open a empty", STEP, "ask a 1"],
    "crop": ["open a", "ask a 1", STEP, STEP, "ask a 2 8", STEP, STEP, "ask a 3 0"],
    "crop inside the picture": ["open a", STEP, "ask a 1 12"],
    "crop beyond the end": ["open a", STEP, "ask a 1 9999", "ask a 2"],
    "crop and roll back": ["open a", STEP, "ask a 1 8", STEP, "stop 1", "ask a 2 9", "ask a 3"],
    "describe": ["describe a", "open a", STEP, "describe a", "ask a 1", STEP, "describe a"],
    "fork": ["open a", STEP, "open b fork", "ask b 1"],
    "fork with a known picture": ["open a", STEP, "open b fork bare", "ask b 1"],
    "an unknown picture without arrays": ["open a bare", "ask a 1", "open a", "ask a 2"],
}


def events_of(engine: Engine | FakeEngine, script: list[str], tokens: ChatTemplate) -> dict[str, list[tuple]]:
    """The events of each session and of each turn, with the fields that do not depend on the model."""
    opening = tokens.opening([("grey", Image.new("RGB", (56, 56), "grey"))])
    prompt_ids = tokens.prompt(opening.opened_on, "What is this?")
    found: list = []
    for line in script:
        match line.split():
            case ["open", name, "empty"]:
                engine.apply(OpenSession(name, [], ()))
            case ["open", name, *more]:
                pictures = opening.without_arrays().pictures if "bare" in more else opening.pictures
                donor = "a" if "fork" in more else None
                engine.apply(OpenSession(name, opening.token_ids, pictures, fork_from=donor))
            case ["ask", name, turn, *kept]:
                # Long enough to be stopped after a step; its end is not looked at otherwise.
                first = int(kept[0]) if kept else None
                engine.apply(AskSession(name, turn, prompt_ids, Sampling(2), kept_tokens=first))
            case ["stop", turn, *keep]:
                engine.apply(StopTurn(turn, "a test", bool(keep)))
            case ["describe", name]:
                engine.apply(DescribeSession(name, f"description of {name}"))
            case ["close", name]:
                engine.apply(CloseSession(name))
            case _:
                found += engine.step()
    while engine.has_work:
        found += engine.step()
    streams: dict[str, list[tuple]] = {}
    for event in found:
        identity = getattr(event, "turn_id", None) or event.session_id
        reason = getattr(event, "reason", None)
        # The model decides whether the second token ends the answer.
        shown = (type(event).__name__, "end" if reason in ("stop", "length") else reason, _checked(event))
        stream = streams.setdefault(identity, [])
        if not (isinstance(event, Delta) and stream and stream[-1] == shown):
            stream.append(shown)
    return streams


def _checked(event: Event) -> object:
    """Return what else does not depend on the model."""
    return getattr(event, "lacks_pictures", None)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_the_fake_engine_gives_the_events_of_the_real_one(model: Model, tokens: ChatTemplate, script) -> None:
    real = Engine(model, tokens.answer_text, choose_budget(model.device))
    fake = FakeEngine()
    assert events_of(fake, script, tokens) == events_of(real, script, tokens)
    assert len(fake.sessions) == real.memory().sessions
    for name, session in fake.sessions.items():
        assert len(session.keys) == len(real.sessions[name].pictures)


def test_the_fake_engine_counts_the_tokens_of_the_real_one(model: Model, tokens: ChatTemplate) -> None:
    """Of a turn that crops its session, and of one that came with a fork."""
    assert tokens.image_token_id == IMAGE_TOKEN
    opening = tokens.opening([("grey", Image.new("RGB", (56, 56), "grey"))])
    usage = []
    for engine in (FakeEngine(), Engine(model, tokens.answer_text, choose_budget(model.device))):
        engine.apply(OpenSession("a", opening.token_ids, opening.pictures))
        engine.step()
        engine.apply(AskSession("a", "1", [5, 6], Sampling(2), kept_tokens=8))
        engine.apply(OpenSession("b", opening.token_ids, opening.pictures, fork_from="a"))
        engine.apply(AskSession("b", "2", [5, 6], Sampling(2)))
        found = []
        while engine.has_work:
            found += [event for event in engine.step() if isinstance(event, Finished)]
        found.sort(key=lambda event: event.turn_id)
        usage.append([(event.usage.prompt_tokens, event.usage.cached_tokens) for event in found])
    assert usage[0] == usage[1]
