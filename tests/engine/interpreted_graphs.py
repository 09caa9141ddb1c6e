"""Answers of the engine through recorded graphs and the kernels of attention equal those of `generate`.

Run by test_graphs.py in a process with TRITON_INTERPRET=1. The model is loaded as on CUDA: plain linears, fused layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from llava_sessions.engine import decode_graphs, process
from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.engine.cuda import graphs
from llava_sessions.engine.cuda.graphs import Bucket
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.loading import load_weights
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import CloseSession, EngineSettings, Sampling
from tests.engine.test_graphs import INVALID, BrokenGraph
from tests.support.engine_chats import QUESTIONS, Chats, Reference
from tests.support.recorded_graph import RecordedGraph
from tests.support.tiny_llava import make_checkpoint

PLENTY = DeviceBudget(2**40, 2**40)
LONG = " ".join(QUESTIONS[:1] * 10)  # its answer attends in two pieces


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of two layers: the interpreter takes milliseconds for each KV head of each layer."""
    folder = make_checkpoint(tmp_path_factory.mktemp("small"), kv_heads=1)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def _capture_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "CAPTURE_AT", 2)


class GraphChats(Chats):
    """Chats of an engine with fused layers and graphs, with the memory of a GPU."""

    def __init__(
        self, checkpoint: Path, make_graph: Callable[[], Any] | None, kv_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(checkpoint)
        model = Model(load_weights(checkpoint, torch.float32, "cpu"), frozenset(), kv_dtype)
        model.use_cuda_layers()
        if make_graph is not None:
            model.use_graphs(make_graph)
        self.model = model
        self.engine = Engine(model, self.tokens.answer_text, PLENTY)
        self.engine.device_memory.pool = None

    @property
    def graphs(self) -> Any:
        assert self.model.graphs is not None
        return self.model.graphs

    def move_all(self) -> None:
        """Grow each cache: it is at another address then."""
        for session in self.engine.sessions.values():
            before = session.kv.address
            session.kv.reserve(session.kv.capacity + 1)
            assert session.kv.address != before


@pytest.fixture(scope="module")
def reference(small: Path) -> Reference:
    """Return a reference whose answers have no end, so that all sessions of a test decode together."""
    made = Reference(small)
    made.model.generation_config.eos_token_id = None
    return made


def test_answers_equal_generate_while_caches_move_and_sessions_change(small: Path, reference: Reference) -> None:
    chats = GraphChats(small, RecordedGraph)
    questions = {"a": LONG, "b": "red?", "c": "two stars near it?"}
    for seed, name in enumerate(questions):
        chats.open(name, seed)
    chats.run()
    for number in range(2):
        expected = {}
        for name, question in questions.items():
            token_ids = chats.ask(name, question, Sampling(5))
            expected[name] = reference.answer(token_ids, chats.pixels(name), 5)
        chats.run(steps=3)
        chats.move_all()
        answers = chats.run()
        assert {name: done.answer_ids for name, done in answers.items()} == expected
        if number == 0:
            captures = chats.graphs.captures
        # Before the next turn: one cache moves to the host and is restored, one is freed and prefilled again, and one
        # session is replaced by another.
        chats.engine.sessions["a"].kv.offload()
        chats.engine.sessions["b"].kv.drop()
        chats.engine.apply(CloseSession("c"))
        chats.open("c", 10 + number)
        chats.run()
        questions["a"] = "and now?"
    assert chats.graphs.is_on
    assert chats.graphs.captures == captures == 1
    assert chats.graphs.replays == 3 + 4


def test_sampled_tokens_equal_those_without_graphs(small: Path) -> None:
    """Two sampled sessions and a greedy one in one batch, with KV caches in int8."""
    answers = []
    for made in (GraphChats(small, RecordedGraph, torch.int8), GraphChats(small, None, torch.int8)):
        for seed, name in enumerate(("a", "b", "c")):
            made.open(name, seed)
        made.run()
        made.ask("a", QUESTIONS[0], Sampling(5, temperature=1.3, top_p=0.9, seed=5))
        made.ask("b", QUESTIONS[0], Sampling(5))
        made.ask("c", QUESTIONS[0], Sampling(5, temperature=0.7, seed=6))
        answers.append({name: done.answer_ids for name, done in made.run().items()})
        assert made.model.graphs is None or made.graphs.replays == 3  # of four steps that decode
    assert answers[0] == answers[1]
    assert len({*map(tuple, answers[0].values())}) == 3


@pytest.mark.parametrize(
    "errors",
    [(INVALID, None), (None, INVALID), (torch.OutOfMemoryError("CUDA out of memory."), None)],
    ids=["capture", "replay", "memory"],
)
def test_an_error_in_a_graph_changes_no_answer(small: Path, reference: Reference, errors: Any) -> None:
    chats = GraphChats(small, lambda: BrokenGraph(*errors))
    chats.open("a", 1)
    token_ids = chats.ask("a", QUESTIONS[0], Sampling(5))
    assert chats.run()["a"].answer_ids == reference.answer(token_ids, chats.pixels("a"), 5)
    assert chats.graphs.captured == []
    assert chats.graphs.is_on == isinstance(errors[0], torch.OutOfMemoryError)


def test_an_engine_tries_and_captures_graphs_at_its_start(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GraphChats(small, RecordedGraph).model
    monkeypatch.setattr(Model, "load", lambda *_, **__: model)
    for module in (decode_graphs, graphs):
        monkeypatch.setattr(module, "ROWS", (1, 2))
    monkeypatch.setattr(decode_graphs, "PREPARED_ROWS", (1, 2))
    settings = EngineSettings(str(small), system_prompt="", dtype="float32", device="cpu", prefill_chunk_tokens=256)
    engine = process.load(settings)
    assert engine.model.graphs is not None
    assert engine.model.graphs.is_on
    assert engine.model.graphs.captured == [Bucket(1, 1), Bucket(2, 2)]


class Launches(TorchDispatchMode):
    """Records the addresses of the targets of copies, and the names of other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[int] = []
        self.others: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.targets.append(args[0].data_ptr())
        else:
            self.others.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


class CountedGraph(RecordedGraph):
    """A graph whose replay is one launch: its operations are not counted again."""

    counted = 0

    def replay(self) -> None:
        CountedGraph.counted += 1
        with _disable_current_modes():
            super().replay()


def test_a_graph_step_is_one_replay_and_one_copy(small: Path) -> None:
    """Whatever the number of layers: without the graph each layer takes about ten launches."""
    chats = GraphChats(small, CountedGraph)
    for seed, name in enumerate(("a", "b", "c")):
        chats.open(name, seed)
        chats.ask(name, QUESTIONS[0], Sampling(9))
    chats.run(steps=6)
    assert chats.graphs.captured
    CountedGraph.counted = 0
    segments = [session.segment(1) for session in chats.engine.sessions.values()]
    with torch.inference_mode(), Launches() as launches:
        assert chats.graphs.step(segments) is not None
    assert CountedGraph.counted == 1
    # On the host numbers are written to one tensor, which goes to the inputs of the graph in one copy.
    (step,) = chats.graphs._captured.values()
    copies = [target for target in launches.targets if target == step.numbers.data_ptr()]
    assert len(copies) == 1
    assert len(launches.targets) == 3
    assert not launches.others & {"embedding", "linear", "addmm", "addmm_", "mm", "rms_norm", "silu", "mul", "argmax"}
