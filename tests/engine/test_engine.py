"""The engine's answers equal `generate`'s in any batch, and its memory is that of the open sessions.

Random weights: the answers are meaningless, but any error in positions, masks or the cache changes them.
"""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from llava_sessions.engine.attention import Segment
from llava_sessions.engine.budget import choose_budget
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.kv import GROWTH_TOKENS, KVShape, SessionKV
from llava_sessions.engine.model import Model
from llava_sessions.engine.process import warm_up
from llava_sessions.engine.scheduler import plan
from llava_sessions.ipc.messages import (
    Admitted,
    AskSession,
    Cancelled,
    Closed,
    CloseSession,
    Delta,
    Finished,
    Memory,
    OpenFailed,
    OpenSession,
    Prefilled,
    PreparedPicture,
    Sampling,
    StopTurn,
    TurnAdmitted,
    TurnFailed,
)
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.text.checkpoint import UnsupportedCheckpoint
from tests.support.engine_chats import QUESTIONS, Chats, Reference
from tests.support.tiny_llava import make_checkpoint


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Reference:
    return Reference(tiny)


@pytest.mark.parametrize("chunk_tokens", [256, 7])
def test_answers_equal_generate_over_turns_in_a_shared_batch(
    tiny: Path, reference: Reference, chunk_tokens: int
) -> None:
    chats = Chats(tiny, chunk_tokens)
    order = random.Random(0)
    names = [f"s{i}" for i in range(5)]
    expected: dict[str, list[int]] = {}
    for turn, question in enumerate(QUESTIONS):
        order.shuffle(names)
        got = {}
        for count, name in enumerate(names):
            if turn == 0:
                chats.open(name, picture_seed=int(name[1:]))
            full = chats.ask(name, f"{question} {name}", Sampling(8 + count))
            expected[name] = reference.answer(full, chats.pixels(name), 8 + count)
            got |= chats.run(steps=2)  # the others are still answering when the next one joins
        got |= chats.run()
        assert {name: event.answer_ids for name, event in got.items()} == expected
    assert len({tuple(ids) for ids in expected.values()}) > 1, "all pictures gave one answer: the test is void"


def test_multi_head_attention_equals_generate(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, kv_heads=4, seed=3)
    chats = Chats(checkpoint)
    reference = Reference(checkpoint)
    chats.open("a", 1)
    for question in QUESTIONS:
        full = chats.ask("a", question, Sampling(12))
        expected = reference.answer(full, chats.pixels("a"), 12)
        assert chats.run()["a"].answer_ids == expected


def test_a_follow_up_prefills_only_its_own_tokens(tiny: Path) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    chats.run()
    chats.ask("a", QUESTIONS[0], Sampling(6))
    first = chats.run()["a"]
    held = len(chats.conversations["a"].token_ids)
    chats.ask("a", QUESTIONS[1], Sampling(6))
    second = chats.run()["a"]
    assert first.usage.cached_tokens == len(chats.conversations["a"].opening.token_ids)
    assert second.usage.prompt_tokens == held + len(chats.prompts["a"])
    # The last token of an answer has no KV yet: it runs with the next question.
    assert second.usage.cached_tokens == held - 1


def test_seeded_sampling_is_independent_of_the_batch(tiny: Path) -> None:
    sampling = Sampling(16, temperature=1.5, top_p=0.9, seed=7)
    alone = Chats(tiny)
    alone.open("a", 1)
    alone.ask("a", QUESTIONS[0], sampling)
    expected = alone.run()["a"].answer_ids
    company = Chats(tiny)
    for index, name in enumerate("bcad"):
        company.open(name, 1 if name == "a" else index + 10)
        company.ask(name, QUESTIONS[0], sampling if name == "a" else Sampling(16, temperature=1.0, seed=index))
        company.run(steps=1)
    ids = {event.turn_id: event.answer_ids for event in [*company.run().values(), *_finished(company)]}
    assert ids["turn-a"] == expected
    assert len({tuple(answer) for answer in ids.values()}) == 4


def test_sampling_without_a_seed_varies(tiny: Path) -> None:
    answers = set()
    for _ in range(3):
        chats = Chats(tiny)
        chats.open("a", 1)
        chats.ask("a", QUESTIONS[0], Sampling(24, temperature=2.0))
        answers.add(tuple(chats.run()["a"].answer_ids))
    assert len(answers) > 1


def test_a_stop_string_ends_the_answer_before_it(tiny: Path) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    chats.open("b", 1)
    chats.ask("a", QUESTIONS[0], Sampling(24))
    whole = chats.run()["a"].text
    stop = whole[5:7]
    chats.ask("b", QUESTIONS[0], Sampling(24, stop=(stop,)))
    cut = chats.run()["b"]
    assert cut.reason == "stop"
    assert cut.text == whole[: whole.index(stop)]
    deltas = "".join(event.text for event in chats.events if isinstance(event, Delta) and event.turn_id == "turn-b")
    assert deltas == cut.text


def test_a_cancelled_turn_is_rolled_back(tiny: Path) -> None:
    chats = Chats(tiny)
    for name in "ab":
        chats.open(name, 4)
        chats.ask(name, QUESTIONS[0], Sampling(5))
    chats.run()
    chats.ask("a", "something that never counts", Sampling(50))
    chats.run(steps=4)
    chats.engine.apply(StopTurn("turn-a", "cancelled", keep_answer=False))
    chats.run()
    assert Cancelled("turn-a") in chats.events
    for name in "ab":
        chats.ask(name, QUESTIONS[1], Sampling(10))
    got = chats.run()
    assert got["a"].answer_ids == got["b"].answer_ids
    assert got["a"].usage.prompt_tokens == got["b"].usage.prompt_tokens


def test_closing_frees_every_tensor_of_the_session(tiny: Path) -> None:
    chats = Chats(tiny)
    assert chats.engine.memory() == Memory()
    for name in "abc":
        chats.open(name, ord(name))
        chats.ask(name, QUESTIONS[0], Sampling(4))
    chats.run()
    session = chats.engine.sessions["a"]
    tensors = [weakref.ref(session.pictures[0].features), weakref.ref(session.kv.on_device)]
    held = chats.engine.memory()
    assert held.features_bytes == 3 * 16 * 64 * 4
    assert held.kv_bytes == 3 * 4 * 2 * 2 * GROWTH_TOKENS * 16 * 4
    del session
    chats.engine.apply(CloseSession("a"))
    assert chats.engine.step() == [Closed("a")]
    gc.collect()
    assert [tensor() for tensor in tensors] == [None, None]
    assert chats.engine.memory().kv_bytes == held.kv_bytes * 2 // 3
    chats.engine.apply(CloseSession("b"))
    chats.engine.apply(CloseSession("c"))
    assert chats.engine.memory() == Memory()


def test_closing_during_an_answer_cancels_the_turn_first(tiny: Path) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    chats.ask("a", QUESTIONS[0], Sampling(50))
    chats.run(steps=3)
    chats.engine.apply(CloseSession("a"))
    assert chats.engine.step() == [Cancelled("turn-a"), Closed("a")]
    assert not chats.engine.sessions


def test_a_turn_that_can_not_run_fails(tiny: Path) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    image = chats.tokens.image_token_id
    asks = [
        AskSession("unknown", "t1", [5], Sampling(4)),
        AskSession("a", "t2", [5, image], Sampling(4)),
        AskSession("a", "t3", [5] * 1024, Sampling(4)),
        AskSession("a", "t4", [5], Sampling(4)),
        AskSession("a", "t5", [5], Sampling(4)),
    ]
    for ask in asks:
        chats.engine.apply(ask)
    failed = {event.turn_id for event in chats.engine.step() if isinstance(event, TurnFailed)}
    assert failed == {"t1", "t2", "t3", "t5"}


def test_an_answer_never_outgrows_the_context(tmp_path: Path) -> None:
    chats = Chats(make_checkpoint(tmp_path, context_tokens=40))
    chats.open("a", 1)
    full = chats.ask("a", "what", Sampling(100))
    event = chats.run()["a"]
    assert event.reason == "length"
    assert len(full) + len(event.answer_ids) == 40


def test_an_encoding_error_fails_its_own_session_only(tiny: Path) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    ids = chats.conversations["a"].opening.token_ids
    blind = PreparedPicture("bad", {"pixel_values": np.zeros((1, 3, 20, 20), dtype=np.float32)})
    chats.engine.apply(OpenSession("bad", ids, (blind,)))
    chats.engine.apply(AskSession("bad", "turn-bad", [5], Sampling(4)))
    chats.ask("a", QUESTIONS[0], Sampling(4))
    assert chats.run()["a"].reason == "length"
    kinds = {type(event) for event in chats.events if "bad" in str(vars(event))}
    assert kinds == {Admitted, TurnAdmitted, OpenFailed, TurnFailed}
    assert chats.engine.memory().sessions == 1


def test_a_deadline_ends_an_answer_with_its_tokens_so_far(tiny: Path) -> None:
    cut = Chats(tiny)
    whole = Chats(tiny)
    for chats in (cut, whole):
        chats.open("a", 1)
        chats.run()
    whole.ask("a", QUESTIONS[0], Sampling(12))
    expected = whole.run()["a"].answer_ids
    cut.ask("a", QUESTIONS[0], Sampling(12, deadline_ms=600_000))
    cut.run(steps=5)
    cut.engine.sessions["a"].turn.deadline_at = 0.0  # the deadline has passed
    event = cut.run()["a"]
    assert (event.reason, event.answer_ids) == ("deadline", expected[:5])
    cut.ask("a", QUESTIONS[1], Sampling(4))
    assert cut.run()["a"].usage.prompt_tokens == len(cut.conversations["a"].token_ids) - 4


def test_a_deadline_before_the_first_token_rolls_the_turn_back(tiny: Path) -> None:
    late = Chats(tiny, chunk_tokens=1)
    calm = Chats(tiny)
    for chats in (late, calm):
        chats.open("a", 1)
        chats.run()
    late.ask("a", "what is in this picture of a circle?", Sampling(12, deadline_ms=600_000))
    late.run(steps=2)
    late.engine.sessions["a"].turn.deadline_at = 0.0
    late.run()
    assert late.events[-1] == Cancelled("turn-a", "deadline")
    for chats in (late, calm):
        chats.ask("a", QUESTIONS[0], Sampling(6))
    assert late.run()["a"].answer_ids == calm.run()["a"].answer_ids


def test_a_failed_command_is_reported_and_affects_no_session(tiny: Path) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    chats.run()
    opening = chats.conversations["a"].opening
    chats.engine.apply(OpenSession("a", opening.token_ids, opening.pictures))
    chats.engine.apply(AskSession("a", "t1", [5], Sampling(4, temperature=1.0, seed=2**70)))
    events = {type(event): event for event in chats.engine.step()}
    assert set(events) == {OpenFailed, TurnFailed}
    assert "open already" in events[OpenFailed].error
    chats.ask("a", QUESTIONS[0], Sampling(4))
    assert chats.run()["a"].reason == "length"


def test_prefilled_is_reported_once_and_before_any_question(tiny: Path) -> None:
    chats = Chats(tiny, chunk_tokens=4)
    chats.open("a", 1)
    chats.run()
    chats.ask("a", QUESTIONS[0], Sampling(4))
    chats.run()
    assert [event.session_id for event in chats.events if isinstance(event, Prefilled)] == ["a"]


def test_lower_precisions_give_answers(tiny: Path) -> None:
    tokens = ChatTemplate(AutoProcessor.from_pretrained(tiny))
    for dtype in ("bfloat16", "float16"):
        engine = Engine(Model.load(tiny, dtype, "cpu"), tokens.answer_text, choose_budget(torch.device("cpu")))
        warm_up(engine, tokens)
        assert engine.model.dtype == getattr(torch, dtype)
        assert engine.memory() == Memory()


def test_another_model_family_is_rejected_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnsupportedCheckpoint, match=r"must be llava, .*got 'bert'"):
        Model.load(tmp_path)


def test_kv_grows_in_steps_and_keeps_its_tokens() -> None:
    kv = SessionKV(KVShape(2, 3, 4, torch.float32, torch.device("cpu")))
    assert kv.device_bytes == 0
    stored = torch.randn(2, 2, 3, GROWTH_TOKENS + 1, 4)
    for layer in range(2):
        kv.reserve(GROWTH_TOKENS)
        kv.write(layer, 0, stored[layer, 0, :, :GROWTH_TOKENS], stored[layer, 1, :, :GROWTH_TOKENS])
    kv.length = GROWTH_TOKENS
    one_step = kv.device_bytes
    kv.reserve(GROWTH_TOKENS + 1)
    assert kv.device_bytes == 2 * one_step == 2 * 2 * 2 * 3 * GROWTH_TOKENS * 4 * 4
    for layer in range(2):
        keys, values = kv.read(layer, GROWTH_TOKENS)
        assert torch.equal(keys[0], stored[layer, 0, :, :GROWTH_TOKENS])
        assert torch.equal(values[0], stored[layer, 1, :, :GROWTH_TOKENS])
    kv.crop(3)
    assert kv.length == 3


class Waiting:
    """What `plan` reads of a session."""

    def __init__(self, ticket: int, pending_tokens: int) -> None:
        self.ticket = ticket
        self.pending_tokens = pending_tokens


def test_decodes_always_run_and_prefills_share_the_chunk_in_order() -> None:
    late, early, decode, idle = Waiting(3, 10), Waiting(2, 6), Waiting(9, 1), Waiting(0, 0)
    sessions = [late, decode, idle, early]
    for whole_tokens in (1, 100):
        assert plan(sessions, 8, whole_tokens) == [(decode, 1), (early, 6), (late, 2)]
        assert plan(sessions, 6, whole_tokens) == [(decode, 1), (early, 6)]


def test_a_prompt_runs_whole_while_no_session_answers() -> None:
    late, early, long = Waiting(3, 3), Waiting(2, 10), Waiting(1, 300)
    assert plan([late, early], 8, 32) == [(early, 10)]
    assert plan([late, early], 13, 32) == [(early, 10), (late, 3)]
    assert plan([late, early], 12, 32) == [(early, 10)], "no piece of a prompt that fits whole into the next step"
    assert plan([long, late], 8, 32) == [(long, 32)]
    assert plan([early, late], 8, 8) == [(early, 8)]
    assert plan([Waiting(0, 0)], 8, 32) == []


def test_an_opening_is_one_forward_unless_a_session_answers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = Chats(tiny, chunk_tokens=8)
    rows: list[list[int]] = []
    forward = chats.engine.model.forward

    def counted(segments: list[Segment]) -> torch.Tensor:
        rows.append([len(segment.token_ids) for segment in segments])
        return forward(segments)

    monkeypatch.setattr(chats.engine.model, "forward", counted)
    chats.open("a", 1)
    chats.run()
    tokens = len(chats.conversations["a"].opening.token_ids)
    assert 8 < tokens <= 32
    assert rows == [[tokens]]
    chats.ask("a", QUESTIONS[0], Sampling(60, ignore_eos=True))
    while not chats.engine.sessions["a"].turn.answer_ids:
        chats.run(steps=1)
    rows.clear()
    chats.open("b", 2)
    while chats.engine.sessions["b"].kv.length < tokens:
        chats.run(steps=1)
    assert [sum(step) for step in rows[:2]] == [1 + 8, 1 + 8]


def _finished(chats: Chats) -> list[Finished]:
    return [event for event in chats.events if isinstance(event, Finished)]


def test_a_checkpoint_that_overflows_ends_its_turns_with_an_error_and_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As float16 checkpoints do, whose activations exceed 65504: the NaN has no argmax but token 0, for ever."""
    checkpoint = make_checkpoint(tmp_path)
    scaled = load_file(checkpoint / "model.safetensors")
    for name in scaled:
        if name.endswith(("mlp.up_proj.weight", "mlp.down_proj.weight")):
            scaled[name] *= 1e25  # their product exceeds float32
    save_file(scaled, checkpoint / "model.safetensors", metadata={"format": "pt"})
    chats = Chats(checkpoint)
    chats.open("a", 1)
    chats.ask("a", QUESTIONS[0], Sampling(8))
    assert chats.run() == {}
    (failed,) = [event for event in chats.events if isinstance(event, TurnFailed)]
    assert "the logits are not finite" in failed.error
    assert "turn_failed session=a" in caplog.text
    with pytest.raises(RuntimeError, match=r"does not answer a first question.*not finite"):
        warm_up(chats.engine, chats.tokens)
