"""States of the engine's sessions and turns: the table of transitions, its one writer, and the fault isolation."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from llava_sessions.engine import session as session_module
from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.session import (
    TRANSITIONS,
    EngineSessionState,
    EngineTurnState,
    IllegalTransition,
    State,
    Stateful,
)
from llava_sessions.ipc.messages import (
    Admitted,
    AskSession,
    Cancelled,
    Closed,
    CloseSession,
    Event,
    OpenFailed,
    OpenSession,
    OutOfCapacity,
    Prefilled,
    PreparedPicture,
    Sampling,
    TurnAdmitted,
    TurnFailed,
)
from tests.support.engine_chats import QUESTIONS, Chats, noise

STATES: list[State] = [*EngineSessionState, *EngineTurnState]


def test_every_state_has_its_transitions_within_its_own_lifecycle() -> None:
    assert set(TRANSITIONS) == set(STATES)
    for state, following in TRANSITIONS.items():
        assert all(type(other) is type(state) for other in following)


@pytest.mark.parametrize(("current", "following"), list(itertools.product(STATES, STATES)), ids=str)
def test_advance_rejects_every_transition_outside_the_table(current: State, following: State) -> None:
    subject = Stateful()
    subject.state = current
    if following in TRANSITIONS[current]:
        subject.advance(following)
        assert subject.state is following
    else:
        with pytest.raises(IllegalTransition, match=f"from {current.name} to {following.name}"):
            subject.advance(following)
        assert subject.state is current


def test_advance_is_the_only_writer_of_a_state() -> None:
    folder = Path(session_module.__file__).parent
    writers = [path.name for path in folder.rglob("*.py") for _ in re.findall(r"\.state = ", path.read_text())]
    assert writers == ["session.py"]


def test_a_session_and_its_turn_pass_through_their_states(tiny: Path) -> None:
    chats = Chats(tiny, chunk_tokens=4)
    chats.open("a", 1)
    session = chats.engine.sessions["a"]
    assert session.state is EngineSessionState.WAITING
    chats.run(steps=1)
    assert session.state is EngineSessionState.PREFILLING
    chats.run()
    assert session.state is EngineSessionState.READY
    chats.ask("a", QUESTIONS[0], Sampling(4))
    turn = session.turn
    assert turn is not None
    assert turn.state is EngineTurnState.WAITING
    phases = chats.engine.phases()
    next(phases)
    assert turn.state is EngineTurnState.QUEUED
    list(phases)
    assert turn.state is EngineTurnState.RUNNING
    chats.run()
    assert (turn.state, session.turn) == (EngineTurnState.FINISHED, None)


@pytest.mark.parametrize("ends_by", ["its last token", "its deadline"])
def test_an_illegal_transition_removes_that_session_only(tiny: Path, ends_by: str) -> None:
    chats = Chats(tiny)
    for name in "ab":
        chats.open(name, ord(name))
        chats.ask(name, QUESTIONS[0], Sampling(6))
    chats.run(steps=3)
    turn = chats.engine.sessions["a"].turn
    assert turn is not None
    turn.advance(EngineTurnState.ROLLED_BACK)  # a fault: the session still has the turn
    if ends_by == "its deadline":
        turn.deadline_at = 0.0
    answers = chats.run()
    assert answers["b"].reason == "length"
    failed = [type(event) for event in chats.events if "a" in (_turn_id(event), getattr(event, "session_id", None))]
    assert failed[-2:] == [TurnFailed, OpenFailed]
    assert set(chats.engine.sessions) == {"b"}
    chats.open("a", 1)
    chats.ask("a", QUESTIONS[0], Sampling(4))
    assert chats.run()["a"].reason == "length"


def _turn_id(event: Event) -> str:
    return str(getattr(event, "turn_id", "")).removeprefix("turn-")


# --- closes ---


def test_a_close_of_an_unknown_session_is_answered(tiny: Path) -> None:
    chats = Chats(tiny)
    chats.engine.apply(CloseSession("never opened"))
    assert chats.engine.has_work
    assert chats.engine.step() == [Closed("never opened")]
    assert not chats.engine.has_work


@pytest.mark.parametrize(
    ("fault", "step_between"),
    [
        ("memory is insufficient", False),
        ("memory is insufficient", True),
        ("the command raises", False),
        ("the command raises", True),
        ("the picture can't be encoded", True),
    ],
)
def test_a_close_after_an_open_that_failed_is_answered(
    tiny: Path, fault: str, step_between: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = Chats(tiny)
    opening = chats.tokens.opening([("key", noise(1))])
    token_ids = opening.token_ids
    pictures = opening.pictures
    if fault == "memory is insufficient":
        chats.engine.device_memory.budget = DeviceBudget(device_bytes=1, host_bytes=0)
    elif fault == "the command raises":
        monkeypatch.setattr(chats.engine.device_memory, "admit", _raise)
    else:
        pictures = (PreparedPicture("empty", {}),)
    chats.engine.apply(OpenSession("a", token_ids, pictures))
    events = chats.engine.step() if step_between else []
    chats.engine.apply(AskSession("a", "turn-a", [5], Sampling(4)))
    chats.engine.apply(CloseSession("a"))
    while chats.engine.has_work:
        events += chats.engine.step()
    assert events[-1] == Closed("a")
    assert any(isinstance(event, OpenFailed | OutOfCapacity) for event in events)
    assert not chats.engine.sessions


def _raise(*_: object) -> None:
    raise ValueError("a fault")


def test_a_close_is_answered_even_if_the_turn_can_not_be_rolled_back(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    chats.ask("a", QUESTIONS[0], Sampling(6))
    chats.run(steps=2)
    monkeypatch.setattr(chats.engine.sessions["a"].kv, "crop", _raise)
    chats.engine.apply(CloseSession("a"))
    assert chats.engine.step() == [Cancelled("turn-a"), Closed("a")]
    assert not chats.engine.sessions


def test_a_sampling_error_in_the_step_that_completes_the_opening_fails_the_turn_only(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    chats.ask("a", QUESTIONS[0], Sampling(4))
    with monkeypatch.context() as patch:
        patch.setattr("llava_sessions.engine.engine.next_tokens", lambda *_: [RuntimeError("not a number")])
        chats.run(steps=1)
    assert [type(event) for event in chats.events] == [Admitted, TurnAdmitted, Prefilled, TurnFailed]
    chats.ask("a", QUESTIONS[0], Sampling(4))
    assert chats.run()["a"].reason == "length"
