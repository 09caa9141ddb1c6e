"""Answers on a CUDA device equal `generate`'s in every tier, as test_engine.py checks on the CPU.

Run by a person with a GPU: `pytest -m cuda`. Skipped without one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_sessions.chat.transcript import Conversation
from llava_sessions.engine.budget import DeviceBudget, choose_budget
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.model import Model
from llava_sessions.engine.process import load
from llava_sessions.ipc.messages import AskSession, CloseSession, EngineSettings, Finished, OpenSession, Sampling
from llava_sessions.text.chat_template import ChatTemplate

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
QUESTIONS = ["what is the red circle doing?", "and the blue square near it?", "two green stars?"]


class Chats:
    """An engine on the device, its conversations, and the answers of `generate` on the device."""

    def __init__(self, checkpoint: Path, budget: DeviceBudget | None = None, dtype: str = "float32") -> None:
        self.tokens = ChatTemplate(AutoProcessor.from_pretrained(checkpoint))
        model = Model.load(checkpoint, dtype, "cuda")
        self.engine = Engine(model, self.tokens.answer_text, budget or choose_budget(model.device), 16)
        self.reference = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=torch.float32, device_map={"": "cuda"}
        )
        self.conversations: dict[str, Conversation] = {}
        self.prompts: dict[str, list[int]] = {}

    def open(self, name: str, seed: int) -> None:
        noise = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        opening = self.tokens.opening([(f"noise {seed}", Image.fromarray(noise))])
        self.conversations[name] = Conversation(opening)
        self.engine.apply(OpenSession(name, opening.token_ids, opening.pictures))

    def ask(self, name: str, text: str, answer_tokens: int) -> list[int]:
        """Start a turn; return the answer of `generate` to the whole conversation."""
        conversation = self.conversations[name]
        self.prompts[name] = self.tokens.prompt(conversation.opened_on, text)
        self.engine.apply(AskSession(name, name, self.prompts[name], Sampling(answer_tokens)))
        ids = torch.tensor([conversation.token_ids + self.prompts[name]], device="cuda")
        out = self.reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.from_numpy(conversation.opening.pictures[0].inputs["pixel_values"]).cuda(),
            do_sample=False,
            max_new_tokens=answer_tokens,
        )
        return out[0, ids.shape[1] :].tolist()

    def run(self) -> dict[str, list[int]]:
        """Step until the engine has no work; commit and return the answers."""
        answers = {}
        while self.engine.has_work:
            for event in self.engine.step():
                if isinstance(event, Finished):
                    answers[event.turn_id] = event.answer_ids
                    self.conversations[event.turn_id].commit(self.prompts[event.turn_id], event.kept_ids)
        return answers


def test_answers_equal_generate_over_turns_in_a_shared_batch(tiny: Path) -> None:
    chats = Chats(tiny)
    names = [f"s{index}" for index in range(5)]
    for index, name in enumerate(names):
        chats.open(name, index)
    for question in QUESTIONS:
        expected = {name: chats.ask(name, f"{question} {name}", 8 + index) for index, name in enumerate(names)}
        assert chats.run() == expected


def test_answers_equal_generate_after_offloading_and_rebuilding(tiny: Path) -> None:
    chats = Chats(tiny)
    shape = chats.engine.model.kv_shape
    features = 6 * 16 * chats.engine.model.feature_bytes
    chats.engine.device_memory.budget = DeviceBudget(2 * shape.device_bytes(100) + features, 60 * shape.token_bytes)
    names = [f"s{index}" for index in range(6)]
    for index, name in enumerate(names):
        chats.open(name, index)
        chats.run()
    held = chats.engine.memory()
    assert all((held.resident, held.offloaded, held.cold))
    for question in QUESTIONS:
        for name in names:
            expected = chats.ask(name, question, 8)
            assert chats.run() == {name: expected}


def test_offloaded_kv_is_in_pinned_memory(tiny: Path) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    chats.run()
    kv = chats.engine.sessions["a"].kv
    kv.offload()
    assert kv.tier == "offloaded"
    assert kv.on_host is not None
    assert all(part.is_pinned() for block in kv.on_host for part in block)


def test_closing_frees_the_device_memory(tiny: Path) -> None:
    chats = Chats(tiny)
    before = torch.cuda.memory_allocated()
    for index in range(4):
        chats.open(f"s{index}", index)
    chats.run()
    assert torch.cuda.memory_allocated() > before
    for index in range(4):
        chats.engine.apply(CloseSession(f"s{index}"))
    chats.run()
    assert torch.cuda.memory_allocated() == before


def test_a_cache_moves_and_grows_within_its_budget(tiny: Path) -> None:
    chats = Chats(tiny)
    chats.open("a", 1)
    chats.run()
    kv = chats.engine.sessions["a"].kv
    kv.reserve(64 * 256)
    kv.length = 60 * 256
    cache_bytes = kv.device_bytes
    for move in (kv.offload, kv.restore):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        move()
        torch.cuda.synchronize()
        added = cache_bytes if move == kv.restore else 0
        layers = chats.engine.model.kv_shape.layers
        assert torch.cuda.max_memory_allocated() <= before + added + cache_bytes / layers + 2**20


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="flash attention needs sm80"
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_attention_of_an_answer_is_flash_attention(tiny: Path, dtype: str) -> None:
    """With fewer KV heads than query heads, in the first and in later chunks, and without cuDNN's plans."""
    chats = Chats(tiny, dtype=dtype)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # another backend is an error
        chats.open("a", 1)
        prompt = chats.tokens.prompt(chats.conversations["a"].opened_on, QUESTIONS[0] * 4)
        chats.engine.apply(AskSession("a", "a", prompt, Sampling(8)))
        finished = []
        while chats.engine.has_work:
            finished += [event for event in chats.engine.step() if isinstance(event, Finished)]
    assert len(finished) == 1


def test_the_derived_budget_is_most_of_the_free_memory(tiny: Path) -> None:
    settings = EngineSettings(str(tiny), system_prompt="", dtype="auto", device="cuda", prefill_chunk_tokens=256)
    engine = load(settings)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    assert engine.device_memory.budget.device_bytes >= 0.9 * free - 2**30
