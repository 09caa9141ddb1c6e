"""On CUDA the text of a step's tokens is computed during the next forward. Answers and their ends stay the same."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_sessions.engine.attention import Segment
from llava_sessions.ipc.messages import (
    Cancelled,
    Closed,
    CloseSession,
    Delta,
    Finished,
    OutOfCapacity,
    Sampling,
    StopTurn,
    TurnFailed,
)
from llava_sessions.text.answer_text import AnswerText
from tests.support.engine_chats import QUESTIONS, Chats

# By session. "eos", "stop" and "minimum" get their end from the answer without one.
SAMPLINGS = {
    "length": Sampling(24),
    "one": Sampling(1),
    "two": Sampling(2),
    "eos": Sampling(24),
    "stop": Sampling(24),
    "minimum": Sampling(24),
    "sampled": Sampling(24, temperature=0.9, top_p=0.95, seed=5),
    "deadline": Sampling(24, deadline_ms=600_000),
    "kept": Sampling(24),
    "cancelled": Sampling(24),
    "closed": Sampling(24),
}


def chats_of(tiny: Path, defers_text: bool) -> Chats:
    """Return an engine that handles text as on CUDA, or as on a CPU."""
    chats = Chats(tiny)
    chats.engine.defers_text = defers_text
    return chats


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Finished:
    """The answer of 24 tokens to the first question."""
    chats = chats_of(tiny, False)
    chats.open("a", 1)
    chats.ask("a", QUESTIONS[0], SAMPLINGS["length"])
    return chats.run()["a"]


def streams(tiny: Path, plain: Finished, defers_text: bool) -> dict[str, list[Any]]:
    """Return the text and the ends of all turns: 11 at once, ended in all ways, then one more of each session."""
    chats = chats_of(tiny, defers_text)
    chats.engine.model.eos_token_ids = frozenset({plain.answer_ids[9]})
    stop = plain.text[5:8]
    for name, sampling in SAMPLINGS.items():
        chats.open(name, 1)
        options = vars(sampling) | {"ignore_eos": name != "eos"}
        if name in ("stop", "minimum"):
            options |= {"stop": (stop,), "min_tokens": 12 if name == "minimum" else 0}
        chats.ask(name, QUESTIONS[0], Sampling(**options))
    while not chats.engine.sessions["kept"].turn.answer_ids:
        chats.run(steps=1)
    chats.run(steps=4)
    chats.engine.sessions["deadline"].turn.deadline_at = 0.0  # the deadline has passed
    chats.engine.apply(StopTurn("turn-kept", "cancelled", keep_answer=True))
    chats.engine.apply(StopTurn("turn-cancelled", "cancelled", keep_answer=False))
    chats.engine.apply(CloseSession("closed"))
    chats.run()
    for name in chats.engine.sessions:
        chats.ask(name, QUESTIONS[1], Sampling(6, ignore_eos=True))
    chats.run()
    return by_turn(chats)


def by_turn(chats: Chats) -> dict[str, list[Any]]:
    """Return the deltas of each turn as one text, and its end."""
    found: dict[str, list[Any]] = defaultdict(lambda: [""])
    for event in chats.events:
        if isinstance(event, Delta):
            last = found[event.turn_id]
            last[-1:] = [last[-1] + event.text] if isinstance(last[-1], str) else [last[-1], event.text]
        elif isinstance(event, Finished | Cancelled | TurnFailed):
            fields = {name: value for name, value in vars(event).items() if name != "timings"}
            found[event.turn_id].append((type(event), fields))
    return dict(found)


def test_answers_and_ends_are_the_same(tiny: Path, plain: Finished) -> None:
    deferred = streams(tiny, plain, True)
    assert deferred == streams(tiny, plain, False)
    ends = {name.removeprefix("turn-"): found[1][1].get("reason") for name, found in deferred.items()}
    assert ends["length"] == ends["one"] == ends["two"] == ends["sampled"] == "length"
    assert ends["eos"] == ends["stop"] == "stop"
    assert ends["deadline"] == "deadline"
    assert deferred["turn-cancelled"][0], "text before the end"


def test_text_comes_one_step_later_except_the_first_and_the_last(tiny: Path, plain: Finished) -> None:
    """No first token waits for the next step, and an answer with stop strings ends in the step of its last token."""
    chats = chats_of(tiny, True)
    names = ("a", "stops")
    for name in names:
        chats.open(name, 1)
        chats.run()
    chats.ask("a", QUESTIONS[0], Sampling(24))
    chats.ask("stops", QUESTIONS[0], Sampling(24, stop=("never",)))
    turns = {name: chats.engine.sessions[name].turn for name in names}
    while chats.engine.has_work:
        chats.run(steps=1)
        for name, turn in turns.items():
            count = len(turn.answer_ids)
            is_late = name == "a" and 1 < count < 24
            assert len(turn.undecoded_ids) == is_late, (name, count)
    assert turns["a"].text == turns["stops"].text == plain.text


def test_text_is_computed_and_reported_between_the_launch_and_the_draw(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = chats_of(tiny, True)
    order: list[str] = []
    forward, push = chats.engine.model.forward, AnswerText.push

    def launched(segments: list[Segment]) -> torch.Tensor:
        order.append("launch")
        return forward(segments)

    def pushed(text: AnswerText, *args: Any) -> str:
        order.append("text")
        return push(text, *args)

    for name in "ab":
        chats.open(name, 1)
        chats.ask(name, QUESTIONS[0], Sampling(12))
    while any(len(session.turn.answer_ids) < 2 for session in chats.engine.sessions.values()):
        chats.run(steps=1)
    monkeypatch.setattr(chats.engine.model, "forward", launched)
    monkeypatch.setattr(AnswerText, "push", pushed)
    for events in chats.engine.phases():
        deltas = sum(isinstance(event, Delta) for event in events)
        order.append(f"{deltas} deltas")
    assert order == ["0 deltas", "0 deltas", "launch", "text", "text", "2 deltas", "0 deltas"]


@pytest.mark.parametrize("error", [RuntimeError("wrong"), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("place", ["model.Model.forward", "engine.next_tokens"])
def test_an_error_of_the_next_step_loses_no_text(
    tiny: Path, plain: Finished, error: Exception, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = chats_of(tiny, True)
    chats.open("a", 1)
    chats.ask("a", QUESTIONS[0], Sampling(24))
    while not chats.engine.sessions["a"].turn or len(chats.engine.sessions["a"].turn.answer_ids) < 5:
        chats.run(steps=1)

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"llava_sessions.engine.{place}", fail)
        chats.run(steps=2)
    text = "".join(event.text for event in chats.events if isinstance(event, Delta))
    tokens = chats_of(tiny, False).tokens.answer_text(())
    assert text == "".join(tokens.push(token) for token in plain.answer_ids[:5])
    assert isinstance(chats.events[-1], TurnFailed | OutOfCapacity)
    chats.ask("a", QUESTIONS[0], Sampling(24))
    assert chats.run()["a"].answer_ids == plain.answer_ids


def test_a_turn_whose_text_fails_during_the_forward_ends_alone(
    tiny: Path, plain: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = chats_of(tiny, True)
    for name in "ab":
        chats.open(name, 1)
        chats.ask(name, QUESTIONS[0], Sampling(24))
    while len(chats.engine.sessions["b"].turn.answer_ids) < 5:
        chats.run(steps=1)

    def fail(_: int, may_stop: bool) -> str:
        raise ValueError("no text")

    with monkeypatch.context() as patch:
        patch.setattr(chats.engine.sessions["a"].turn.answer_text, "push", fail)
        chats.run(steps=1)
    assert [event.turn_id for event in chats.events if isinstance(event, TurnFailed)] == ["turn-a"]
    assert chats.run()["b"].answer_ids == plain.answer_ids
    chats.ask("a", QUESTIONS[0], Sampling(24))
    assert chats.run()["a"].answer_ids == plain.answer_ids


@pytest.mark.parametrize("end", ["closed", "kept", "cancelled", "deadline", "out of memory"])
def test_a_turn_that_ends_while_its_text_fails_still_ends(
    tiny: Path, plain: Finished, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of a turn is late when a command, a deadline or an error of the step ends it."""
    chats = chats_of(tiny, True)
    for name in "ba":  # for a shortage of memory the session that came last is rejected
        chats.open(name, 1)
        chats.ask(name, QUESTIONS[0], Sampling(24))
    while len(chats.engine.sessions["a"].turn.answer_ids) < 5:
        chats.run(steps=1)

    def fail(*_: Any) -> str:
        raise ValueError("no text")

    session = chats.engine.sessions["a"]
    with monkeypatch.context() as patch:
        patch.setattr(session.turn.answer_text, "push", fail)
        if end == "closed":
            chats.engine.apply(CloseSession("a"))
        elif end == "deadline":
            session.turn.deadline_at = 0.0
        elif end == "out of memory":
            with pytest.raises(torch.OutOfMemoryError) as raised:
                raise torch.OutOfMemoryError("CUDA out of memory")
            session.short_of_memory = True
            chats.engine._fail_step([(session, 1)], raised.value)
        else:
            chats.engine.apply(StopTurn("turn-a", "cancelled", keep_answer=end == "kept"))
        chats.run(steps=1)
    expected = {"closed": Cancelled, "out of memory": OutOfCapacity}.get(end, TurnFailed)
    assert [event.turn_id for event in chats.events if isinstance(event, expected)] == ["turn-a"]
    assert [event.session_id for event in chats.events if isinstance(event, Closed)] == ["a"] * (end == "closed")
    assert chats.run()["b"].answer_ids == plain.answer_ids
    if end != "closed":
        chats.ask("a", QUESTIONS[0], Sampling(24))
        assert chats.run()["a"].answer_ids == plain.answer_ids
