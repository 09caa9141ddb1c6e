"""The engine on the layers and the attention of CUDA, whose kernels Triton's interpreter runs on the CPU.

test_cuda_layers.py runs these tests in a process of their own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava_sessions.engine import decode_graphs
from llava_sessions.engine.attention import Segment, TokenBatch
from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.cuda.ragged import PIECE, RaggedAttention
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.fused.layer import FusedLayer
from llava_sessions.engine.kv import SessionKV
from llava_sessions.engine.model import Model
from llava_sessions.engine.sampling import Sampler, next_tokens
from llava_sessions.ipc.messages import AskSession, Finished, OpenSession, PreparedPicture, Sampling
from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.text.processors import load_processor
from tests.support.family import Family, noise
from tests.support.meta_cuda import Card
from tests.support.recorded_graph import RecordedGraph
from tests.support.tiny_families import make_internvl35, make_llava, make_onevision
from tests.support.two_worlds import CUDA, MixedDevices, Worlds

# One query head per KV head; two, with biases of queries, keys and values; four, with head norms and more numbers than
# the hidden size. Few KV heads: the interpreter is slow.
FAMILIES: dict[str, Callable[..., Path]] = {
    "llava": partial(make_llava, num_attention_heads=2, num_key_value_heads=2),
    "onevision": partial(make_onevision, num_attention_heads=2, num_key_value_heads=1),
    "internvl3.5": partial(make_internvl35, num_attention_heads=4, num_key_value_heads=1),
}
AMPLE = DeviceBudget(2**30, 2**30)


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Worlds:
    """Make the CPU's memory two worlds, host and device."""
    worlds = Worlds(monkeypatch)
    Card(2**40, 0).patch(monkeypatch)
    return worlds


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path, worlds: Worlds, monkeypatch: pytest.MonkeyPatch) -> Family:
    """Return a family whose model is on the device, with graphs that are captured early."""
    monkeypatch.setattr(decode_graphs, "CAPTURE_AT", 2)
    folder = FAMILIES[request.param](tmp_path)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    worlds.move(plain)
    with worlds.active():
        model = Model(plain)
        model.use_graphs(RecordedGraph)
    return Family(request.param, folder, ChatTemplate(load_processor(folder)), model, reference)


class Chats:
    """An engine on the device and its sessions, whose answers must equal those of `generate`."""

    def __init__(self, family: Family, worlds: Worlds, budget: DeviceBudget = AMPLE) -> None:
        self._family = family
        self._worlds = worlds
        self.engine = Engine(family.model, family.tokens.answer_text, budget, 48)
        self._shown: dict[str, list[tuple[PreparedPicture, ...]]] = {}
        self._expected: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}

    def open(self, name: str, seed: int) -> None:
        opening = self._family.tokens.opening([noise(seed)])
        self._shown[name] = [opening.pictures]
        self._apply(OpenSession(name, opening.token_ids, opening.pictures))
        self._run_to_end()

    def fork(self, name: str, donor: str) -> None:
        """Open a session with the tokens of another one."""
        self._shown[name] = self._shown[donor]
        token_ids = list(self.engine.sessions[donor].token_ids)
        self._apply(OpenSession(name, token_ids, self._shown[donor][0], fork_from=donor))
        self._run_to_end()

    def ask(self, name: str, seed: int, count: int, prompt_tokens: int = 5) -> None:
        """Start a turn with a prompt of random text."""
        draw = random.Random(seed)
        prompt = [draw.randrange(20, 250) for _ in range(prompt_tokens)]
        self._apply(AskSession(name, name, prompt, Sampling(count)))
        whole = self.engine.sessions[name].token_ids + prompt
        self._expected[name] = self._family.generate(whole, self._shown[name], count)

    def _apply(self, command: OpenSession | AskSession) -> None:
        with self._worlds.active():
            self.engine.apply(command)

    def step(self) -> None:
        with self._worlds.active():
            for event in self.engine.step():
                if isinstance(event, Finished):
                    assert event.answer_ids == self._expected.pop(event.turn_id), event.turn_id
                    self.cached[event.turn_id] = event.usage.cached_tokens

    def check(self) -> None:
        """Step until all turns are finished; compare their answers."""
        self._run_to_end()
        assert not self._expected

    def _run_to_end(self) -> None:
        while self.engine.has_work:
            self.step()


def test_answers_equal_generate_in_all_tiers_and_in_a_batch(family: Family, worlds: Worlds) -> None:
    model = family.model
    assert isinstance(model.token_attention, RaggedAttention)
    assert all(isinstance(layer, FusedLayer) for layer in model.text.layers)
    assert model.device == CUDA
    chats = Chats(family, worlds)
    for seed, name in enumerate("ab"):
        chats.open(name, seed)
    chats.ask("a", 1, 8)
    for _ in range(3):
        chats.step()
    # Its prefill is in steps with a token of the other session. It has two pieces of ragged attention.
    chats.ask("b", 2, 5, PIECE + 5)
    chats.check()
    kv = chats.engine.sessions["a"].kv
    with worlds.active():
        kv.offload()
    assert kv.tier == "offloaded"
    chats.ask("a", 3, 2)
    chats.ask("b", 4, 2)
    chats.check()
    assert kv.tier == "resident"
    assert chats.cached["a"] > 0
    with worlds.active():
        kv.drop()
    chats.ask("a", 5, 2)
    chats.check()
    assert chats.cached["a"] == 0
    chats.fork("c", "a")
    chats.ask("c", 6, 2)
    chats.ask("a", 7, 2)
    chats.check()
    assert chats.cached["c"] > 0
    assert model.graphs is not None
    assert model.graphs.is_on
    assert model.graphs.replays


@pytest.fixture(params=[("llava", 32), ("internvl3.5", 36)], ids=["LLaVA-1.5-7B", "InternVL3.5-8B"])
def deep(request: pytest.FixtureRequest, tmp_path: Path, worlds: Worlds) -> Model:
    """Return a model on the device with the layers of a published one, and few numbers in each."""
    name, layers = request.param
    folder = FAMILIES[name](tmp_path, num_hidden_layers=layers)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    worlds.move(plain)
    with worlds.active():
        return Model(plain)


def test_a_decode_step_takes_as_many_launches_for_any_number_of_sessions(deep: Model, worlds: Worlds) -> None:
    worlds.run_kernels = False  # they are counted only
    launches = {}
    for count in (1, 16, 64):
        with worlds.active():
            caches = [SessionKV(deep.kv_shape) for _ in range(count)]
            for kv in caches:
                kv.reserve(140)
                kv.on_device.zero_()
                kv.length = 130
            before = worlds.labels.launches
            waits = worlds.labels.waits
            logits, likeliest = deep.forward([Segment(kv, [300], None, [], True) for kv in caches])
            next_tokens(logits, [Sampler(Sampling(5))] * count, likeliest=likeliest)
            launches[count] = worlds.labels.launches - before
            assert worlds.labels.waits == waits + 1, "the tokens of all rows leave the device in one transfer"
    assert launches[1] == launches[16] == launches[64]
    layers = deep.kv_shape.layers
    assert 10 * layers < launches[1] <= 420
    assert launches[1] // layers <= 12


def test_a_step_from_tensors_on_the_device_computes_what_a_forward_computes(family: Family, worlds: Worlds) -> None:
    model = family.model
    prompts = [list(range(20, 20 + PIECE + 7)), [30, 31, 32]]
    with worlds.active():
        caches = [[SessionKV(model.kv_shape) for _ in prompts] for _ in range(2)]
        for pair in caches:
            model.forward([Segment(kv, ids, None, [], True) for kv, ids in zip(pair, prompts, strict=True)])
        expected = model.forward([Segment(kv, [40], None, [], True) for kv in caches[0]]).logits
        places = [(row, kv.address, kv.capacity, kv.length) for row, kv in enumerate(caches[1])]
        assert model.token_attention is not None
        heads = model.text.config.num_attention_heads
        batch = TokenBatch(model.token_attention, model.token_attention.task(places), heads)
        ids, positions = (torch.tensor(numbers).to(CUDA) for numbers in ([40, 40], [kv.length for kv in caches[1]]))
        waits = worlds.labels.waits
        got = model.decode(ids, positions, batch)
        assert worlds.labels.waits == waits, "a step that waits for the device can't be captured"
        assert torch.equal(got, expected)


def test_an_operation_on_both_worlds_is_found(worlds: Worlds) -> None:
    with worlds.active():
        on_device = torch.ones(3).to(CUDA)
        assert (on_device.device, torch.ones(3).device) == (CUDA, torch.device("cpu"))
        assert torch.equal((on_device + 1).cpu(), torch.full((3,), 2.0))
        for mix in (torch.add, torch.matmul, lambda one, other: one.index_copy_(0, torch.tensor([0]), other[:1])):
            with pytest.raises(MixedDevices):
                mix(on_device, torch.ones(3))
