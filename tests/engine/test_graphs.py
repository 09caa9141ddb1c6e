"""Which decode steps run as CUDA graphs: buckets, inputs at fixed addresses, memory, errors.

The graphs are recorded on a CPU. Answers through graphs, with the kernels of attention, are in interpreted_graphs.py,
which runs in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_sessions.engine import decode_graphs
from llava_sessions.engine.attention import Segment
from llava_sessions.engine.budget import GRAPHS_BYTES, choose_budget
from llava_sessions.engine.cuda.graphs import Bucket, CapturedStep, CUDAGraph, CUDAGraphs, bucket_of
from llava_sessions.engine.cuda.ragged import RaggedAttention
from llava_sessions.engine.decode_graphs import CAPTURE_AT, MOST_GRAPHS, DecodeGraphs
from llava_sessions.engine.engine import Engine
from llava_sessions.engine.fused.layer import Batch
from llava_sessions.engine.kv import KVShape, SessionKV
from llava_sessions.engine.model import Model
from llava_sessions.ipc.messages import Sampling
from tests.support.engine_chats import QUESTIONS, Chats, Reference
from tests.support.interpreter import check_interpreted
from tests.support.recorded_graph import RecordedGraph

CPU = torch.device("cpu")
SHAPE = KVShape(1, 2, 16, torch.float32, CPU)
ATTENTION = RaggedAttention(4, 2, 16, torch.float32, CPU)
MIB = 2**20


def decode(ids: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Predict the token ID plus its position, of 50 tokens. Without attention, so that it runs uninterpreted."""
    return torch.nn.functional.one_hot((ids + positions) % 50, 50).float()


def make_graphs(make_graph: Callable[[], Any] = RecordedGraph) -> DecodeGraphs:
    return DecodeGraphs(decode, ATTENTION, 4, SHAPE, make_graph)


def segment(token: int, stored: int = 0) -> Segment:
    kv = SessionKV(SHAPE)
    kv.reserve(stored + 1)
    kv.length = stored
    return Segment(kv, [token], None, [], True)


def run_until_captured(graphs: DecodeGraphs, segments: list[Segment]) -> Any:
    for _ in range(CAPTURE_AT - 1):
        assert graphs.step(segments) is None
    return graphs.step(segments)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([0], Bucket(1, 1)),
        ([127], Bucket(1, 1)),
        ([128], Bucket(1, 2)),
        ([300, 0, 5], Bucket(4, 8)),  # 3 + 1 + 1 pieces
        ([0] * 9, Bucket(12, 16)),
        ([1000] * 64, Bucket(64, 512)),
        ([0] * 65, None),
        ([], None),
    ],
)
def test_the_smallest_bucket_is_taken(stored: list[int], expected: Bucket | None) -> None:
    assert bucket_of([(row, 64, 2048, count) for row, count in enumerate(stored)]) == expected


def test_inputs_stay_at_their_addresses_and_spare_rows_have_no_cache() -> None:
    step = CapturedStep(Bucket(4, 4), RecordedGraph(), ATTENTION, CPU)
    address = step.numbers.data_ptr()
    step.fill([7, 8, 9, 9], [1, 2, 3, 3], [(row, 640, 256, 0) for row in range(4)])
    step.fill([5, 6], [3, 130], [(0, 64, 256, 3), (1, 128, 256, 130)])
    assert step.numbers.data_ptr() == address
    ids, positions, places, pieces = step.numbers.split((4, 4, 20, 8))
    assert ids.tolist() == [5, 6, 0, 0]
    assert positions.tolist() == [3, 130, 0, 0]
    assert places.view(4, 5).tolist() == [[0, 64, 256, 3, 0], [1, 128, 256, 130, 1], [2, 0, 0, 0, -1], [3, 0, 0, 0, -1]]
    assert pieces.view(4, 2).tolist() == [[0, 0], [1, 0], [1, 128], [0, -1]]


def test_a_bucket_is_captured_once_and_serves_other_sessions_and_lengths() -> None:
    graphs = make_graphs()
    first = run_until_captured(graphs, [segment(3, 10), segment(4, 20), segment(5, 30)])
    assert first.likeliest.tolist() == [13, 24, 35]
    assert first.logits.shape == (3, 50)
    assert first.logits.argmax(-1).tolist() == [13, 24, 35]
    for stored in (0, 40, 100):
        step = graphs.step([segment(7, stored), segment(8, stored), segment(9), segment(1)])
        assert step is not None
        assert step.likeliest is not None
        assert step.likeliest.tolist() == [(7 + stored) % 50, (8 + stored) % 50, 9, 1]
    assert (graphs.captures, graphs.replays) == (1, 4)


def test_only_steps_that_decode_run_as_graphs() -> None:
    graphs = make_graphs()
    kv = SessionKV(SHAPE)
    features = torch.zeros(1, 8)
    others = [
        Segment(kv, [1, 2], None, [], True),
        Segment(kv, [1], features, [0], True),
        Segment(kv, [1], None, [], False),
    ]
    for other in others:
        for _ in range(CAPTURE_AT + 1):
            assert graphs.step([segment(1), other]) is None
    assert not graphs.captures


def test_the_least_recently_used_graph_is_dropped_for_a_new_one() -> None:
    graphs = make_graphs()
    sizes = [Bucket(1, 2**count) for count in range(MOST_GRAPHS + 1)]
    lengths = [size.pieces * 128 - 1 for size in sizes]
    shape = KVShape(1, 1, 2, torch.float32, CPU)  # 2**16 pieces of it are 128 MiB

    def long(stored: int) -> Segment:
        kv = SessionKV(shape)
        kv.reserve(stored + 1)
        kv.length = stored
        return Segment(kv, [1], None, [], True)

    for stored in lengths[:-1]:
        run_until_captured(graphs, [long(stored)])
    graphs.step([long(lengths[0])])
    run_until_captured(graphs, [long(lengths[-1])])
    assert graphs.captured == [*sizes[2:-1], sizes[0], sizes[-1]]
    assert graphs.captures == MOST_GRAPHS + 1
    # The dropped one is captured again, also only after some steps.
    run_until_captured(graphs, [long(lengths[1])])


class BrokenGraph(RecordedGraph):
    """A graph whose capture or replay raises an error, or whose replay does nothing."""

    def __init__(self, capture_error: Exception | None = None, replay_error: Exception | None = None) -> None:
        super().__init__()
        self._capture_error = capture_error
        self._replay_error = replay_error

    def capture(self, work: Callable[[], None]) -> None:
        assert not gc.isenabled()
        if self._capture_error is not None:
            raise self._capture_error
        super().capture(work)

    def replay(self) -> None:
        if self._replay_error is not None:
            raise self._replay_error


INVALID = RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("errors", [(INVALID, None), (None, INVALID)], ids=["capture", "replay"])
def test_after_an_error_no_step_is_a_graph(errors: Any, caplog: pytest.LogCaptureFixture) -> None:
    made: list[BrokenGraph] = []

    def make() -> BrokenGraph:
        made.append(BrokenGraph(*errors))
        return made[-1]

    graphs = make_graphs(make)
    assert run_until_captured(graphs, [segment(1)]) is None
    assert caplog.messages == [f"graphs_failed error=RuntimeError: {INVALID}"]
    assert gc.isenabled()
    for _ in range(CAPTURE_AT):
        assert graphs.step([segment(1)]) is None
        assert graphs.step([segment(1), segment(1)]) is None
    assert len(made) == 1
    assert graphs.captured == []


@pytest.mark.parametrize("place", [0, 1], ids=["capture", "replay"])
def test_without_memory_the_step_fails_once_and_then_runs_without_a_graph(place: int) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory.")
    errors = [None, None]
    errors[place] = error
    made: list[RecordedGraph] = [BrokenGraph(*errors), RecordedGraph()]
    graphs = make_graphs(lambda: made.pop(0))
    with pytest.raises(torch.OutOfMemoryError):
        run_until_captured(graphs, [segment(1)])
    for _ in range(CAPTURE_AT):
        assert graphs.step([segment(1)]) is None
    # Other buckets have their own try.
    assert run_until_captured(graphs, [segment(1), segment(2)]).likeliest.tolist() == [1, 2]


def prepared(monkeypatch: pytest.MonkeyPatch, free: list[int], limit_bytes: int) -> tuple[DecodeGraphs, int]:
    """Return prepared graphs, and the result of `prepare`. `free`: free memory of the device at each question."""
    graphs = make_graphs()
    answers = iter(free)
    monkeypatch.setattr(graphs, "_free_bytes", lambda: next(answers))
    return graphs, graphs.prepare(limit_bytes, chat_tokens=600)


def test_prepare_captures_the_largest_and_small_ones_and_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials and the pool take 50 MiB, each further graph 10 MiB. A limit of 192 MiB has room for 14 graphs."""
    free = [960 * 128 * SHAPE.token_bytes]
    free += [free[0] - (50 + 10 * count) * MIB for count in (0, 1, 1, 2, 2, 3, 3, 4, 4)]
    graphs, rest = prepared(monkeypatch, free, 192 * MIB)
    assert graphs.captured == [
        Bucket(1, 1),
        Bucket(64, 1024),
        Bucket(1, 8),
        Bucket(2, 16),
        Bucket(4, 32),
        Bucket(8, 64),
    ]
    assert rest == (192 - 50 - 40) * MIB
    assert graphs._most == 6 + rest // (10 * MIB)
    assert graphs.step([segment(1, 600)]) is not None  # captured before its first step


def test_the_largest_graph_leaves_memory_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece takes 4 x (16 + 2) float32 numbers of scratch memory, all pieces at most a quarter of the limit."""
    free = [80 * 2**30] * 12
    graphs, _ = prepared(monkeypatch, free, 192 * MIB)
    assert graphs.captured[1] == Bucket(64, 2**17)
    assert 2**17 * 4 * 18 * 4 <= 48 * MIB < 2**18 * 4 * 18 * 4


def test_a_step_larger_than_the_largest_graph_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, _ = prepared(monkeypatch, [0] * 12, 10 * MIB)  # the largest has 64 pieces
    kv = SessionKV(SHAPE)
    kv.reserve(64 * 128)
    kv.length = 64 * 128 - 1
    big = [Segment(kv, [1], None, [], True)]
    assert run_until_captured(graphs, big) is not None
    kv.length += 1
    for _ in range(CAPTURE_AT + 1):
        assert graphs.step(big) is None


def test_graphs_that_do_not_fit_their_memory_are_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = [1000 * MIB, *[700 * MIB] * 9]
    graphs, rest = prepared(monkeypatch, free, 192 * MIB)
    assert rest == 0
    assert not graphs.is_on
    assert caplog.messages == [f"graphs_too_large held_bytes={300 * MIB} limit_bytes={192 * MIB}"]


def test_without_memory_for_graphs_none_is_captured() -> None:
    graphs = make_graphs()
    assert graphs.prepare(0, chat_tokens=600) == 0
    assert not graphs.is_on
    assert graphs.captures == 0


def test_prepare_stops_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "PREPARE_SECONDS", -1.0)
    graphs = make_graphs()
    graphs.prepare(192 * MIB, chat_tokens=600)
    assert graphs.captured == [Bucket(1, 1), Bucket(64, 64), Bucket(1, 8)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BrokenGraph(), "graphs_wrong"),
        (lambda: BrokenGraph(INVALID), f"graphs_failed error=RuntimeError: {INVALID}"),
    ],
    ids=["wrong", "failed"],
)
def test_a_trial_that_fails_turns_graphs_off(make: Any, message: str, caplog: pytest.LogCaptureFixture) -> None:
    """`BrokenGraph()` replays nothing: the outputs stay as they were."""
    graphs = make_graphs(make)
    assert graphs.prepare(192 * MIB, chat_tokens=600) == 0
    assert caplog.messages == [message]
    assert not graphs.is_on
    assert graphs.step([segment(1)]) is None


class FakeCUDA:
    """The parts of `torch.cuda` that a capture uses. The end of a capture in which an error was raised is an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream = "stream of the engine"
        self.log: list[str] = []
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")

    def graph(self, graph: Any, pool: str, capture_error_mode: str) -> Any:
        assert (graph, pool, capture_error_mode) == (self, "pool", "thread_local")
        return self

    def __enter__(self) -> None:
        self.stream = "stream of the capture"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            raise INVALID
        self.stream = "stream of the engine"

    def replay(self) -> None:
        self.log.append("replay")


def test_a_cuda_graph_restores_the_stream_and_raises_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCUDA(monkeypatch)
    graph = CUDAGraphs()()
    assert isinstance(graph, CUDAGraph)

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        graph.capture(out_of_memory)
    assert cuda.stream == "stream of the engine"
    graph.capture(lambda: cuda.log.append("work"))
    graph.replay()
    assert cuda.log == ["work", "replay"]


def test_chats_through_graphs() -> None:
    check_interpreted("interpreted_graphs.py")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_answers_through_graphs_of_a_gpu_equal_generate(tiny: Path) -> None:
    """Caches are at other addresses in each turn, and no size is captured again."""
    chats = Chats(tiny)
    model = Model.load(tiny, "float32", "cuda")
    chats.engine = Engine(model, chats.tokens.answer_text, choose_budget(model.device))
    graphs = model.graphs
    assert graphs is not None
    before = torch.cuda.memory_reserved()
    assert graphs.prepare(GRAPHS_BYTES, chat_tokens=100) > 0
    assert torch.cuda.memory_reserved() - before <= GRAPHS_BYTES
    reference = Reference(tiny)
    names = ["a", "b", "c"]
    for seed, name in enumerate(names):
        chats.open(name, seed)
    chats.run()
    for question in QUESTIONS[::2] * 2:
        expected = {}
        for count, name in enumerate(names):
            token_ids = chats.ask(name, question, Sampling(12 + count))
            expected[name] = reference.answer(token_ids, chats.pixels(name), 12 + count)
        assert {name: done.answer_ids for name, done in chats.run().items()} == expected
        for session in chats.engine.sessions.values():
            session.kv.offload()
    assert graphs.is_on
    assert graphs.captures == len(graphs.captured)
    assert graphs.replays > 3 * 4
